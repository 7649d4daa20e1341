"""NEPA on the 60,000 training images of Fashion-MNIST: the pretraining of `make study`.

Command:  python tools/train.py configs/fashion_mnist/fashion_pretrain.py

ImageNet's recipe with a network of 0.8 M parameters on grey images of 28 x 28 pixels in 7 x 7
patches of 4 pixels. mmpretrain's FashionMNIST downloads 31 MB to data_root. Differences, for a run
of 3,752 updates instead of 500,800: a larger learning rate, a faster EMA, LayerScale starting at
0.1. Crops cover at least 30 % of the area.
"""
_base_ = [
    '../_base_/models/nepa_vit-b.py',
    '../_base_/schedules/pretrain_bs4096_1600e.py',
    '../_base_/runtime.py',
]

data_root = 'data/fashion_mnist'
embed_dims = 128        # the network: width and number of blocks
num_layers = 4
epochs = 4
lr = 2e-3               # at batch 64

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=embed_dims, num_layers=num_layers,
            num_heads=embed_dims // 32, feedforward_channels=4 * embed_dims),
        img_size=28,            # of learned positions, which ablations have
        patch_size=4,
        in_channels=1,
        layer_scale_init_value=0.1),
    data_preprocessor=dict(mean=[127.5], std=[127.5], to_rgb=False))

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='FashionMNIST',
        data_root=data_root,
        split='train',
        pipeline=[
            dict(
                type='RandomResizedCrop',
                scale=28,
                crop_ratio_range=(0.3, 1.0),
                interpolation='bilinear',
                backend='pillow'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackInputs'),
        ]))

optim_wrapper = dict(optimizer=dict(lr=lr), accumulative_counts=1)
param_scheduler = dict(warmup=0, warmup_ratio=0.05, end=epochs)
train_cfg = dict(max_epochs=epochs)
auto_scale_lr = dict(base_batch_size=64)

custom_hooks = [
    dict(type='ModelEMAHook', run_fraction=0.05),
    dict(type='NEPAMonitorHook', interval=None),
]
default_hooks = dict(checkpoint=dict(interval=max(epochs // 5, 1), max_keep_ckpts=1))
