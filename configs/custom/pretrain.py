"""Pretraining on your own images: any folder, any format that Pillow reads, no labels.

Data:     data_root and all folders in it. Unreadable images are named and replaced by others.
Command:  python tools/train.py configs/custom/pretrain.py --cfg-options data_root=data/photos

Change the settings here, in a copy of this file in any folder, or by --cfg-options. Everything
below them follows. The values train on a few hundred images on a CPU. On a GPU take ViT-S:
image_size 160 or 224, patch_size 16, embed_dims 384, num_layers 12, num_heads 6, batch_size 256,
num_workers 8, and 800 epochs or more.
"""
_base_ = [
    'nepa_mm::_base_/models/nepa_vit-b.py',
    'nepa_mm::_base_/schedules/pretrain_bs4096_1600e.py',
    'nepa_mm::_base_/runtime.py',
]

data_root = 'data/photos'
image_size = 96         # pixels, of the crops; a multiple of patch_size
patch_size = 8          # pixels
channels = 3            # 1: grey, 3: colour, any other: all channels of .npy or TIFF files
mean = [127.5]          # one value, or one per channel
std = [127.5]
flip = 0.5              # probability of mirroring; 0 for text, digits and maps
embed_dims = 128        # the network
num_layers = 6
num_heads = 4
epochs = 60
batch_size = 32         # of one GPU or the CPU
base_lr = 4e-3          # for a batch of 256
num_workers = 2         # processes that read images

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=embed_dims, num_layers=num_layers, num_heads=num_heads,
            feedforward_channels=4 * embed_dims),
        patch_size=patch_size,
        in_channels=channels,
        layer_scale_init_value=0.1),    # 1e-5 suits runs of 100,000 updates
    data_preprocessor=dict(mean=mean, std=std, to_rgb=channels == 3))

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageFolder',
        data_root=data_root,
        with_label=False,
        pipeline=[
            dict(
                type='LoadRandomResizedCrop',       # any number of channels
                scale=image_size,
                color_type={1: 'grayscale', 3: 'color'}.get(channels, 'unchanged'),
                crop_ratio_range=(0.2, 1.0)),
            dict(type='RandomFlip', prob=flip),
            dict(type='PackInputs'),
        ]))

optim_wrapper = dict(
    optimizer=dict(lr=base_lr * batch_size / 256), accumulative_counts=1)
param_scheduler = dict(warmup=0, warmup_ratio=0.05, end=epochs)
train_cfg = dict(max_epochs=epochs)
auto_scale_lr = dict(base_batch_size=batch_size)

custom_hooks = [
    dict(type='ModelEMAHook', run_fraction=0.05),   # the momentum follows the number of updates
    dict(type='NEPAMonitorHook', interval=None),
]
default_hooks = dict(
    checkpoint=dict(interval=max(epochs // 5, 1)),
    unreadable=dict(replace_labelled=True, max_share=0.05))
