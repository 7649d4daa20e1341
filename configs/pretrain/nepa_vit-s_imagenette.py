"""NEPA, ViT-S/16 at 160 px, Imagenette, 1600 epochs on one GPU: a recipe for small data.

Paper:    none; this is our scaled-down recipe.
Expected: unknown, not run here.
Cost:     9,469 images x 1600 epochs = 15 million images of 100 patches, on one GPU.
Command:  python tools/train.py configs/pretrain/nepa_vit-s_imagenette.py

Data: the full-size Imagenette, unpacked to data/imagenette2/{train,val}/<wnid>/*.JPEG.

Differences from nepa_vit-s.py: 160 px in 10 x 10 patches of 16 px; batch 256 with the same lr rule;
a faster EMA (decay 0.999), because a run has 59,200 updates instead of 500,800; LayerScale starts
at 0.1, because 1e-5 suits long runs. Weight decay and learning-rate schedules keep their shape.
"""
_base_ = ['./nepa_vit-s.py']

data_root = 'data/imagenette2'

model = dict(backbone=dict(patch_size=16, layer_scale_init_value=0.1))

train_pipeline = _base_.train_pipeline
train_pipeline[0].scale = 160
train_dataloader = dict(
    batch_size=256,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        pipeline=train_pipeline))

batch = 256
optim_wrapper = dict(optimizer=dict(lr=_base_.base_lr * batch / 256))
auto_scale_lr = dict(base_batch_size=batch)
custom_hooks = _base_.custom_hooks
custom_hooks[0].momentum = 1e-3
default_hooks = dict(checkpoint=dict(interval=20))
