"""Fine-tuning of MAE on Fashion-MNIST: the recipe of fashion_finetune.py for mmpretrain's ViT.

Command:  python tools/train.py configs/fashion_mnist/fashion_finetune_mae.py
From scratch, with the same recipe:  pretrained=None

As in mmpretrain's recipe for MAE the network reads the mean of the patches, and nothing is frozen.
"""
_base_ = ['./fashion_finetune.py']

pretrained = 'work_dirs/fashion_pretrain_mae/epoch_4.pth'

model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionTransformer',
        arch=dict(embed_dims=128, num_layers=4, num_heads=4, feedforward_channels=512),
        img_size=28,
        patch_size=4,
        in_channels=1,
        drop_path_rate=0.1,
        out_type='avg_featmap',
        final_norm=False,
        init_cfg=pretrained and dict(
            type='Pretrained', checkpoint=pretrained, prefix='backbone.')))
