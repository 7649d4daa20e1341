"""NEPA, ViT-B/14 with SwiGLU, 50k steps at batch 2048: what the core ablations change.

Paper:    arXiv 2512.16922, Table 1a, full method.
Expected: 76.8 % top-1 after causal fine-tuning (published). Not run here.
Cost:     half of nepa_vit-b_100k.py.
Changes:  param_scheduler.warmup=2
          param_scheduler.end=80
          train_cfg.max_epochs=80
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k.py 8

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py

80 epochs are 50,080 steps. The paper does not state the network of Table 1a; this is its main one.
"""
_base_ = ['./nepa_vit-b_100k.py']

param_scheduler = dict(warmup=2, end=80)
train_cfg = dict(max_epochs=80)
