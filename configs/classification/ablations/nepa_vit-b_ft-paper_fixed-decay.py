"""Fine-tuning of NEPA, ViT-B/14 with SwiGLU, with a constant layer decay of 0.65.

Paper:    arXiv 2512.16922, Table 8, 0.65 fixed.
Expected: 83.0 % top-1 (published). Not run here.
Cost:     that of nepa_vit-b_ft-paper_in1k.py.
Changes:  optim_wrapper.paramwise_cfg.layer_decay_rate=0.65
          param_scheduler.final_decay_rate=None
Command:  tools/dist_train.sh configs/classification/ablations/nepa_vit-b_ft-paper_fixed-decay.py 8

The row with decay rising from 0.35 to 1 is the parent config (published: 83.8 %). All layers warm
up over 5 epochs. The released recipe, also with constant decay, has a warmup for every layer
(nepa_vit-b_ft_in1k.py).
"""
_base_ = ['../nepa_vit-b_ft-paper_in1k.py']

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.65))
param_scheduler = dict(final_decay_rate=None)
