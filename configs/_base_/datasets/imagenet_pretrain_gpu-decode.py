"""imagenet_pretrain.py with JPEGs decoded, cropped and resized on the GPU: same crops and flips.

Use it instead of that file in ``_base_`` of a pretraining config. Experimental: not yet run on a
GPU. nvJPEG's pixels may differ from Pillow's. Without a GPU the CPU decodes in the main process.
"""
_base_ = ['imagenet_pretrain.py']

train_pipeline = [
    dict(
        type='PackEncodedCrop',
        scale=224,
        crop_ratio_range=(0.08, 1.0),
        interpolation='bilinear',
        flip_prob=0.5),
]

train_dataloader = dict(
    collate_fn=dict(type='encoded_collate'), dataset=dict(pipeline=train_pipeline))
