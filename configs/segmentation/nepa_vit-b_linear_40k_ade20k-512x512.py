"""Linear segmentation probe of NEPA, ViT-B/14, on ADE20K, 40k iterations: frozen backbone.

Paper:    none; the paper has no such figure.
Expected: unknown, not run here.
Cost:     40k iterations at batch 16; the backbone runs forward only.
Command:  tools/dist_train.sh configs/segmentation/nepa_vit-b_linear_40k_ade20k-512x512.py 8
Starts from work_dirs/nepa_vit-b/epoch_1600.pth; another checkpoint:
          --cfg-options model.backbone.init_cfg.checkpoint=FILE

Batch normalisation and one 1 x 1 convolution read the concatenated four blocks of the UPerNet
config. The last block alone is trained to resemble the next embedding and is shallow by
construction (paper, Table 6). The causal mask stays on: the frozen weights were trained with it.

Not stated in the paper, taken from DINOv2's linear segmentation: AdamW with lr 1e-3, betas 0.9
and 0.999 and weight decay 1e-4, 1500 iterations of warmup, then linear decay to 0, 40k iterations
at batch 16.
"""
_base_ = ['./nepa_vit-b_upernet_160k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        causal=True,
        qk_norm='plain',
        drop_path_rate=0.,
        frozen_stages=12),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='LinearSegHead',
        in_channels=[768] * 4,
        in_index=[0, 1, 2, 3],
        input_transform='resize_concat',
        channels=4 * 768,
        num_classes=150,
        dropout_ratio=0.,
        norm_cfg=dict(type='SyncBN'),
        loss_decode=dict(type='CrossEntropyLoss')),
    auxiliary_head=None)

optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=1e-4), paramwise_cfg=dict(layer_decay_rate=1.))
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = 40000
train_cfg = dict(max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
