"""How many channels the images of a config have, and whether its network takes them."""
from nepa_mm.datasets.images import check_color_type
from nepa_mm.models.vit import NEPAViT
from nepa_mm.utils.nested import dicts

LOADERS = ('LoadImageWithPillow', 'LoadImageFromFile', 'LoadRandomResizedCrop', 'PackEncodedCrop')
CHANNELS = dict(color=3, grayscale=1)       # of a color_type
COLOUR_ONLY = ('TimmRandAugment', 'PhotoMetricDistortion')


def kind(node):
    """The class that a dict of a config names, without its scope or module."""
    return str(node.get('type')).rpartition('.')[2]


def in_channels(cfg):
    """Channels of the images that a config's network takes."""
    nodes = [node for node in dicts(cfg.get('model') or {}) if kind(node) == NEPAViT.__name__]
    return nodes[0].get('in_channels', 3) if nodes else 3


def preprocessing(cfg):
    """Config of the data preprocessor: the model's, or else the one that stands beside it."""
    for node in [*dicts(cfg.get('model') or {}), cfg]:
        if node.get('data_preprocessor'):
            return node['data_preprocessor']
    return {}


def color_type(cfg, *loaders):
    """The ``color_type`` by which dataloaders of a config read files.

    Args:
        cfg (Config): The config.
        loaders (str): Names of dataloaders; the first that reads files counts.

    Returns:
        str: 'color', 'grayscale' or 'unchanged'; what fits ``in_channels`` if none reads files.
    """
    for name in loaders:
        for node in dicts(cfg.get(name) or {}):
            if kind(node) in LOADERS:
                return node.get('color_type', 'color')
    names = {channels: name for name, channels in CHANNELS.items()}
    return names.get(in_channels(cfg), 'unchanged')


def check_channels(cfg, *loaders):
    """Refuse what would give the network images of another number of channels.

    Args:
        cfg (Config): The config.
        loaders (str): Names of the dataloaders that will be used.

    Raises:
        ValueError: ``in_channels`` of the backbone, ``color_type`` of a pipeline, and ``mean`` and
            ``std`` of the data preprocessor do not fit each other, or a step of a pipeline cannot
            work on as many channels.
    """
    wanted, settings = in_channels(cfg), preprocessing(cfg)
    for key in ('mean', 'std'):
        values = settings.get(key)
        if values is not None and len(values) not in (1, wanted):
            raise ValueError(f'{key} of the data_preprocessor has {len(values)} values, but the '
                             f"backbone's in_channels={wanted}; give one, or {wanted}.")
    normalised = len(settings.get('mean') or [0])
    for name in loaders:
        for node in dicts(cfg.get(name) or {}):
            if kind(node) in LOADERS:
                given = check_color_type(node.get('color_type', 'color'))
                found = max(CHANNELS.get(given, wanted), normalised)
                if found != wanted:
                    names = {1: "'grayscale'", 3: "'color'"}
                    raise ValueError(
                        f"{name} reads {found} channel{'s' * (found > 1)} (color_type={given!r}), "
                        f"but the backbone's in_channels={wanted}; set color_type of its "
                        f"{kind(node)} to {names.get(wanted, repr('unchanged'))}.")
            elif wanted not in (1, 3) and node.get('backend') == 'pillow':
                raise ValueError(
                    f"{name}: {kind(node)} with backend='pillow' knows 1 and 3 channels, but the "
                    f"backbone's in_channels={wanted}; set backend='cv2', or use "
                    'LoadRandomResizedCrop.')
            elif wanted not in (1, 3) and kind(node) in COLOUR_ONLY:
                raise ValueError(f'{name}: {kind(node)} knows 1 and 3 channels, but the '
                                 f"backbone's in_channels={wanted}; take it out.")
