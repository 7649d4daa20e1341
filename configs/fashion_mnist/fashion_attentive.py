"""Attentive probe on Fashion-MNIST: attention pooling on frozen tokens of one block.

Command:  python tools/train.py configs/fashion_mnist/fashion_attentive.py --cfg-options block=3
"""
_base_ = ['./fashion_linear.py']

block = 3               # whose output is read, from 0

model = dict(
    backbone=dict(out_type='raw', out_indices=block),
    neck=None,
    head=dict(type='AttentiveClsHead', num_heads=4, init_cfg=None))
optim_wrapper = dict(
    optimizer=dict(lr=3e-3), paramwise_cfg=dict(head_lr=3e-3))
