"""Linear probe on a few labelled digits: a classifier on frozen features.

Command:  python tools/train.py configs/demo/digits_linear.py

Reads the mean of the patches after the first block. The last block's output is trained to resemble
the next patch's embedding and is shallow by construction (paper, Table 6). On the digits, too, it
is the worst of the four blocks.
"""
_base_ = ['./digits_finetune.py']

model = dict(backbone=dict(frozen_stages=4, out_indices=0))
optim_wrapper = dict(
    optimizer=dict(lr=1e-2, weight_decay=0.), paramwise_cfg=dict(layer_decay_rate=1.0))
