"""Linear probe on Fashion-MNIST: a classifier on frozen features of one block.

Command:  python tools/train.py configs/fashion_mnist/fashion_linear.py --cfg-options block=1

Reads the mean of the patches behind the causal mask of pretraining. The last block's output is
trained to resemble the next patch's embedding and is shallow by construction (paper, Table 6).
"""
_base_ = ['./fashion_finetune.py']

block = 1               # whose output is read, from 0

model = dict(backbone=dict(
    causal=True, drop_path_rate=0., fc_norm=False, frozen_stages=4, out_indices=block),
    neck=dict(type='ClsBatchNormNeck', input_features=128))
optim_wrapper = dict(
    optimizer=dict(lr=1e-2, weight_decay=0.),
    paramwise_cfg=dict(layer_decay_rate=1., head_lr=1e-2))
