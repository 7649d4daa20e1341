"""Linear probe of NEPA, ViT-B/14, on ImageNet-1K, 90 epochs: a classifier on frozen features.

Paper:    arXiv 2512.16922, Table 6.
Expected: 14.1 % top-1 from the mean of the patches, 11.3 % from the last token (published, with
          unknown optimiser, epochs and attention). Not run here.
Cost:     90 epochs of forward passes.
Command:  tools/dist_train.sh configs/classification/nepa_vit-b_linear_in1k.py 8

Reads the mean of the patches after the last block and the final norm, with the causal mask of
pretraining. Another feature:
  --cfg-options model.backbone.out_type=last_token        the last patch
  --cfg-options model.backbone.out_indices=7              another block, from 0
The last block's output is trained to resemble the next embedding and is shallow by construction.
Figures near 84 % quoted for NEPA come from fine-tuned weights.

The paper does not state the protocol; this one is MAE's, from mmpretrain: LARS, batch 16384 =
8 GPUs x 2048, lr 6.4, no weight decay, BatchNorm without parameters before the classifier.
"""
_base_ = ['./nepa_vit-b_ft_in1k.py']

model = dict(
    backbone=dict(
        causal=True,
        qk_norm='plain',
        drop_path_rate=0.,
        fc_norm=False,
        frozen_stages=12),
    neck=dict(type='ClsBatchNormNeck', input_features=768),
    head=dict(
        loss=dict(_delete_=True, type='CrossEntropyLoss'),
        init_cfg=dict(_delete_=True, type='TruncNormal', layer='Linear', std=0.01)),
    data_preprocessor=dict(batch_augments=None))

train_pipeline = [step for step in _base_.train_pipeline if step['type'] != 'TimmRandAugment']
train_dataloader = dict(batch_size=2048, dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(
    _delete_=True,
    type='BF16OptimWrapper',
    optimizer=dict(type='LARS', lr=6.4, momentum=0.9, weight_decay=0.))
param_scheduler = dict(
    _delete_=True,
    type='LayerDecayCosineLR',
    warmup=10,
    end=90,
    by_epoch=True,
    convert_to_iter_based=True)
train_cfg = dict(max_epochs=90)
auto_scale_lr = dict(base_batch_size=16384)
custom_hooks = []
