"""mmseg's IoUMetric, with a warning about what it cannot measure."""
import logging

from mmengine.logging import print_log
from mmengine.registry import METRICS
from mmseg.evaluation import IoUMetric

from nepa_mm.utils.errors import DataError
from nepa_mm.utils.text import joined


@METRICS.register_module()
class CheckedIoUMetric(IoUMetric):
    """mmseg's IoUMetric; warns about classes without a pixel in the ground truth.

    Label maps get unique names, also for images with the same name in two folders.

    Raises:
        DataError: The ground truth has no pixel of any class, so all metrics would be nan.
    """

    pages = {}      # the label map of each image

    def process(self, data_batch, data_samples):
        """Count pixels; write label maps if ``output_dir`` is set."""
        super().process(data_batch, [
            dict(sample, img_path=str(self.pages.get(sample['img_path'], sample['img_path'])))
            for sample in data_samples])

    def compute_metrics(self, results):
        """Compute IoUMetric's metrics."""
        metrics = super().compute_metrics(results)
        if self.format_only:
            return metrics
        pixels, names = sum(result[3] for result in results), self.dataset_meta['classes']
        absent = [name for name, count in zip(names, pixels.tolist()) if not count]
        if len(absent) == len(names):
            raise DataError('The ground truth has no pixel of any class: all of it is '
                            f'ignore_index={self.ignore_index}, so nothing can be evaluated.')
        if absent:
            print_log(
                f'The ground truth has no pixel of {joined(map(repr, absent))} ({len(absent)} of '
                f'{len(names)} classes): their Acc is nan; their IoU is nan (skipped by mIoU), or '
                '0 (counted) if predicted.',
                'current', logging.WARNING)
        return metrics
