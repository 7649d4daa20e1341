"""UPerNet on scenes of clothes, from the checkpoint of fashion_pretrain.py.

Data:     python demo/make_garment_scenes.py --val 200
Command:  python tools/train.py configs/fashion_mnist/fashion_upernet.py --cfg-options num_scenes=30
From scratch, with the same recipe:  pretrained=None

ADE20K's recipe with the small network on scenes of 56 pixels: attention is bidirectional, the patch
embedding is frozen (trained from scratch), layer decay is 0.65. The decoder is narrow (48 channels
on a network of 128), and the pyramid starts at twice the resolution of the patches. Scenes are
mirrored at random. Seeds differ widely at this learning rate: run several.
"""
_base_ = ['../demo/digits_upernet.py']

data_root = 'data/garment_scenes'
pretrained = 'work_dirs/fashion_pretrain/epoch_4.pth'
num_scenes = 100        # the first ones
causal = False
embed_dims = 128
num_layers = 4
blocks = [0, 1, 2, 3]   # whose outputs are read, from 0
iters = 200
lr = 4e-3               # of the last block
layer_decay_rate = 0.65

scene = (56, 56)
model = dict(
    backbone=dict(
        arch=dict(embed_dims=embed_dims, num_layers=num_layers, num_heads=embed_dims // 32,
                  feedforward_channels=4 * embed_dims),
        in_channels=1,
        causal=causal,
        qk_norm='affine',       # initialised to one: no effect on the checkpoint
        drop_path_rate=0.1,
        out_indices=blocks,
        frozen_stages=0 if pretrained else -1,
        init_cfg=pretrained and dict(
            _delete_=True, type='Pretrained', checkpoint=pretrained, prefix='backbone.')),
    neck=dict(embed_dim=embed_dims),
    decode_head=dict(in_channels=[embed_dims] * 4, channels=48, dropout_ratio=0.1),
    auxiliary_head=dict(in_channels=embed_dims, channels=48, loss_decode=dict(loss_weight=0.4)),
    data_preprocessor=dict(mean=[127.5], std=[127.5], size=scene))

load_image = dict(type='LoadImageFromFile', _scope_='nepa_mm', color_type='grayscale')
train_pipeline = [
    load_image,
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    load_image,
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
metainfo = dict(classes=(
    'background', 'T-shirt/top', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt',
    'sneaker', 'bag', 'ankle boot'))
train_dataloader = dict(dataset=dict(
    data_root=data_root, indices=num_scenes, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(
    data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(lr=lr), paramwise_cfg=dict(layer_decay_rate=layer_decay_rate))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=max(iters // 10, 1)),
    dict(type='PolyLR', power=1.0, eta_min=0., by_epoch=False, begin=max(iters // 10, 1),
         end=iters),
]
train_cfg = dict(max_iters=iters, val_interval=iters)
default_hooks = dict(checkpoint=dict(interval=iters))
