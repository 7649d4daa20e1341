"""The images of a network outside of OpenMMLab's pipelines: file or PIL image to tensor."""
import copy
import os
from collections.abc import Mapping, Sequence

import torch
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.structures import BaseDataElement
from mmpretrain.datasets.transforms import PackInputs
from PIL import Image
from torch import Tensor

from nepa_mm.apis.channel_checks import READERS, check_channels, color_type, in_channels, type_name
from nepa_mm.apis.input_spec import input_of, pipeline_of, test_pipeline_of
from nepa_mm.apis.recorded_network import scope_of
from nepa_mm.datasets.images import pixels_of, read_image

NOT_PIXELS = (*READERS, 'LoadAnnotations', 'PackInputs', 'PackSegInputs')
RECORDED_STEPS = ('Resize', 'ResizeEdge', 'CenterCrop', 'Pad')      # those a record may name


class ImageTransform:
    """Turn an image into the network's input, as the Runner's test pipeline does, bit for bit.

    Args:
        steps (Sequence[dict]): Steps of a pipeline, without reading and packing.
        preprocessor (BaseDataPreprocessor): Normalises the pixels. A copy stays on the CPU.
        color_type (str): See :func:`nepa_mm.datasets.images.decode_image`. Defaults to 'color'.
        channels (int, optional): Channels of the network, for ``color_type='unchanged'``. Defaults
            to None: any.
        scope (str): Scope of the steps. Defaults to 'mmpretrain'.

    The object can be pickled: data loader workers may call it.
    """

    def __init__(self, steps: Sequence[dict], preprocessor: BaseDataPreprocessor,
                 color_type: str = 'color', channels: int | None = None,
                 scope: str = 'mmpretrain'):
        with DefaultScope.overwrite_default_scope(scope):
            self.steps = [TRANSFORMS.build(dict(step)) for step in steps]
        self.preprocessor = copy.deepcopy(preprocessor).cpu().eval()
        self.color_type, self.channels = color_type, channels

    @torch.no_grad()
    def __call__(self, image: str | os.PathLike | Image.Image) -> Tensor:
        """Read, resize, crop and normalise.

        Args:
            image (str | Path | Image): A file, or a PIL image of any mode. Both are read as
                LoadImageWithPillow reads files: upright by EXIF, transparency dropped, 16-bit
                grey by its high byte.

        Returns:
            Tensor: (C, height, width), fp32, on the CPU.

        Raises:
            UnreadableImageError: The file cannot be read.
            DataError: Its channels or values do not suit the network.
            ValueError: ``image`` is something else.
        """
        if isinstance(image, Image.Image):
            pixels = pixels_of(image, self.color_type, self.channels)
        elif isinstance(image, (str, os.PathLike)):
            pixels = read_image(os.fspath(image), self.color_type, self.channels)
        else:
            raise ValueError(f'An image is a path or a PIL image, got {type(image).__name__}.')
        results = dict(img=pixels, img_shape=pixels.shape[:2], ori_shape=pixels.shape[:2])
        for step in self.steps:
            results = step(results)
        batch = PackInputs.format_input(results['img'])[None]
        # a sample receives what a segmentor's preprocessor says about padding
        data = dict(inputs=batch, data_samples=[BaseDataElement()])
        return self.preprocessor(data, training=False)['inputs'][0]

    def __repr__(self):
        parts = [f'read as {self.color_type}', *map(str, self.steps), str(self.preprocessor)]
        return f'{type(self).__name__}({", ".join(" ".join(part.split()) for part in parts)})'


def build_transform(cfg: Mapping, preprocessor: BaseDataPreprocessor,
                    trusted: bool = True) -> ImageTransform:
    """Build the transform of a config.

    It consists of the steps of the test pipeline. Without one (pretraining) it resizes the short
    side to the size of the training crops and crops the centre.

    Args:
        cfg (dict): With ``model`` and dataloaders, or with ``input``, see
            :func:`nepa_mm.apis.input_spec.input_of`.
        preprocessor (BaseDataPreprocessor): That of the network.
        trusted (bool): Whether any class may be a step, or only those of ``RECORDED_STEPS``.
            Defaults to True.

    Raises:
        ValueError: The config has no pipeline, or one that is unknown or does not suit the
            network's channels.
    """
    pipeline = None if cfg.get('input') else test_pipeline_of(cfg)
    if pipeline is None:
        spec = input_of(cfg)
        if spec is None:
            raise ValueError('The config has neither a test pipeline nor a training pipeline.')
        pipeline = pipeline_of(spec)
    else:
        check_channels(cfg, 'test_dataloader')
    steps = [step for step in pipeline if type_name(step) not in NOT_PIXELS]
    if 'TestTimeAug' in map(type_name, steps):
        raise ValueError('Its test pipeline has a step TestTimeAug, which makes several images of '
                         'one.')
    unknown = [step['type'] for step in steps if not trusted and (
        step['type'] not in RECORDED_STEPS or step.get('_scope_', 'nepa_mm') != 'nepa_mm')]
    if unknown:
        raise ValueError(f'Its test pipeline has a step {str(unknown[0])[:80]!r}, and only '
                         f'{", ".join(RECORDED_STEPS)} are built from a record.')
    return ImageTransform(steps, preprocessor, color_type(
        cfg, 'test_dataloader', 'train_dataloader'), in_channels(cfg), scope_of(cfg))
