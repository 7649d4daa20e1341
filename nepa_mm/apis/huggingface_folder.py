"""Write a folder in the published format: weights, configs and, to share it, a model card."""
import copy
import json
from pathlib import Path

from mmengine.utils import to_2tuple

from nepa_mm.apis.config import read_config
from nepa_mm.apis.input_spec import (
    class_names,
    input_of,
    preprocessor_config,
    published_input,
    size_of,
)
from nepa_mm.apis.model_card import model_card
from nepa_mm.checkpoints.huggingface import (
    DROPPED,
    check_and_complete,
    fold_layer_scale,
    match_names,
    to_published,
)
from nepa_mm.checkpoints.huggingface_config import (
    DEFAULTS,
    complete_config,
    count_classes,
    model_cfg,
    published_config,
)
from nepa_mm.checkpoints.io import read_checkpoint, save_weights
from nepa_mm.checkpoints.loading import select_weights, weights_kind
from nepa_mm.checkpoints.recorded_config import recorded_config
from nepa_mm.utils.files import atomic_write


def set_image_size(config: dict, images: dict, backbone: dict) -> None:
    """Set ``image_size`` of a published config to the size of the network's input.

    Raises:
        ValueError: The size varies, or is padded.
    """
    size = size_of(images)
    if size is None:
        raise ValueError('The test pipeline yields images of varying size, but a published config '
                         'has one image_size: set it with a Resize to (width, height) or a '
                         'CenterCrop.')
    padded = [side % patch for side, patch in zip(size, to_2tuple(backbone.get('patch_size', 14)))]
    if backbone.get('remainder') == 'pad' and any(padded):
        raise ValueError(f'remainder="pad" with images of {size} cannot be expressed in the '
                         'published format, which drops incomplete patches.')
    if size != list(to_2tuple(config.get('image_size', DEFAULTS['image_size']))):
        config['image_size'] = size[0] if size[0] == size[1] else size


def write_folder(checkpoint_path: str, folder: str | Path, weights: str | None = None,
                 config_path: str | None = None, fold: bool = False, card: bool = False,
                 license: str = 'unknown') -> tuple[str, list[str], tuple]:
    """Write ``config.json``, ``model.safetensors`` and what belongs to them in a new folder.

    ``preprocessor_config.json`` is written if the preprocessing is known.

    Args:
        checkpoint_path (str): See :func:`read_checkpoint`.
        folder (str | Path): Must not exist.
        weights (str, optional): See :func:`select_weights`. Defaults to None.
        config_path (str, optional): Config file; defaults to None, the checkpoint's record.
        fold (bool): Whether to multiply LayerScale into the projections. Defaults to False.
        card (bool): Whether to write ``README.md``, a model card. Defaults to False.
        license (str): Its licence, a name known to the Hub. Defaults to 'unknown'.

    Returns:
        tuple[str, list[str], tuple]: The set of weights, the files written, and the mapping of the
        names: pairs, tensors added without effect, tensors dropped.

    Raises:
        FileExistsError: The folder exists.
        ValueError: The network or its preprocessing has no place in the format, or the checkpoint
            does not fit the config.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f'{folder} exists already; remove it or choose another name.')
    checkpoint = read_checkpoint(checkpoint_path, weights=weights)
    state_dict = select_weights(checkpoint, weights, checkpoint_path)
    which, meta = weights_kind(checkpoint, weights), checkpoint['meta']
    cfg = (read_config(config_path).to_dict() if config_path
           else recorded_config(meta, checkpoint_path))
    if cfg.get('model') is None:
        raise ValueError('The checkpoint does not record its config; give it with --config.')
    model, classes = copy.deepcopy(cfg['model']), count_classes(state_dict)
    expected = (model.get('head') or {}).get('num_classes')
    if expected != classes:
        raise ValueError(f'The config has a head for {expected} classes, {checkpoint_path} for '
                         f'{classes}.')
    dropped = [key for key in state_dict if key in DROPPED]
    state_dict = {key: value for key, value in state_dict.items() if key not in DROPPED}
    if fold:
        state_dict = fold_layer_scale(state_dict)
        model['backbone']['layer_scale_init_value'] = None
    config = published_config(model, meta.get('published'))
    kept = {key: meta[key] for key in ('epoch', 'iter') if card and key in meta}
    images = input_of(cfg)
    if images:
        kept['input'] = images
        set_image_size(config, images, model['backbone'])
    elif meta.get('published'):
        images = published_input(complete_config(config))
    else:
        print(f'No input spec is recorded: image_size {config["image_size"]} is the default of the '
              'format; --config provides the real one.')
    names = class_names(cfg, meta)
    if classes and names and len(names) == classes:
        kept['dataset_meta'] = dict(classes=names)
        if names != [config.get('id2label', {}).get(str(i)) for i in range(classes)]:
            config.update(id2label={str(i): name for i, name in enumerate(names)},
                          label2id={name: i for i, name in enumerate(names)})
    # may raise, hence before anything is written
    texts = {}
    if images:
        texts['preprocessor_config.json'] = json.dumps(preprocessor_config(images), indent=2)
    if card:
        texts['README.md'] = model_card(folder.name, checkpoint, which, config, cfg, license,
                                        sum(value.numel() for value in state_dict.values()))
    texts['config.json'] = json.dumps(config, indent=2)
    new = check_and_complete(state_dict, model_cfg(config, classes))
    save_weights(to_published(state_dict), folder / 'model.safetensors', for_transformers=True,
                 source=Path(checkpoint_path).name if card else checkpoint_path,
                 weights=dict(state_dict=which), **kept)
    for name, text in texts.items():    # config.json last: readers reject a folder without it
        with atomic_write(folder / name) as file:
            file.write_text(text.rstrip('\n') + '\n', encoding='utf-8')
    return which, ['model.safetensors', *texts], (match_names(state_dict, 'hf'), new, dropped)
