"""NEPA without stop-gradient, kept from collapsing by SIGReg on the embeddings.

Paper:    arXiv 2607.00958.
Expected: unknown, not run here. The paper's data are time series.
Cost:     that of nepa_vit-b_50k.py, and 0.6 GB of memory for 256 images per GPU.
Changes:  model.head.stop_gradient=False
          model.regularizer.type=SIGReg
          model.regularizer.loss_weight=10.0
          model.regularizer.num_slices=256
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_50k_sigreg.py 8

The paper also has a squared error and a projection of outputs and embeddings; neither is here.
The weight keeps the digits from collapsing: docs/ablations.md.

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_50k.py with
  model.backbone.init_cfg.checkpoint=work_dirs/nepa_vit-b_50k_sigreg/epoch_80.pth
"""
_base_ = ['./nepa_vit-b_50k.py']

model = dict(
    head=dict(stop_gradient=False),
    regularizer=dict(type='SIGReg', loss_weight=10.0, num_slices=256))
