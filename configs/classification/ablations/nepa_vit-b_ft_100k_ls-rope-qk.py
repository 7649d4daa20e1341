"""Causal fine-tuning of nepa_vit-b_100k_ls-rope-qk.

Paper:    arXiv 2512.16922, Table 1b, + LayerScale + RoPE + QK-norm.
Expected: 81.1 % top-1 (published). Not run here.
Cost:     that of nepa_vit-b_ft-paper_in1k.py.
Changes:  model.backbone.gated_mlp=False
          model.backbone.act_cfg.type=GELU
          model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_100k_ls-rope-qk/epoch_160.pth
Command:  tools/dist_train.sh configs/classification/ablations/nepa_vit-b_ft_100k_ls-rope-qk.py 8
"""
_base_ = ['./nepa_vit-b_ft_100k.py']

model = dict(
    backbone=dict(
        gated_mlp=False,
        act_cfg=dict(type='GELU'),
        init_cfg=dict(checkpoint='work_dirs/nepa_vit-b_100k_ls-rope-qk/epoch_160.pth')))
