"""Released fine-tuning: AdamW at batch 1024, constant layer decay, a warmup for every layer."""
# lr = 1.5e-3 x batch / 256. The batch is 8 GPUs x 128 images.
base_lr, batch = 1.5e-3, 1024

optim_wrapper = dict(
    type='BF16OptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(
        type='AdamW', lr=base_lr * batch / 256, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05,
        fused=True),
    paramwise_cfg=dict(layer_decay_rate=0.65, head_lr=1e-3),    # head_lr is not scaled
    clip_grad=dict(max_norm=1.0))

param_scheduler = dict(
    type='LayerDecayCosineLR',
    warmup_ratio=0.2,
    per_layer_warmup=True,
    end=100,
    by_epoch=True,
    convert_to_iter_based=True)

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100, val_interval=1)
val_cfg = test_cfg = dict()

# other batch sizes: tools/train.py --auto-scale-lr
auto_scale_lr = dict(base_batch_size=batch)
