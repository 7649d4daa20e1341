"""Linear segmentation probe on digit scenes: a 1 x 1 convolution on frozen features.

Data:     python demo/make_digit_scenes.py
Command:  python tools/train.py configs/demo/digits_segment_linear.py
With a random network:  --cfg-options model.backbone.init_cfg=None

Batch normalisation and the convolution read the first block, like digits_linear.py.
"""
_base_ = ['./digits_upernet.py']

model = dict(
    backbone=dict(frozen_stages=4, out_indices=[0]),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='LinearSegHead',
        in_channels=96,
        in_index=0,
        channels=96,
        num_classes=11,
        dropout_ratio=0.,
        norm_cfg=dict(type='SyncBN'),
        loss_decode=dict(type='CrossEntropyLoss')),
    auxiliary_head=None)

optim_wrapper = dict(optimizer=dict(lr=1e-2))
