"""Linear probe on your own classes: a classifier on frozen features, and the images of k-NN.

Data:     data_root/<class>/*, of which a part is kept for validation, or
          data_root/{train,val}/<class>/*.
Command:  python tools/train.py configs/custom/linear.py \
              --cfg-options data_root=data/classes num_classes=3

Settings from image_size to num_heads are those of pretraining. Attention is causal, as there. Try
several blocks: the last one predicts the next embedding and is shallow.
"""
_base_ = [
    'nepa_mm::_base_/schedules/finetune_bs1024_100e.py',
    'nepa_mm::_base_/runtime.py',
]

data_root = 'data/classes'
num_classes = 3
val_fraction = 0.2      # of every class, chosen by file name, if data_root has no folder val
pretrained = 'work_dirs/pretrain/epoch_60.pth'
block = 3               # whose output is read, from 0
image_size = 96         # pixels, of the crops; a multiple of patch_size
patch_size = 8          # pixels
channels = 3            # 1: grey, 3: colour, any other: all channels of .npy or TIFF files
mean = [127.5]          # one value, or one per channel
std = [127.5]
flip = 0.5              # probability of mirroring; 0 for text, digits and maps
embed_dims = 128        # the network
num_layers = 6
num_heads = 4
epochs = 50
batch_size = 32         # of one GPU or the CPU
base_lr = 8e-2          # for a batch of 256
num_workers = 2         # processes that read images

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='NEPAViT',
        arch=dict(embed_dims=embed_dims, num_layers=num_layers, num_heads=num_heads,
                  feedforward_channels=4 * embed_dims),
        patch_size=patch_size,
        in_channels=channels,
        layer_scale_init_value=0.1,
        out_type='avg_featmap',
        out_indices=block,
        frozen_stages=num_layers,
        init_cfg=pretrained and dict(
            type='Pretrained', checkpoint=pretrained, prefix='backbone.')),
    neck=dict(type='ClsBatchNormNeck', input_features=embed_dims),
    head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=embed_dims),
    data_preprocessor=dict(
        type='NEPAClsDataPreprocessor', mean=mean, std=std, to_rgb=channels == 3))

color_type = {1: 'grayscale', 3: 'color'}.get(channels, 'unchanged')
resize = dict(interpolation='bicubic', backend='pillow' if channels in (1, 3) else 'cv2')
train_pipeline = [
    dict(type='LoadImageWithPillow', color_type=color_type),
    dict(type='RandomResizedCrop', scale=image_size, crop_ratio_range=(0.2, 1.0), **resize),
    dict(type='RandomFlip', prob=flip),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageWithPillow', color_type=color_type),
    dict(type='ResizeEdge', scale=image_size * 8 // 7, edge='short', **resize),
    dict(type='CenterCrop', crop_size=image_size),
    dict(type='PackInputs'),
]
dataset = dict(type='ImageFolder', data_root=data_root, val_fraction=val_fraction)
loader = dict(batch_size=batch_size, num_workers=num_workers, persistent_workers=True,
              collate_fn=dict(type='default_collate'))
train_dataloader = dict(
    **loader,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(**dataset, split='train', pipeline=train_pipeline))
val_dataloader = dict(
    **loader,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, split='val', pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))

optim_wrapper = dict(
    optimizer=dict(lr=base_lr * batch_size / 256, weight_decay=0.),
    paramwise_cfg=dict(layer_decay_rate=1., head_lr=base_lr * batch_size / 256))
param_scheduler = dict(warmup_ratio=0.1, per_layer_warmup=False, end=epochs)
train_cfg = dict(max_epochs=epochs, val_interval=max(epochs // 10, 1))
auto_scale_lr = dict(base_batch_size=batch_size)

custom_hooks = []
default_hooks = dict(
    checkpoint=dict(interval=max(epochs // 5, 1)),
    unreadable=dict(replace_labelled=True, max_share=0.05))
