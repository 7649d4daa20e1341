"""Fine-tuning on Fashion-MNIST with few labels or all, from the checkpoint of fashion_pretrain.py.

Command:  python tools/train.py configs/fashion_mnist/fashion_finetune.py \
              --cfg-options num_labels=1000 epochs=20
From scratch, with the same recipe:  pretrained=None

The released recipe of ImageNet for 28 pixels: attention is bidirectional (causal=True keeps the
mask), the patch embedding is frozen, lower blocks learn more slowly, a new LayerNorm and a
zero-initialised classifier read the mean of the patches. Crops and flips are the only augmentation.
num_labels=None is all 60,000.
"""
_base_ = [
    '../_base_/schedules/finetune_bs1024_100e.py',
    '../_base_/runtime.py',
]

data_root = 'data/fashion_mnist'
pretrained = 'work_dirs/fashion_pretrain/epoch_4.pth'
num_labels = 1000
label_seed = 0          # selects the labelled images
causal = False
embed_dims = 128
num_layers = 4
epochs = 20
batch_size = 16
lr = 3e-3               # of the last block
layer_decay_rate = 0.75

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='NEPAViT',
        arch=dict(embed_dims=embed_dims, num_layers=num_layers, num_heads=embed_dims // 32,
                  feedforward_channels=4 * embed_dims),
        img_size=28,            # of learned positions, which ablations have
        patch_size=4,
        in_channels=1,
        causal=causal,
        qk_norm='affine',       # initialised to one: no effect on the checkpoint
        layer_scale_init_value=0.1,
        drop_path_rate=0.1,
        out_type='avg_featmap',
        fc_norm=True,
        frozen_stages=0 if pretrained else -1,
        init_cfg=pretrained and dict(
            type='Pretrained', checkpoint=pretrained, prefix='backbone.')),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=embed_dims,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='Constant', layer='Linear', val=0)),
    data_preprocessor=dict(mean=[127.5], std=[127.5], to_rgb=False))

dataset = dict(type='FashionMNISTSubset', data_root=data_root)
loader = dict(persistent_workers=True, collate_fn=dict(type='default_collate'))
train_dataloader = dict(
    **loader,
    batch_size=batch_size,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        **dataset,
        split='train',
        num_labels=num_labels,
        seed=label_seed,
        pipeline=[
            dict(
                type='RandomResizedCrop',
                scale=28,
                crop_ratio_range=(0.5, 1.0),
                interpolation='bilinear',
                backend='pillow'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackInputs'),
        ]))
val_dataloader = dict(
    **loader,
    batch_size=500,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, split='test', pipeline=[dict(type='PackInputs')]))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))

optim_wrapper = dict(
    optimizer=dict(lr=lr),
    paramwise_cfg=dict(layer_decay_rate=layer_decay_rate, head_lr=lr))
param_scheduler = dict(warmup_ratio=0.1, per_layer_warmup=False, end=epochs)
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
auto_scale_lr = dict(base_batch_size=batch_size)

custom_hooks = [dict(type='ModelEMAHook', run_fraction=0.05)]
default_hooks = dict(checkpoint=dict(interval=epochs, max_keep_ckpts=1))
