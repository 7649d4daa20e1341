"""Pictures of predictions: what the network saw of each image, under a name of its own."""
from unittest import mock

from mmengine import dist
from mmengine.registry import HOOKS
from mmpretrain.engine import VisualizationHook

from nepa_mm.datasets.images import read_image, to_display_rgb
from nepa_mm.utils.outputs import dataset_pages, page_names


def page_of(sample, pages, out_dir):
    """The page of a sample, also of one that was made without a file."""
    path = sample.get('img_path')
    return pages.get(path) or next(page_names([path or str(sample.get('sample_idx'))], out_dir))


def drawing():
    """Let this process draw its share: mmengine's visualizers do nothing but in the first one."""
    return mock.patch.object(dist.utils, 'is_main_process', return_value=True)


def prepare(visualizer, dataset, out_dir):
    """The pages of a data set, whose classes a visualizer then knows in every process."""
    with drawing():
        visualizer.dataset_meta = getattr(dataset, 'metainfo', {})
    return dataset_pages(dataset, out_dir)


@HOOKS.register_module(force=True)
class SeenImageHook(VisualizationHook):
    """mmpretrain's hook, with right colours for any number of channels, and no picture lost.

    The original shows pixels in the order BGR, knows three channels and one view, and images of
    the same name in two folders write the same picture.

    Args:
        **kwargs: Of mmpretrain's VisualizationHook.
    """

    def before_test(self, runner):
        """Name the pictures."""
        self.pages = prepare(self._visualizer, runner.test_dataloader.dataset, self.out_dir)

    def after_test_iter(self, runner, batch_idx, data_batch, outputs):
        """Draw a batch of the test."""
        inputs = data_batch['inputs']
        if outputs and len(inputs) and getattr(inputs[0], 'ndim', 3) == 4:     # views of one batch
            inputs = inputs[0]
        for index, (image, sample) in enumerate(zip(inputs, outputs)):
            number = runner.test_dataloader.batch_size * batch_idx + index
            if number % self.interval == 0:
                page = page_of(sample, self.pages, self.out_dir)
                with drawing():
                    self._visualizer.visualize_cls(
                        image=to_display_rgb(image.permute(1, 2, 0).cpu().numpy()), data_sample=sample,
                        name=page.stem, **dict(self.draw_args, out_file=str(page)))


def segmentation_hook(color_type, out_dir):
    """A class in place of mmseg's SegVisualizationHook, which reads files as the network does.

    Its pictures are written whatever backends the config gives to the visualizer.
    """
    from mmseg.engine.hooks import SegVisualizationHook

    @HOOKS.register_module(force=True)
    class SeenSegmentsHook(SegVisualizationHook):
        def before_test(self, runner):
            self.pages = prepare(self._visualizer, runner.test_dataloader.dataset, out_dir)

        def after_test_iter(self, runner, batch_idx, data_batch, outputs):
            for sample in outputs:
                page = page_of(sample, self.pages, out_dir)
                with drawing():
                    self._visualizer.add_datasample(
                        page.stem, to_display_rgb(read_image(sample.img_path, color_type)),
                        data_sample=sample.numpy(),     # a mask of 1 x 1 would be an index else
                        show=self.show, wait_time=self.wait_time, out_file=str(page))

    return SeenSegmentsHook.__name__
