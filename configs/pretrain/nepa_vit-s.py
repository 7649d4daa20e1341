"""NEPA, ViT-S/14, ImageNet-1K, 1600 epochs: the released recipe at a smaller size.

Paper:    none; the paper has no such model.
Expected: unknown, not run here.
Cost:     a quarter of nepa_vit-b.py's arithmetic (22 M instead of 86 M parameters).
Command:  tools/dist_train.sh configs/pretrain/nepa_vit-s.py 8

The batch is 8 GPUs x 512 = 4096.
"""
_base_ = ['./nepa_vit-b.py']

model = dict(backbone=dict(arch='small'))
train_dataloader = dict(batch_size=512)
optim_wrapper = dict(accumulative_counts=1)
