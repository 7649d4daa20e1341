"""ViT with LayerScale; an absolute position embedding in place of RoPE.

Paper:    arXiv 2512.16922, Table 1b, + LayerScale.
Expected: 77.4 % top-1 after causal fine-tuning (published). Not run here.
Cost:     that of nepa_vit-b_100k.py.
Changes:  model.backbone.rope_theta=None
          model.backbone.use_abs_pos_emb=True
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_100k_ls.py 8

The position embedding is learnable (paper), and added to the input of the first block, not to the
targets.

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_100k_ls.py
"""
_base_ = ['./nepa_vit-b_100k_ls-rope.py']

model = dict(backbone=dict(rope_theta=None, use_abs_pos_emb=True))
