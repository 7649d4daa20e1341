"""Segmentation of your own images with UPerNet, from the checkpoint of pretrain.py.

Data:     data_root/images/* and data_root/masks/* with the same names; masks are PNGs of one
          class index per pixel, 255 is ignored. A part is kept for validation, chosen by file
          name, unless both folders hold train and val.
Command:  python tools/train.py configs/custom/upernet.py \
              --cfg-options data_root=data/scenes classes=background,cat,dog
From scratch, with the same recipe:  pretrained=None

Settings from patch_size to num_heads are those of pretraining. image_size may differ.
"""
_base_ = [
    # registers `mmseg::` in mmengine, also with OpenMMLab's own tools
    __import__('nepa_mm') and 'mmseg::_base_/models/upernet_mae.py',
    'nepa_mm::_base_/runtime.py',
]

data_root = 'data/scenes'
classes = ['background', 'animals', 'food', 'vehicles']     # of the values 0, 1, 2 ...
val_fraction = 0.2      # of the images, if they have no folder val
pretrained = 'work_dirs/pretrain/epoch_60.pth'
image_size = 128        # pixels: short side of the images, and side of the crops
patch_size = 8          # pixels
channels = 3            # 1: grey, 3: colour, any other: all channels of .npy or TIFF files
mean = [127.5]          # one value, or one per channel
std = [127.5]
flip = 0.5              # probability of mirroring; 0 for text, digits and maps
embed_dims = 128        # the network
num_layers = 6          # at least 4
num_heads = 4
epochs = 30
batch_size = 8          # of one GPU or the CPU
lr = 2e-3
decoder_channels = 64   # 512 on a GPU
num_workers = 2         # processes that read images

default_scope = 'mmseg'
custom_imports = dict(
    imports=['nepa_mm', 'nepa_mm.models.segmentors', 'nepa_mm.datasets.mask_folders'],
    allow_failed_imports=False)
head = dict(num_classes=len(classes), channels=decoder_channels, dropout_ratio=0.1)
model = dict(
    type='NEPASegmentor',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=mean, std=std, bgr_to_rgb=channels == 3, pad_val=0,
        seg_pad_val=255, size=(image_size, image_size)),
    backbone=dict(
        _delete_=True,
        type='NEPAViT',
        arch=dict(embed_dims=embed_dims, num_layers=num_layers, num_heads=num_heads,
                  feedforward_channels=4 * embed_dims),
        patch_size=patch_size,
        in_channels=channels,
        causal=False,
        qk_norm='affine',
        layer_scale_init_value=0.1,
        drop_path_rate=0.1,
        out_type='featmap',
        out_indices=[(quarter + 1) * num_layers // 4 - 1 for quarter in range(4)],
        init_cfg=pretrained and dict(
            type='Pretrained', checkpoint=pretrained, prefix='backbone.')),
    neck=dict(embed_dim=embed_dims, norm_cfg=dict(type='SyncBN'),
              # maps of about 4, 8, 16 and 32 pixels
              rescales=[4, 2, 1, 0.5] if patch_size > 11 else [2, 1, 0.5, 0.25]),
    decode_head=dict(in_channels=[embed_dims] * 4, **head),
    auxiliary_head=dict(in_channels=embed_dims, **head),
    test_cfg=dict(mode='whole'))

# mmseg's inference needs the names LoadImageFromFile, which resolves to LoadImageWithPillow, and
# test_pipeline
load_image = dict(type='LoadImageFromFile', _scope_='nepa_mm',
                  color_type={1: 'grayscale', 3: 'color'}.get(channels, 'unchanged'))
train_pipeline = [
    load_image,
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(4 * image_size, image_size), ratio_range=(1.0, 2.0),
         keep_ratio=True),
    dict(type='RandomCrop', crop_size=(image_size, image_size), cat_max_ratio=0.9),
    dict(type='RandomFlip', prob=flip),
    *([dict(type='PhotoMetricDistortion')] if channels == 3 else []),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    load_image,
    dict(type='Resize', scale=(4 * image_size, image_size), keep_ratio=True),
    dict(type='LoadAnnotations'),       # keeps the size of the file
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='ImageMaskFolder', data_root=data_root, metainfo=dict(classes=classes),
    data_prefix=dict(img_path='images', seg_map_path='masks'), val_fraction=val_fraction)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(**dataset, split='train', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,       # images differ in size
    num_workers=num_workers,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, split='val', pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])

optim_wrapper = dict(
    type='BF16OptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    paramwise_cfg=dict(layer_decay_rate=0.85))
param_scheduler = dict(
    type='LayerDecayCosineLR', warmup_ratio=0.05, end=epochs, by_epoch=True,
    convert_to_iter_based=True)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=max(epochs // 5, 1))
val_cfg = test_cfg = dict()
auto_scale_lr = dict(base_batch_size=batch_size)

visualizer = dict(
    _delete_=True, type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
custom_hooks = [dict(type='ModelEMAHook', run_fraction=0.05)]
default_hooks = dict(
    checkpoint=dict(interval=max(epochs // 5, 1)),
    visualization=dict(_delete_=True, type='SegVisualizationHook'))
