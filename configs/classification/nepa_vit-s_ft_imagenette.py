"""Fine-tuning of NEPA, ViT-S/16 at 160 px, on Imagenette, 100 epochs, one GPU.

Paper:    none; this is our scaled-down recipe, for nepa_vit-s_imagenette.py.
Expected: unknown, not run here.
Cost:     9,469 images x 100 epochs.
Command:  python tools/train.py configs/classification/nepa_vit-s_ft_imagenette.py
Starts from work_dirs/nepa_vit-s_imagenette/epoch_1600.pth.

Data: the full-size Imagenette, unpacked to data/imagenette2/{train,val}/<wnid>/*.JPEG.
The released recipe of nepa_vit-b_ft_in1k.py at batch 128 with the same lr rule. Translations are
up to 0.45 of the image, as at 224 px. The EMA is faster (decay 0.999).
"""
_base_ = ['./nepa_vit-b_ft_in1k.py']

data_root = 'data/imagenette2'

model = dict(
    backbone=dict(
        arch='small',
        patch_size=16,
        layer_scale_init_value=0.1,
        init_cfg=dict(checkpoint='work_dirs/nepa_vit-s_imagenette/epoch_1600.pth')),
    head=dict(in_channels=384, num_classes=10))

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[1].scale = 160
train_pipeline[3].translate_const = 72
test_pipeline[1].scale = 183
test_pipeline[2].crop_size = 160
dataset = dict(_delete_=True, type='CustomDataset', data_root=data_root)
train_dataloader = dict(
    batch_size=128, dataset=dict(**dataset, data_prefix='train', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**dataset, data_prefix='val', pipeline=test_pipeline))
test_dataloader = val_dataloader

batch = 128
optim_wrapper = dict(
    optimizer=dict(lr=_base_.base_lr * batch / 256), paramwise_cfg=dict(head_lr=1e-3))
auto_scale_lr = dict(base_batch_size=batch)
custom_hooks = [dict(type='ModelEMAHook', momentum=1e-3, evaluate_on_origin=True)]
