"""Causal fine-tuning of nepa_vit-b_100k_ls-rope-gated.

Paper:    arXiv 2512.16922, Table 1b, + LayerScale + RoPE + gated MLP.
Expected: fail (published): diverges. Not run here.
Cost:     that of nepa_vit-b_ft-paper_in1k.py.
Changes:  model.backbone.qk_norm=None
          model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_100k_ls-rope-gated/epoch_160.pth
Command:  tools/dist_train.sh configs/classification/ablations/nepa_vit-b_ft_100k_ls-rope-gated.py 8
"""
_base_ = ['./nepa_vit-b_ft_100k.py']

model = dict(
    backbone=dict(
        qk_norm=None,
        init_cfg=dict(checkpoint='work_dirs/nepa_vit-b_100k_ls-rope-gated/epoch_160.pth')))
