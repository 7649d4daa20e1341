"""Plain ViT with an absolute position embedding: no LayerScale, RoPE, QK-norm or gated MLP.

Paper:    arXiv 2512.16922, Table 1b, plain ViT; Table 1c, masking 0 %.
Expected: 78.2 % top-1 after causal fine-tuning (published). Not run here.
Cost:     that of nepa_vit-b_100k.py.
Changes:  model.backbone.layer_scale_init_value=None
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_100k_plain.py 8

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_100k_plain.py
"""
_base_ = ['./nepa_vit-b_100k_ls.py']

model = dict(backbone=dict(layer_scale_init_value=None))
