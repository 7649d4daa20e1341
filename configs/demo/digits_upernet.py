"""Segmentation of digit scenes with UPerNet, from the checkpoint of digits_pretrain.py.

Data:     python demo/make_digit_scenes.py
Command:  python tools/train.py configs/demo/digits_upernet.py
From scratch, with the same recipe:  --cfg-options model.backbone.init_cfg=None

ADE20K's recipe with the small network of the demo, on 100 scenes of 32 pixels. Patches have 4
pixels, so the pyramid starts at twice their resolution instead of four times. Such a short run
needs a large learning rate without layer decay and drop path, a trained patch embedding, the
attention of pretraining, and the full auxiliary loss on the last block.
"""
_base_ = ['../segmentation/nepa_vit-b_upernet_160k_ade20k-512x512.py']

scene = (32, 32)
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=96, num_layers=4, num_heads=4, feedforward_channels=384),
        patch_size=4,
        causal=True,
        qk_norm='plain',
        layer_scale_init_value=0.1,
        frozen_stages=-1,
        drop_path_rate=0.,
        out_indices=[0, 1, 2, 3],
        final_norm=True,
        init_cfg=dict(checkpoint='work_dirs/digits_pretrain/epoch_60.pth')),
    neck=dict(embed_dim=96, rescales=[2, 1, 0.5, 0.25]),
    decode_head=dict(in_channels=[96] * 4, channels=64, num_classes=11, dropout_ratio=0.),
    auxiliary_head=dict(
        in_channels=96, in_index=3, channels=64, num_classes=11, dropout_ratio=0.,
        loss_decode=dict(loss_weight=1.0)),
    data_preprocessor=dict(size=scene),
    test_cfg=dict(_delete_=True, mode='whole'))

train_pipeline = [
    dict(type='LoadImageFromFile', _scope_='nepa_mm'),      # resolves to LoadImageWithPillow
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
test_pipeline = train_pipeline      # mmseg's inference reads it by this name
scenes = dict(
    _delete_=True,
    type='BaseSegDataset',
    data_root='data/digit_scenes',
    reduce_zero_label=True,
    metainfo=dict(
        classes=('background', *'0123456789'),
        palette=[[0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200],
                 [245, 130, 48], [145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60],
                 [250, 190, 212]]),
    pipeline=train_pipeline)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **scenes,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training')))
val_dataloader = dict(
    batch_size=25,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **scenes,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation')))
test_dataloader = val_dataloader

iters = 250
optim_wrapper = dict(optimizer=dict(lr=4e-3), paramwise_cfg=dict(layer_decay_rate=1.))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=iters // 10),
    dict(type='PolyLR', power=1.0, eta_min=0., by_epoch=False, begin=iters // 10, end=iters),
]
train_cfg = dict(max_iters=iters, val_interval=iters)
default_hooks = dict(checkpoint=dict(interval=iters))
