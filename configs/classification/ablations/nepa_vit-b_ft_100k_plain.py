"""Causal fine-tuning of nepa_vit-b_100k_plain.

Paper:    arXiv 2512.16922, Table 1b, plain ViT; Table 1c, masking 0 %.
Expected: 78.2 % top-1 (published). Not run here.
Cost:     that of nepa_vit-b_ft-paper_in1k.py.
Changes:  model.backbone.layer_scale_init_value=None
          model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_100k_plain/epoch_160.pth
Command:  tools/dist_train.sh configs/classification/ablations/nepa_vit-b_ft_100k_plain.py 8

The paper does not state whether this row froze the patch embedding; here it is frozen, as in all
other rows.
"""
_base_ = ['./nepa_vit-b_ft_100k_ls.py']

model = dict(
    backbone=dict(
        layer_scale_init_value=None,
        init_cfg=dict(checkpoint='work_dirs/nepa_vit-b_100k_plain/epoch_160.pth')))
