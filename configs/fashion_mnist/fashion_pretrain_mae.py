"""MAE, of mmpretrain, on Fashion-MNIST: the baseline beside fashion_pretrain.py, same size.

Paper:    arXiv 2111.06377.
Command:  python tools/train.py configs/fashion_mnist/fashion_pretrain_mae.py

Network, mask, loss and optimizer are those of mmpretrain's mae_vit-base-p16; the decoder is as
large in proportion to the encoder: two thirds of its width and depth, rounded to whole heads and
blocks. Data, batch, warmup, EMA
and epochs are those of fashion_pretrain.py.
"""
_base_ = ['./fashion_pretrain.py']

embed_dims = 128        # the encoder: width and number of blocks
num_layers = 4
lr = 1e-3               # at batch 64

model = dict(
    _delete_=True,
    type='MAE',
    backbone=dict(
        type='MAEViT',
        arch=dict(
            embed_dims=embed_dims, num_layers=num_layers, num_heads=embed_dims // 32,
            feedforward_channels=4 * embed_dims),
        img_size=28,
        patch_size=4,
        patch_cfg=dict(in_channels=1),
        mask_ratio=0.75),
    neck=dict(
        type='MAEPretrainDecoder',
        num_patches=49,
        patch_size=4,
        in_chans=1,
        embed_dim=embed_dims,
        decoder_embed_dim=96,
        decoder_depth=3,
        decoder_num_heads=3),
    head=dict(
        type='MAEPretrainHead',
        norm_pix=True,
        patch_size=4,
        in_channels=1,
        loss=dict(type='PixelReconstructionLoss', criterion='L2')),
    data_preprocessor=dict(
        type='SelfSupDataPreprocessor', mean=[127.5], std=[127.5], to_rgb=False))

optim_wrapper = dict(optimizer=dict(lr=lr))
custom_hooks = [dict(type='ModelEMAHook', run_fraction=0.05)]
