"""NEPA, ViT-g/14, ImageNet-1K, 1600 epochs: the released recipe at a larger size, sharded.

Paper:    none; the paper has no such model. The size is that of ViT-g/14 in arXiv 2106.04560.
Expected: unknown, not run here. The recipe is that of L; whether it suits this size is unknown.
Cost:     3.3 times nepa_vit-l.py's arithmetic (1573 instead of 474 GFLOP per image).
Command:  tools/dist_train.sh configs/pretrain/nepa_vit-g_fsdp.py 8

The batch is 8 GPUs x 256 x 2 accumulated steps = 4096. Weights, gradients, optimizer state and EMA
weights are sharded block by block: 2.5 GB on each of 8 GPUs instead of 20.2 GB. With recomputation,
256 images need 20 GB of activations (counted, not measured on a GPU).

To shard another config: --cfg-options runner_type=FSDPRunner model.backbone.with_cp=True.
Checkpoints have the usual format; sharded and unsharded runs can resume from them.
"""
_base_ = ['./nepa_vit-b.py']

runner_type = 'FSDPRunner'

model = dict(backbone=dict(
    arch=dict(_delete_=True, embed_dims=1408, num_layers=40, num_heads=16,
              feedforward_channels=6144),
    qk_norm='affine',   # as L
    with_cp=True))
