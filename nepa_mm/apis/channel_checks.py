"""Match the channels of a config's images with the network."""
from collections.abc import Mapping

from mmengine.config import Config

from nepa_mm.datasets.images import check_color_type
from nepa_mm.models.vit import NEPAViT
from nepa_mm.utils.nested import iter_dicts

READERS = ('LoadImageWithPillow', 'LoadImageFromFile', 'LoadRandomResizedCrop')
CHANNELS = dict(color=3, grayscale=1)       # of a color_type
COLOUR_ONLY = ('TimmRandAugment', 'PhotoMetricDistortion')


def type_name(node: Mapping) -> str:
    """Return the ``type`` of a dict of a config without its scope or module."""
    return str(node.get('type')).rpartition('.')[2]


def in_channels(cfg: Config) -> int:
    """Return ``in_channels`` of the config's backbone; 3 without a NEPAViT."""
    nodes = [node for node in iter_dicts(cfg.get('model') or {})
             if type_name(node) == NEPAViT.__name__]
    return nodes[0].get('in_channels', 3) if nodes else 3


def preprocessor_settings(cfg: Config) -> dict:
    """Return the config of the data preprocessor: the model's, else the top-level one."""
    for node in [*iter_dicts(cfg.get('model') or {}), cfg]:
        if node.get('data_preprocessor'):
            return node['data_preprocessor']
    return {}


def color_type(cfg: Config, *loaders: str) -> str:
    """Return the ``color_type`` of the first of the dataloaders that reads files.

    Args:
        cfg (Config): The config.
        loaders (str): Names of dataloaders.

    Returns:
        str: 'color', 'grayscale' or 'unchanged'. If none reads files, the one that matches
        ``in_channels``.
    """
    for name in loaders:
        for node in iter_dicts(cfg.get(name) or {}):
            if type_name(node) in READERS:
                return node.get('color_type', 'color')
    names = {channels: name for name, channels in CHANNELS.items()}
    return names.get(in_channels(cfg), 'unchanged')


def check_channels(cfg: Config, *loaders: str) -> None:
    """Reject pipelines that do not yield as many channels as the network needs.

    Args:
        cfg (Config): The config.
        loaders (str): Names of the dataloaders that will be used.

    Raises:
        ValueError: ``in_channels`` of the backbone, ``color_type`` of a pipeline, and ``mean`` and
            ``std`` of the data preprocessor do not match, or a step of a pipeline does not support
            that number of channels.
    """
    wanted, settings = in_channels(cfg), preprocessor_settings(cfg)
    for key in ('mean', 'std'):
        values = settings.get(key)
        if values is not None and len(values) not in (1, wanted):
            raise ValueError(f'{key} of the data_preprocessor has {len(values)} values, but the '
                             f"backbone's in_channels={wanted}; give one, or {wanted}.")
    normalised = len(settings.get('mean') or [0])
    for name in loaders:
        for node in iter_dicts(cfg.get(name) or {}):
            if type_name(node) in READERS:
                given = check_color_type(node.get('color_type', 'color'))
                found = max(CHANNELS.get(given, wanted), normalised)
                if found != wanted:
                    names = {1: "'grayscale'", 3: "'color'"}
                    raise ValueError(
                        f"{name} reads {found} channel{'s' * (found > 1)} (color_type={given!r}), "
                        f"but the backbone's in_channels={wanted}; set color_type of its "
                        f"{type_name(node)} to {names.get(wanted, repr('unchanged'))}.")
            elif wanted not in (1, 3) and node.get('backend') == 'pillow':
                raise ValueError(
                    f"{name}: {type_name(node)} with backend='pillow' supports 1 and 3 channels, "
                    f"but the backbone's in_channels={wanted}; set backend='cv2', or use "
                    'LoadRandomResizedCrop.')
            elif wanted not in (1, 3) and type_name(node) in COLOUR_ONLY:
                raise ValueError(f'{name}: {type_name(node)} supports 1 and 3 channels, but the '
                                 f"backbone's in_channels={wanted}; remove it.")
