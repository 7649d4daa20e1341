"""NEPA without stop-gradient: the loss also trains the embedding as a target.

Paper:    arXiv 2512.16922, Table 1a, no stop-gradient.
Expected: fail (published): the loss goes to -1, all embeddings become equal. Not run here.
Cost:     that of nepa_vit-b_50k.py.
Changes:  model.head.stop_gradient=False
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k_no-stop-gradient.py 8

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k_no-stop-gradient/epoch_80.pth
"""
_base_ = ['./nepa_vit-b_50k.py']

model = dict(head=dict(stop_gradient=False))
