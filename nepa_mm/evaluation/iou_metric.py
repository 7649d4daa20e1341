"""mmseg's IoUMetric, which says what it could not measure."""
import logging

from mmengine.logging import print_log
from mmengine.registry import METRICS
from mmseg.evaluation import IoUMetric

from nepa_mm.datasets.transforms.masks import listing
from nepa_mm.utils.errors import DataError


@METRICS.register_module()
class CheckedIoUMetric(IoUMetric):
    """mmseg's IoUMetric, which names the classes that the ground truth has no pixel of.

    Label maps of images of the same name in two folders have names of their own.

    Raises:
        DataError: The ground truth has no pixel of any class: all figures would be nan.
    """

    pages = {}      # the label map of each image

    def process(self, data_batch, data_samples):
        """Count pixels, and write label maps where ``output_dir`` is set."""
        super().process(data_batch, [
            dict(sample, img_path=str(self.pages.get(sample['img_path'], sample['img_path'])))
            for sample in data_samples])

    def compute_metrics(self, results):
        """The figures of IoUMetric."""
        metrics = super().compute_metrics(results)
        if self.format_only:
            return metrics
        pixels, names = sum(result[3] for result in results), self.dataset_meta['classes']
        absent = [name for name, count in zip(names, pixels.tolist()) if not count]
        if len(absent) == len(names):
            raise DataError('The ground truth has no pixel of any class, all of it is ignored '
                            f'(ignore_index={self.ignore_index}): there is nothing to evaluate.')
        if absent:
            print_log(
                f'There is no pixel of the ground truth of {listing(absent)} ({len(absent)} of '
                f'{len(names)} classes): Acc is nan there, and IoU is nan, which mIoU leaves out, '
                'or 0 where the class was predicted, which mIoU counts.',
                'current', logging.WARNING)
        return metrics
