"""NEPA's network without QK-norm: LayerScale, RoPE and the gated MLP.

Paper:    arXiv 2512.16922, Table 1b, + LayerScale + RoPE + gated MLP.
Expected: fail (published): diverges. Not run here.
Cost:     that of nepa_vit-b_100k.py.
Changes:  model.backbone.qk_norm=None
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_100k_ls-rope-gated.py 8

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_100k_ls-rope-gated.py
"""
_base_ = ['./nepa_vit-b_100k.py']

model = dict(backbone=dict(qk_norm=None))
