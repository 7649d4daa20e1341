"""Multi-scale and flip test of nepa_vit-b_upernet_160k_ade20k-512x512.py; it does not train.

Command:  tools/dist_test.sh CONFIG CHECKPOINT 8, with this file and
          work_dirs/nepa_vit-b_upernet_160k_ade20k-512x512/iter_160000.pth

Averages the probabilities at 0.5, 0.75, 1, 1.25, 1.5 and 1.75 times 512 pixels (shorter side),
each also mirrored. tools/test.py --tta does the same with the training config.
"""
_base_ = ['./nepa_vit-b_upernet_160k_ade20k-512x512.py']

model = dict(_delete_=True, type='SegTTAModel', module=_base_.model)
test_dataloader = dict(dataset=dict(pipeline=_base_.tta_pipeline))
