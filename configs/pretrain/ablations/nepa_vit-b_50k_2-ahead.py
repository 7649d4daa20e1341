"""NEPA predicting the patch after the next one.

Paper:    none; beyond the paper.
Expected: unknown, not run here.
Cost:     that of nepa_vit-b_50k.py.
Changes:  model.head.shift=2
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k_2-ahead.py 8

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k_2-ahead/epoch_80.pth
"""
_base_ = ['./nepa_vit-b_50k.py']

model = dict(head=dict(shift=2))
