"""NEPA's network without the gated MLP: LayerScale, RoPE and QK-norm.

Paper:    arXiv 2512.16922, Table 1b, + LayerScale + RoPE + QK-norm.
Expected: 81.1 % top-1 after causal fine-tuning (published). Not run here.
Cost:     that of nepa_vit-b_100k.py.
Changes:  model.backbone.gated_mlp=False
          model.backbone.act_cfg.type=GELU
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_100k_ls-rope-qk.py 8

The network of the released weights.

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_100k_ls-rope-qk.py
"""
_base_ = ['./nepa_vit-b_100k.py']

model = dict(backbone=dict(gated_mlp=False, act_cfg=dict(type='GELU')))
