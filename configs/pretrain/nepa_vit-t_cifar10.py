"""NEPA, ViT-T/4 at 32 px, CIFAR-10, 1600 epochs on one GPU: a recipe for small images.

Paper:    none; this is our scaled-down recipe.
Expected: unknown, not run here.
Cost:     50,000 images x 1600 epochs = 80 million images of 64 patches, on one GPU.
Command:  python tools/train.py configs/pretrain/nepa_vit-t_cifar10.py

Data: mmpretrain's CIFAR10 downloads 170 MB to data/cifar10.

Differences from nepa_vit-s.py: 32 px in 8 x 8 patches of 4 px; ViT-T; batch 512 with the same lr
rule; a faster EMA, because a run has 156,800 updates instead of 500,800; LayerScale starts at 0.1,
because 1e-5 suits long runs; no reader of files, because the data set holds its pixels. Crops cover
at least 20 % of the area: 8 % of 32 x 32 pixels are 9 x 9.
"""
_base_ = ['./nepa_vit-s.py']

data_root = 'data/cifar10'

model = dict(backbone=dict(arch='tiny', patch_size=4, layer_scale_init_value=0.1))

train_pipeline = [
    dict(
        type='RandomResizedCrop',
        scale=32,
        crop_ratio_range=(0.2, 1.0),
        interpolation='bilinear',
        backend='pillow'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
batch = 512
train_dataloader = dict(
    batch_size=batch,
    dataset=dict(
        _delete_=True,
        type='CIFAR10',
        data_root=data_root,
        split='train',
        pipeline=train_pipeline))

optim_wrapper = dict(optimizer=dict(lr=_base_.base_lr * batch / 256))
auto_scale_lr = dict(base_batch_size=batch)
custom_hooks = _base_.custom_hooks
custom_hooks[0] = dict(type='ModelEMAHook', run_fraction=0.02)
default_hooks = dict(checkpoint=dict(interval=20))
