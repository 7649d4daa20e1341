"""ImageNet-1K, 256 images per GPU: random resized crop and flip, nothing else.

The crop covers 8 to 100 % of the area. torchvision reads and resizes it bilinearly with
antialiasing, as in the reference. Fine-tuning uses bicubic crops.
"""
data_root = 'data/imagenet'

train_pipeline = [
    dict(
        type='LoadRandomResizedCrop',
        scale=224,
        crop_ratio_range=(0.08, 1.0),
        interpolation='bilinear'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=256,
    num_workers=12,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageNet', data_root=data_root, split='train', pipeline=train_pipeline))
