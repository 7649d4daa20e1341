"""NEPA without the shift: every output is compared with the patch just read.

Paper:    arXiv 2512.16922, Table 1a, no shift.
Expected: fail (published): the identity is learned, and fine-tuning diverges. Not run here.
Cost:     that of nepa_vit-b_50k.py.
Changes:  model.head.shift=0
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k_no-shift.py 8

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k_no-shift/epoch_80.pth
"""
_base_ = ['./nepa_vit-b_50k.py']

model = dict(head=dict(shift=0))
