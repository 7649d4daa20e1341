"""Fine-tuning of NEPA, ViT-L/14, on ImageNet-1K, 100 epochs: the released recipe.

Paper:    arXiv 2512.16922, Table 2 (result); the recipe is the released code's.
Expected: 85.40 % top-1 (published, released weights; paper, Table 2: 85.3). Not run here.
Cost:     100 epochs at batch 1024, bidirectional attention over 257 tokens.
Command:  tools/dist_train.sh configs/classification/nepa_vit-l_ft_in1k.py 8
Starts from work_dirs/nepa_vit-l/epoch_1600.pth; see nepa_vit-b_ft_in1k.py for another checkpoint.

Differences from nepa_vit-b_ft_in1k.py: lr 4e-3, layer decay 0.75, warmup over up to 30 epochs, drop
path 0.2, and evaluation at 235 x 235 pixels without keeping the aspect ratio, centre crop 224.
The paper trains L for 50 epochs (nepa_vit-l_ft-paper_in1k.py).
"""
_base_ = ['./nepa_vit-b_ft_in1k.py']

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='work_dirs/nepa_vit-l/epoch_1600.pth')),
    head=dict(in_channels=1024))

optim_wrapper = dict(
    optimizer=dict(lr=1e-3 * _base_.batch / 256), paramwise_cfg=dict(layer_decay_rate=0.75))
param_scheduler = dict(warmup_ratio=0.3)

test_pipeline = _base_.test_pipeline
test_pipeline[1] = dict(
    type='Resize', scale=(235, 235), interpolation='bicubic', backend='pillow')
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
