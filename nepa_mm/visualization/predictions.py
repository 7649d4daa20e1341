"""Hooks that draw predictions on the images that the network saw, one output file per image."""
from collections.abc import Sequence
from copy import copy
from inspect import getattr_static, unwrap
from pathlib import Path
from types import FunctionType

from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from mmpretrain.engine import VisualizationHook

from nepa_mm.datasets.images import read_image, to_display_rgb
from nepa_mm.utils.outputs import dataset_pages, page_names


def page_of(sample: BaseDataElement, pages: dict[str, Path], out_dir: str | Path) -> Path:
    """Output file of a sample; without an image file it is named by the sample's index."""
    path = sample.get('img_path')
    return pages.get(path) or next(page_names([path or str(sample.get('sample_idx'))], out_dir))


def draws_everywhere(visualizer: Visualizer) -> Visualizer:
    """Copy a visualizer so that it draws in every process of a distributed run.

    mmengine decorates its methods with ``master_only``, so they do nothing in other processes. The
    class of the copy has the undecorated methods. Both visualizers share backends and figures.
    """
    cls = type(visualizer)
    methods = {name: getattr_static(cls, name) for name in dir(cls)}
    undecorated = {name: unwrap(method) for name, method in methods.items()
                   if isinstance(method, FunctionType) and hasattr(method, '__wrapped__')}
    meta = methods['dataset_meta']
    undecorated['dataset_meta'] = property(unwrap(meta.fget), unwrap(meta.fset))
    result = copy(visualizer)
    result.__class__ = type(cls.__name__, (cls,), undecorated)
    return result


class _DrawingHook:
    """Mixin: a visualizer that draws in every process, and an output file for each image."""

    def before_test(self, runner: Runner) -> None:
        """Choose the output files."""
        dataset = runner.test_dataloader.dataset
        # the run's own, which need not be mmengine's "current" one
        self._visualizer = draws_everywhere(runner.visualizer)
        self._visualizer.dataset_meta = getattr(dataset, 'metainfo', {})
        self.pages = dataset_pages(dataset, self.out_dir)


@HOOKS.register_module(force=True)
class SeenImageHook(_DrawingHook, VisualizationHook):
    """mmpretrain's hook for any number of channels, without overwriting images.

    mmpretrain's hook shows BGR pixels as RGB, supports three channels and one view, and writes
    images of the same name in two folders to one file.

    Args:
        **kwargs: Arguments of mmpretrain's VisualizationHook.
    """

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict,
                        outputs: Sequence[BaseDataElement]) -> None:
        """Draw every ``interval``-th sample of a test batch."""
        inputs = data_batch['inputs']
        if outputs and len(inputs) and getattr(inputs[0], 'ndim', 3) == 4:     # several views
            inputs = inputs[0]
        for index, (image, sample) in enumerate(zip(inputs, outputs)):
            number = runner.test_dataloader.batch_size * batch_idx + index
            if number % self.interval == 0:
                page = page_of(sample, self.pages, self.out_dir)
                self._visualizer.visualize_cls(
                    image=to_display_rgb(image.permute(1, 2, 0).cpu().numpy()), data_sample=sample,
                    name=page.stem, **dict(self.draw_args, out_file=str(page)))


def segmentation_hook(color_type: str, out_dir: str | Path) -> str:
    """Register a replacement of mmseg's SegVisualizationHook; return its name.

    The hook reads files as the network does and writes its images to ``out_dir``, whatever
    backends the config gives to the visualizer.

    Args:
        color_type (str): See :func:`read_image`.
        out_dir (str | Path): Folder of the images.
    """
    from mmseg.engine.hooks import SegVisualizationHook

    @HOOKS.register_module(force=True)
    class SeenSegmentsHook(_DrawingHook, SegVisualizationHook):
        """mmseg's hook with the pixels that the network reads."""

        def after_test_iter(self, runner, batch_idx, data_batch, outputs):
            for sample in outputs:
                page = page_of(sample, self.pages, self.out_dir)
                self._visualizer.add_datasample(
                    page.stem, to_display_rgb(read_image(sample.img_path, color_type)),
                    data_sample=sample.numpy(),     # mmseg misreads a 1 x 1 mask as an index
                    show=self.show, wait_time=self.wait_time, out_file=str(page))

    SeenSegmentsHook.out_dir = out_dir
    return SeenSegmentsHook.__name__
