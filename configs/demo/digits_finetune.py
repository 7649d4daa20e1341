"""Fine-tuning on a few labelled digits, from the checkpoint of digits_pretrain.py.

Command:  python tools/train.py configs/demo/digits_finetune.py
From scratch, with the same recipe:  --cfg-options model.backbone.init_cfg=None

As on ImageNet, the patch embedding is frozen, lower blocks learn more slowly, and a new LayerNorm
and a zero-initialised classifier read the mean of the patches. Attention stays causal: with so few
steps, runs with and without pretraining are better than with the mask off.
"""
_base_ = ['./digits_pretrain.py']

num_labels = 100

model = dict(
    _delete_=True,
    type='ImageClassifier',
    backbone=dict(
        type='NEPAViT',
        arch=dict(embed_dims=96, num_layers=4, num_heads=4, feedforward_channels=384),
        patch_size=4,
        layer_scale_init_value=0.1,
        out_type='avg_featmap',
        fc_norm=True,
        frozen_stages=0,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/digits_pretrain/epoch_60.pth',
            prefix='backbone.')),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=96,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='Constant', layer='Linear', val=0)),
    data_preprocessor=dict(
        type='NEPAClsDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True))

train_dataloader = dict(
    batch_size=50, num_workers=0, persistent_workers=False,
    dataset=dict(num_labels=num_labels))
val_dataloader = dict(
    batch_size=250,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='Digits',
        split='test',
        pipeline=[
            dict(type='Resize', scale=(16, 16), interpolation='bilinear', backend='pillow'),
            dict(type='PackInputs'),
        ]))
test_dataloader = val_dataloader
val_cfg = test_cfg = dict()
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1, 5))

optim_wrapper = dict(
    optimizer=dict(lr=2e-3, betas=(0.9, 0.999)), paramwise_cfg=dict(layer_decay_rate=0.7))
epochs = 80
param_scheduler = dict(warmup=8, end=epochs)
train_cfg = dict(max_epochs=epochs, val_interval=epochs)

custom_hooks = []
default_hooks = dict(checkpoint=dict(interval=epochs))
