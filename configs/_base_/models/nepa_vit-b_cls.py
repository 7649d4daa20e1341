"""NEPA's classifier: mean of the patches, a new LayerNorm, a zero-initialised linear layer."""
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='NEPAViT',
        arch='base',
        patch_size=14,
        causal=False,
        qk_norm='affine',       # initialised to one: no effect on a checkpoint without it
        layer_scale_init_value=1e-5,
        rope_rescale=2.,
        drop_path_rate=0.1,
        out_type='avg_featmap',
        fc_norm=True,
        frozen_stages=0,        # freezes the patch embedding, not the class token
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/nepa_vit-b/epoch_1600.pth',
            prefix='backbone.')),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(type='CrossEntropyLoss', use_soft=True),
        init_cfg=dict(type='Constant', layer='Linear', val=0)),
    data_preprocessor=dict(
        type='NEPAClsDataPreprocessor',
        num_classes=1000,       # RunCheckHook sets the head's number, also for Mixup
        mean=[127.5] * 3,
        std=[127.5] * 3,
        to_rgb=True,
        batch_augments=dict(augments=dict(type='TimmBatchAugment'))))
