"""NEPA without the class token in the loss: patches are predicted from patches only.

Paper:    none; beyond the paper.
Expected: unknown, not run here.
Cost:     that of nepa_vit-b_50k.py.
Changes:  model.head.with_cls_token=False
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k_cls-out-of-loss.py 8

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k_cls-out-of-loss/epoch_80.pth
"""
_base_ = ['./nepa_vit-b_50k.py']

model = dict(head=dict(with_cls_token=False))
