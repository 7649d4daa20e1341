"""Causal fine-tuning of nepa_vit-b_100k_ls.

Paper:    arXiv 2512.16922, Table 1b, + LayerScale; Table 1d, patch embedding frozen.
Expected: 77.4 % top-1 (published). Not run here.
Cost:     that of nepa_vit-b_ft-paper_in1k.py.
Changes:  model.backbone.rope_theta=None
          model.backbone.use_abs_pos_emb=True
          model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_100k_ls/epoch_160.pth
Command:  tools/dist_train.sh configs/classification/ablations/nepa_vit-b_ft_100k_ls.py 8
"""
_base_ = ['./nepa_vit-b_ft_100k_ls-rope.py']

model = dict(
    backbone=dict(
        rope_theta=None,
        use_abs_pos_emb=True,
        init_cfg=dict(checkpoint='work_dirs/nepa_vit-b_100k_ls/epoch_160.pth')))
