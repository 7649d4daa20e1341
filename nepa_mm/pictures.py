"""Pictures of predictions: what the network saw of each image, under a name of its own."""
from pathlib import Path

from mmengine.registry import HOOKS
from mmpretrain.engine import VisualizationHook

from .reading import read_image, to_picture


def page_names(images, out_dir):
    """A file for the picture of each image, none of them twice and none of them an image.

    Args:
        images (Iterable[str]): Paths of the images.
        out_dir (str): Folder of the pictures.

    Yields:
        Path: ``x.png``; where that is taken with the image's folder, or else a number.
    """
    images = [Path(image) for image in images]
    taken = {image.resolve() for image in images}
    for image in images:
        stem = image.stem[:60]      # file names are limited to 255 bytes
        path, n = Path(out_dir) / f'{stem}.png', 1
        if path.resolve() in taken and image.parent.name:
            stem = f'{image.parent.name[:60]}_{stem}'
            path = path.with_name(f'{stem}.png')
        while path.resolve() in taken:
            n += 1
            path = path.with_name(f'{stem}_{n}.png')
        taken.add(path.resolve())
        yield path


def pages_of(dataset, out_dir):
    """The pages of a data set's files, by path; of all of them, so that processes agree."""
    infos = [dataset.get_data_info(i) for i in range(len(dataset))] if hasattr(
        dataset, 'get_data_info') else []
    paths = [info['img_path'] for info in infos if info.get('img_path')]
    return dict(zip(paths, page_names(paths, out_dir)))


@HOOKS.register_module(force=True)
class SeenImageHook(VisualizationHook):
    """mmpretrain's hook, with right colours for any number of channels, and no picture lost.

    The original shows pixels in the order BGR, knows three channels and one view, and images of
    the same name in two folders write the same picture.

    Args:
        **kwargs: Of mmpretrain's VisualizationHook.
    """

    names = None

    def after_test_iter(self, runner, batch_idx, data_batch, outputs):
        """Draw a batch of the test."""
        if self.names is None:
            self.names = pages_of(runner.test_dataloader.dataset, self.out_dir)
        inputs = data_batch['inputs']
        if outputs and len(inputs) and getattr(inputs[0], 'ndim', 3) == 4:     # views of one batch
            inputs = inputs[0]
        for index, (image, sample) in enumerate(zip(inputs, outputs)):
            number = len(inputs) * batch_idx + index
            path = sample.get('img_path')
            page = self.names.get(path, Path(self.out_dir) / f'{number}.png')
            if number % self.interval == 0:
                self._visualizer.visualize_cls(
                    image=to_picture(image.permute(1, 2, 0).cpu().numpy()), data_sample=sample,
                    name=page.stem, **dict(self.draw_args, out_file=str(page)))


def segmentation_hook(color_type, out_dir):
    """A class in place of mmseg's SegVisualizationHook, which reads files as the network does.

    Its pictures are written whatever backends the config gives to the visualizer.
    """
    from mmseg.engine.hooks import SegVisualizationHook

    @HOOKS.register_module(force=True)
    class SeenSegmentsHook(SegVisualizationHook):
        names = None

        def after_test_iter(self, runner, batch_idx, data_batch, outputs):
            if self.names is None:
                self.names = pages_of(runner.test_dataloader.dataset, out_dir)
            for sample in outputs:
                path = sample.img_path
                page = self.names.get(path, Path(out_dir) / f'{Path(path).stem}.png')
                self._visualizer.add_datasample(
                    page.stem, to_picture(read_image(path, color_type)),
                    data_sample=sample.numpy(),     # a mask of 1 x 1 would be an index else
                    show=self.show, wait_time=self.wait_time, out_file=str(page))

    return SeenSegmentsHook.__name__
