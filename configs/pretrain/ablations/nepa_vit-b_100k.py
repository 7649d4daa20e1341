"""NEPA, ViT-B/14 with SwiGLU, 100k steps at batch 2048: the paper's ablations at full strength.

Paper:    arXiv 2512.16922, Table 1b, all four components.
Expected: 81.3 % top-1 after causal fine-tuning (published). Not run here.
Cost:     a tenth of nepa_vit-b_swiglu.py's images.
Changes:  optim_wrapper.optimizer.lr=0.0024
          optim_wrapper.accumulative_counts=1
          auto_scale_lr.base_batch_size=2048
          param_scheduler.warmup=4
          param_scheduler.end=160
          train_cfg.max_epochs=160
Command:  tools/dist_train.sh configs/pretrain/ablations/nepa_vit-b_100k.py 8

Fine-tuning: configs/classification/ablations/nepa_vit-b_ft_100k.py

160 epochs are 100,160 steps. The paper states batch, steps and the lr rule. Assumed here, not
stated: ViT-B with patches of 14; a full cosine over these steps, not the start of a longer one; the
same fraction of warmup as in the full recipe (2.5 %).
"""
_base_ = ['../nepa_vit-b_swiglu.py']

optim_wrapper = dict(optimizer=dict(lr=_base_.base_lr * 2048 / 256), accumulative_counts=1)
auto_scale_lr = dict(base_batch_size=2048)
param_scheduler = dict(warmup=4, end=160)
train_cfg = dict(max_epochs=160)
