"""Causal fine-tuning of nepa_vit-b_100k_ls with a trained patch embedding.

Paper:    arXiv 2512.16922, Table 1d, patch embedding trainable.
Expected: 73.1 % top-1 (published). Not run here.
Cost:     that of nepa_vit-b_ft-paper_in1k.py.
Changes:  model.backbone.frozen_stages=-1
Command:  tools/dist_train.sh configs/classification/ablations/nepa_vit-b_ft_100k_ls_trainable.py 8
"""
_base_ = ['./nepa_vit-b_ft_100k_ls.py']

model = dict(backbone=dict(frozen_stages=-1))
