"""NEPA with an additional loss on blocks 2, 5 and 8: their mean is added.

Paper:    none; beyond the paper.
Expected: unknown, not run here.
Cost:     that of nepa_vit-b_50k.py.
Changes:  model.intermediate_blocks=[2,5,8]
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k_intermediate-loss.py 8

The log has the last block's loss as `loss`, the mean of blocks 2, 5 and 8 as `loss_intermediate`.

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k_intermediate-loss/epoch_80.pth
"""
_base_ = ['./nepa_vit-b_50k.py']

model = dict(intermediate_blocks=[2, 5, 8])
