"""NEPA with four register tokens between class token and patches.

Paper:    none; beyond the paper.
Expected: unknown, not run here.
Cost:     that of nepa_vit-b_50k.py.
Changes:  model.backbone.num_register_tokens=4
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k_4-registers.py 8

Fine-tuning needs the registers, too: add model.backbone.num_register_tokens=4.

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k_4-registers/epoch_80.pth
"""
_base_ = ['./nepa_vit-b_50k.py']

model = dict(backbone=dict(num_register_tokens=4))
