"""Causal fine-tuning of NEPA, ViT-L/14, on ImageNet-1K: the paper's recipe with the mask on.

Paper:    arXiv 2512.16922, Table 2, row "causal fine-tune".
Expected: 84.1 % top-1 (published). Not run here.
Cost:     that of nepa_vit-l_ft-paper_in1k.py.
Command:  tools/dist_train.sh configs/classification/nepa_vit-l_ft-paper-causal_in1k.py 8

The causal mask of pretraining stays on. The head reads the last token, which attends to all tokens.
"""
_base_ = ['./nepa_vit-l_ft-paper_in1k.py']

model = dict(backbone=dict(causal=True))
