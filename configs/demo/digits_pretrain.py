"""NEPA on the 1,297 training digits of scikit-learn: the pretraining of `make demo`.

Command:  python tools/train.py configs/demo/digits_pretrain.py

ImageNet's recipe with a small network (0.45 M parameters) on images of 16 x 16 pixels in 4 x 4
patches. Digits must not be flipped. A short run needs a faster EMA (decay 0.99), a larger learning
rate than 3e-4 x batch / 256, and LayerScale starting at 0.1.
"""
_base_ = [
    '../_base_/models/nepa_vit-b.py',
    '../_base_/schedules/pretrain_bs4096_1600e.py',
    '../_base_/runtime.py',
]

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=96, num_layers=4, num_heads=4, feedforward_channels=384),
        patch_size=4,
        layer_scale_init_value=0.1))

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='Digits',
        split='train',
        pipeline=[
            # allows crops at fractions of the original pixels
            dict(type='Resize', scale=(32, 32), interpolation='bilinear', backend='pillow'),
            dict(
                type='RandomResizedCrop',
                scale=16,
                crop_ratio_range=(0.3, 1.0),
                interpolation='bilinear',
                backend='pillow'),
            dict(type='PackInputs'),
        ]))

optim_wrapper = dict(optimizer=dict(lr=2e-3), accumulative_counts=1)
param_scheduler = dict(warmup=3, end=60)
train_cfg = dict(max_epochs=60)
auto_scale_lr = dict(base_batch_size=64)

custom_hooks = [
    dict(type='ModelEMAHook', momentum=0.01),
    dict(type='NEPAMonitorHook', interval=21),
]
default_hooks = dict(
    checkpoint=dict(interval=60), logger=dict(type='LoggerHook', interval=21))
