"""NEPA on ViT-B/14: the released network (GELU, QK-norm without parameters, LayerScale 1e-5)."""
model = dict(
    type='NEPA',
    backbone=dict(
        type='NEPAViT',
        arch='base',
        patch_size=14,
        causal=True,
        qk_norm='plain',
        layer_scale_init_value=1e-5,
        rope_rescale=2.),
    head=dict(type='NEPAHead', shift=1, stop_gradient=True),
    data_preprocessor=dict(
        type='NEPADataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True))
