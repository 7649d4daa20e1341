"""NEPA with InfoNCE instead of the cosine: the image's other patches are the negatives.

Paper:    arXiv 2610.02203.
Expected: 81.7 % top-1 (published) at B scale, cosine 83.1 % (published). Not run here.
Cost:     that of nepa_vit-b_50k.py.
Changes:  model.head.loss=infonce
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k_infonce.py 8

The figures are those of NEPA-DiT, which differs from NEPA in more than the loss. The temperature of
0.1 is our choice.

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k_infonce/epoch_80.pth
"""
_base_ = ['./nepa_vit-b_50k.py']

model = dict(head=dict(loss='infonce'))
