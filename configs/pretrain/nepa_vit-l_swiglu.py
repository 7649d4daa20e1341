"""NEPA, ViT-L/14 with SwiGLU, ImageNet-1K, 800 epochs: the paper's model.

Paper:    arXiv 2512.16922, Tables 2 and 4.
Expected: 85.3 % top-1 after bidirectional, 84.1 % after causal fine-tuning (published). Not run
          here.
Cost:     about 5 days on 8 H100 (published, for the reference code).
Command:  tools/dist_train.sh configs/pretrain/nepa_vit-l_swiglu.py 8

QK-norm has no parameters, as in the paper. The paper does not state the width of the gated MLP; see
nepa_vit-b_swiglu.py. The warmup is 40 epochs (Table 4).
"""
_base_ = ['./nepa_vit-l.py']

model = dict(backbone=dict(qk_norm='plain', gated_mlp=True, act_cfg=dict(type='SiLU')))
param_scheduler = dict(end=800)
train_cfg = dict(max_epochs=800)
