"""Attentive probe of NEPA, ViT-B/14, on ImageNet-1K, 90 epochs: attention pooling on frozen tokens.

Paper:    none; the paper has no attentive probe.
Expected: unknown, not run here.
Cost:     90 epochs of forward passes.
Command:  tools/dist_train.sh configs/classification/nepa_vit-b_attentive_in1k.py 8

A learned query attends to all 257 tokens after the last block and the final norm. For another block
use --cfg-options model.backbone.out_indices=7. The protocol is ours: AdamW, lr 1e-3 at batch 1024.
"""
_base_ = ['./nepa_vit-b_linear_in1k.py']

model = dict(
    backbone=dict(out_type='raw'),
    neck=None,
    head=dict(type='AttentiveClsHead', num_heads=12, init_cfg=None))

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(
    _delete_=True,
    type='BF16OptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(
        type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1.0))
auto_scale_lr = dict(base_batch_size=1024)
