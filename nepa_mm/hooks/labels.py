"""Labels that the head has no output for are found before the first step."""
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..checkpoint import unwrapped


@HOOKS.register_module()
class LabelCheckHook(Hook):
    """Compare the labels of every data set with the number of classes of the head.

    On a GPU a label out of range is a device-side assertion without a name.

    Raises:
        ValueError: A data set has another number of classes than the head, or a label
            that is no class.
    """

    def before_train(self, runner):
        """Check the training and the validation data."""
        self._check(runner, runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            self._check(runner, runner.val_dataloader.dataset)

    def before_test(self, runner):
        """Check the test data."""
        self._check(runner, runner.test_dataloader.dataset)

    @staticmethod
    def _check(runner, dataset):
        if not hasattr(dataset, 'get_gt_labels') or 'gt_label' not in dataset.get_data_info(0):
            return      # a wrapped or an unlabelled data set
        num_classes, labels = unwrapped(runner.model).head.num_classes, dataset.get_gt_labels()
        classes = dataset.metainfo.get('classes')
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f'model.head.num_classes is {num_classes}, but the data set '
                             f'{type(dataset).__name__} has {len(classes)} classes.')
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f'Labels must be 0 to {num_classes - 1}, as model.head.num_classes is '
                             f'{num_classes}, but those of {type(dataset).__name__} go from '
                             f'{labels.min()} to {labels.max()}.')
