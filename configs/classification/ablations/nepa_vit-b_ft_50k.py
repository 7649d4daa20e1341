"""Causal fine-tuning of the ablations' full method, 50k steps.

Paper:    arXiv 2512.16922, Table 1a, full method.
Expected: 76.8 % top-1 (published). Not run here.
Cost:     that of nepa_vit-b_ft-paper_in1k.py.
Changes:  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k/epoch_80.pth
Command:  tools/dist_train.sh configs/classification/ablations/nepa_vit-b_ft_50k.py 8

The other rows of Table 1a have the same network: fine-tune them with this config and their own
checkpoint.
"""
_base_ = ['./nepa_vit-b_ft_100k.py']

model = dict(backbone=dict(init_cfg=dict(checkpoint='work_dirs/nepa_vit-b_50k/epoch_80.pth')))
