"""Causal fine-tuning of the ablations' full network, 100k steps.

Paper:    arXiv 2512.16922, Table 1e, causal; Table 1b, all four components.
Expected: 81.3 % top-1 (published). Not run here.
Cost:     that of nepa_vit-b_ft-paper_in1k.py.
Changes:  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_100k/epoch_160.pth
Command:  tools/dist_train.sh configs/classification/ablations/nepa_vit-b_ft_100k.py 8

The paper fine-tunes its ablations with the settings of its appendix D. The epochs are not stated;
here 100, as for ViT-B.
"""
_base_ = ['../nepa_vit-b_ft-paper-causal_in1k.py']

model = dict(backbone=dict(init_cfg=dict(checkpoint='work_dirs/nepa_vit-b_100k/epoch_160.pth')))
