"""NEPA without the causal mask: the patch to predict is among the inputs.

Paper:    arXiv 2512.16922, Table 1a, no causal mask.
Expected: 73.6 % top-1 after fine-tuning (published). Not run here.
Cost:     that of nepa_vit-b_50k.py.
Changes:  model.backbone.causal=False
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k_no-causal.py 8

The paper does not state whether this row was fine-tuned with the mask on or off.

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k_no-causal/epoch_80.pth
"""
_base_ = ['./nepa_vit-b_50k.py']

model = dict(backbone=dict(causal=False))
