"""Linear segmentation probe on scenes of clothes: a 1 x 1 convolution on frozen features.

Data:     python demo/make_garment_scenes.py --val 200
Command:  python tools/train.py configs/fashion_mnist/fashion_segment_linear.py \
              --cfg-options block=3
With a random network:  pretrained=None
Fine-tuned:  frozen_stages=0 causal=False lr=2e-3; from scratch pretrained=None frozen_stages=-1

Batch normalisation and the convolution read one block. The last block's output is trained to
resemble the next patch's embedding and is shallow by construction (paper, Table 6). The causal mask
stays on: the frozen weights were trained with it.
"""
_base_ = ['./fashion_upernet.py']

pretrained = 'work_dirs/fashion_pretrain/epoch_4.pth'
num_scenes = 100        # the first ones
block = 2               # whose output is read, from 0
causal = True
frozen_stages = 4       # 4: the whole network; 0: the patch embedding; -1: nothing
iters = 300
lr = 1e-2

model = dict(
    backbone=dict(causal=causal, drop_path_rate=0., frozen_stages=frozen_stages,
                  out_indices=[block],
                  init_cfg=pretrained and dict(
                      type='Pretrained', checkpoint=pretrained, prefix='backbone.')),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='LinearSegHead',
        in_channels=128,
        in_index=0,
        channels=128,
        num_classes=11,
        dropout_ratio=0.,
        norm_cfg=dict(type='SyncBN'),
        loss_decode=dict(type='CrossEntropyLoss')),
    auxiliary_head=None)

train_dataloader = dict(dataset=dict(indices=num_scenes))
optim_wrapper = dict(optimizer=dict(lr=lr))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=max(iters // 10, 1)),
    dict(type='PolyLR', power=1.0, eta_min=0., by_epoch=False, begin=max(iters // 10, 1),
         end=iters),
]
train_cfg = dict(max_iters=iters, val_interval=iters)
default_hooks = dict(checkpoint=dict(interval=iters))
