"""Causal fine-tuning of NEPA, ViT-B/14, on ImageNet-1K: the released recipe with the mask on.

Paper:    arXiv 2512.16922, Table 2, row "causal fine-tune".
Expected: unknown, not run here.
Cost:     that of nepa_vit-b_ft_in1k.py.
Command:  tools/dist_train.sh configs/classification/nepa_vit-b_ft-causal_in1k.py 8

The row's 82.5 % are from the paper's recipe (nepa_vit-b_ft-paper-causal_in1k.py). No figure is
published for the released recipe with a causal mask.
"""
_base_ = ['./nepa_vit-b_ft_in1k.py']

model = dict(backbone=dict(causal=True))
