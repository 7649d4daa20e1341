"""NEPA with the mean squared error instead of the cosine.

Paper:    arXiv 2610.02203.
Expected: 82.6 % top-1 (published) at B scale, cosine 83.1 % (published). Not run here.
Cost:     that of nepa_vit-b_50k.py.
Changes:  model.head.loss=mse
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k_mse.py 8

The figures are those of NEPA-DiT, which differs from NEPA in more than the loss. Neither prediction
nor target is normalised here.

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k_mse/epoch_80.pth
"""
_base_ = ['./nepa_vit-b_50k.py']

model = dict(head=dict(loss='mse'))
