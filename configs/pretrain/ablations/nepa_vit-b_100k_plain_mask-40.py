"""Plain ViT with 40 % of its inputs masked; the targets stay clean.

Paper:    arXiv 2512.16922, Table 1c, masking 40 %.
Expected: 76.4 % top-1 after causal fine-tuning (published). Not run here.
Cost:     that of nepa_vit-b_100k.py.
Changes:  model.mask_ratio=0.4
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_100k_plain_mask-40.py 8

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_100k_plain.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_100k_plain_mask-40/epoch_160.pth
"""
_base_ = ['./nepa_vit-b_100k_plain.py']

model = dict(mask_ratio=0.4)
