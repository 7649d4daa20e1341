"""UPerNet on NEPA, ViT-L/14, on ADE20K, 160k iterations.

Paper:    arXiv 2512.16922, Table 3.
Expected: 54.0 mIoU (published; whether single- or multi-scale is not stated). Not run here.
Cost:     160k iterations at batch 16, 1370 tokens per crop.
Command:  tools/dist_train.sh configs/segmentation/nepa_vit-l_upernet_160k_ade20k-512x512.py 8
Starts from work_dirs/nepa_vit-l/epoch_1600.pth; see nepa_vit-b_upernet_160k_ade20k-512x512.py for
another checkpoint.

Differences from that config, not stated in the paper and taken from mmseg's BEiT-L (configs/beit):
lr 2e-5, layer decay 0.95, drop path 0.2, blocks 7, 11, 15 and 23, and 1024 channels in the decoder.
BEiT-L's 640 pixels and 3000 iterations of warmup are not used.
"""
_base_ = ['./nepa_vit-b_upernet_160k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.2,
        out_indices=[7, 11, 15, 23],
        init_cfg=dict(checkpoint='work_dirs/nepa_vit-l/epoch_1600.pth')),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024] * 4, channels=1024),
    auxiliary_head=dict(in_channels=1024))

optim_wrapper = dict(optimizer=dict(lr=2e-5), paramwise_cfg=dict(layer_decay_rate=0.95))
