"""Causal fine-tuning of nepa_vit-b_100k_ls-rope.

Paper:    arXiv 2512.16922, Table 1b, + LayerScale + RoPE.
Expected: 80.2 % top-1 (published). Not run here.
Cost:     that of nepa_vit-b_ft-paper_in1k.py.
Changes:  model.backbone.qk_norm=None
          model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_100k_ls-rope/epoch_160.pth
Command:  tools/dist_train.sh configs/classification/ablations/nepa_vit-b_ft_100k_ls-rope.py 8
"""
_base_ = ['./nepa_vit-b_ft_100k_ls-rope-qk.py']

model = dict(
    backbone=dict(
        qk_norm=None,
        init_cfg=dict(checkpoint='work_dirs/nepa_vit-b_100k_ls-rope/epoch_160.pth')))
