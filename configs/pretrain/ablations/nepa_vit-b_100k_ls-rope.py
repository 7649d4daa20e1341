"""ViT with LayerScale and RoPE.

Paper:    arXiv 2512.16922, Table 1b, + LayerScale + RoPE.
Expected: 80.2 % top-1 after causal fine-tuning (published). Not run here.
Cost:     that of nepa_vit-b_100k.py.
Changes:  model.backbone.qk_norm=None
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_100k_ls-rope.py 8

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_100k_ls-rope.py
"""
_base_ = ['./nepa_vit-b_100k_ls-rope-qk.py']

model = dict(backbone=dict(qk_norm=None))
