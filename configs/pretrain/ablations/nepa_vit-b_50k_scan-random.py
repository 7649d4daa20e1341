"""NEPA with one fixed random order of the patches.

Paper:    none; beyond the paper.
Expected: unknown, not run here.
Cost:     that of nepa_vit-b_50k.py.
Changes:  model.backbone.scan=random
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k_scan-random.py 8

nepa_vit-b_50k.py reads row by row ('raster'). Fine-tuning needs the same scan: add
model.backbone.scan=random.

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k_scan-random/epoch_80.pth
"""
_base_ = ['./nepa_vit-b_50k.py']

model = dict(backbone=dict(scan='random'))
