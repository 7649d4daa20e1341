"""Fine-tuning of NEPA, ViT-L/14, on ImageNet-1K, 50 epochs: the paper's recipe.

Paper:    arXiv 2512.16922, Table 5 (recipe), Table 2 (result).
Expected: 85.3 % top-1 (published). Not run here.
Cost:     50 epochs at batch 1024.
Command:  tools/dist_train.sh configs/classification/nepa_vit-l_ft-paper_in1k.py 8
Starts from work_dirs/nepa_vit-l_swiglu/epoch_800.pth, the paper's network.

Like nepa_vit-b_ft-paper_in1k.py, but layer decay rises from 0.60, drop path is 0.2, 50 epochs.
"""
_base_ = ['./nepa_vit-b_ft-paper_in1k.py']

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='work_dirs/nepa_vit-l_swiglu/epoch_800.pth')),
    head=dict(in_channels=1024))

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.60))
param_scheduler = dict(end=50)
train_cfg = dict(max_epochs=50)
