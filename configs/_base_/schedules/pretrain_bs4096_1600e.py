"""AdamW at batch 4096 for 1600 epochs: 40 epochs of warmup from 0, then a cosine to 0."""
# lr = 3e-4 x batch / 256. The batch is 8 GPUs x 256 images x 2 accumulated steps.
base_lr, batch = 3e-4, 4096

optim_wrapper = dict(
    type='BF16OptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',   # no weight decay of 1-D parameters
    optimizer=dict(
        type='AdamW', lr=base_lr * batch / 256, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05,
        fused=True),
    accumulative_counts=2,
    clip_grad=dict(max_norm=1.0))

param_scheduler = dict(
    type='LayerDecayCosineLR',
    warmup=40,
    end=1600,
    by_epoch=True,
    convert_to_iter_based=True)

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1600)

# other batch sizes: tools/train.py --auto-scale-lr
auto_scale_lr = dict(base_batch_size=batch)
