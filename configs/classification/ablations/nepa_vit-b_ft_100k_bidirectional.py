"""Bidirectional fine-tuning of the ablations' full network, 100k steps.

Paper:    arXiv 2512.16922, Table 1e, bidirectional.
Expected: 82.5 % top-1 (published). Not run here.
Cost:     that of nepa_vit-b_ft-paper_in1k.py.
Changes:  model.backbone.causal=False
Command:  tools/dist_train.sh configs/classification/ablations/nepa_vit-b_ft_100k_bidirectional.py 8
"""
_base_ = ['./nepa_vit-b_ft_100k.py']

model = dict(backbone=dict(causal=False))
