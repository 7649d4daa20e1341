"""NEPA, ViT-S/16 at 224 px, Imagenette, 200 epochs on one GPU: the setting of public figures.

Paper:    none; this is our scaled-down recipe.
Expected: unknown, not run here. MAE ViT-S/16 in this setting: k-NN 72.1 %, linear 84.1 %
          (published by others).
Cost:     9,469 images x 200 epochs = 1.9 million images of 196 patches, on one GPU.
Command:  python tools/train.py configs/pretrain/nepa_vit-s_200e_imagenette-224.py

Data: the full-size Imagenette, unpacked to data/imagenette2/{train,val}/<wnid>/*.JPEG.

Differences from nepa_vit-s_imagenette.py: 224 px in 14 x 14 patches; 200 epochs, 10 of them warmup;
the EMA averages over 2 % of the 7,400 updates, the fraction of the released recipe.
"""
_base_ = ['./nepa_vit-s_imagenette.py']

train_pipeline = _base_.train_pipeline
train_pipeline[0].scale = 224
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

epochs = 200
param_scheduler = dict(warmup=epochs // 20, end=epochs)
train_cfg = dict(max_epochs=epochs)
custom_hooks = _base_.custom_hooks
custom_hooks[0] = dict(type='ModelEMAHook', run_fraction=0.02)
