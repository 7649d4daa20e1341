"""EMA weights, evaluated and saved beside the raw weights."""
import math
from contextlib import contextmanager

import torch
from mmengine.evaluator import DumpResults
from mmengine.hooks import RuntimeInfoHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS, MODELS
from mmengine.runner.amp import autocast
from mmengine.runner.checkpoint import weights_to_cpu
from mmpretrain.engine.hooks import EMAHook

from nepa_mm.checkpoints.loading import unwrapped
from nepa_mm.engine.fsdp_runner import is_sharded


@contextmanager
def _without_predictions(evaluator):
    """An evaluator that writes no predictions: those of the EMA weights are on disk already."""
    metrics, folders = evaluator.metrics, {}
    evaluator.metrics = [metric for metric in metrics if not isinstance(metric, DumpResults)]
    for metric in evaluator.metrics:
        if getattr(metric, 'output_dir', None):
            folders[metric], metric.output_dir = metric.output_dir, None
    try:
        yield evaluator
    finally:
        evaluator.metrics = metrics
        for metric, folder in folders.items():
            metric.output_dir = folder


@HOOKS.register_module()
class ModelEMAHook(EMAHook):
    """mmpretrain's EMAHook for classification and segmentation, with labelled sets of weights.

    - EMA weights are updated per optimizer update, not per micro-step.
    - Metrics of the EMA weights keep their names (``accuracy/top1``), so ``save_best`` keeps
      the best EMA weights. If both sets are evaluated, metrics of the raw weights end in
      ``_raw``, in the log and in the result of ``runner.val()``. Predictions and figures are
      saved for the EMA weights only.
    - mmengine stores the EMA weights as ``state_dict``. ``checkpoint['meta']['weights']``
      records that: ``dict(state_dict='ema', ema_state_dict='raw')``.
    - An interrupted validation leaves the EMA weights inside the model. It neither mixes up
      the two sets nor mislabels a checkpoint.
    - A second call to the Runner (``train()``, then ``test()``) keeps the EMA weights.

    Args:
        ema_type (str): Registered averaged model. Defaults to 'MultiTensorEMA'.
        evaluate_on_ema (bool): Whether to evaluate the EMA weights. Defaults to True.
        evaluate_on_origin (bool): Whether to evaluate the raw weights. Defaults to False.
        run_fraction (float, optional): Fraction of the run's updates over which the EMA weights
            average; sets ``momentum`` to 1 / (run_fraction x updates), at most 0.5. For runs of
            unknown length; the paper's momentum is 0.02 of its run. Defaults to None.
        **kwargs: ``strict_load``, ``begin_iter`` and ``begin_epoch`` of the parent class,
            and arguments of ``ema_type`` such as ``momentum``.

    Raises:
        ValueError: ``run_fraction`` is not above 0 and up to 1, or ``momentum`` is given, too; or
            ``begin_iter``, ``begin_epoch``, ``update_buffers`` or ``device`` is set
            in a sharded run (:class:`nepa_mm.engine.FSDPRunner`).
    """

    ema_in_model = False

    def __init__(self, ema_type: str = 'MultiTensorEMA', run_fraction: float | None = None,
                 **kwargs):
        if run_fraction is not None and not 0 < run_fraction <= 1:
            raise ValueError(f'run_fraction must be above 0 and up to 1, got {run_fraction}.')
        if run_fraction is not None and 'momentum' in kwargs:
            raise ValueError('Give run_fraction or momentum, not both: got '
                             f'{run_fraction} and {kwargs["momentum"]}.')
        super().__init__(ema_type=ema_type, **kwargs)
        self.run_fraction = run_fraction

    def _place_ema(self, in_model):
        """Swap the EMA weights into the model or out of it, unless they are there already."""
        if in_model != self.ema_in_model:
            self._swap_ema_parameters()
            self.ema_in_model = in_model

    def before_run(self, runner):
        """Create the EMA weights once per model; every call to the Runner runs this hook."""
        self._place_ema(False)
        model = unwrapped(runner.model)     # without the wrapper of test-time augmentation
        if is_sharded(model):
            # these use state dicts, which are gathered copies of the shards, or move shards
            odd = [name for name in ('update_buffers', 'device') if self.ema_cfg.get(name)]
            odd += [name for name in ('begin_iter', 'begin_epoch') if getattr(self, name)]
            if odd:
                raise ValueError(f'With FSDPRunner {type(self).__name__} averages the shards from '
                                 f'the first update on: remove {", ".join(odd)}.')
        if getattr(self, 'src_model', None) is not model:
            if self.run_fraction and runner.max_iters:      # 0 in a test
                counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
                updates = math.ceil(runner.max_iters / counts)
                self.ema_cfg['momentum'] = min(1 / (self.run_fraction * updates), 0.5)
                print_log(f'EMA: momentum {self.ema_cfg["momentum"]:.2g} for {updates} updates.',
                          logger='current')
            self.src_model = model
            self.ema_model = MODELS.build(self.ema_cfg, default_args=dict(model=model))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Update the EMA weights if this iteration updated the parameters."""
        if runner.optim_wrapper.should_update():
            super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def before_val_epoch(self, runner):
        """Put the weights for validation into the model."""
        self._before_evaluation()

    def before_test_epoch(self, runner):
        """Put the weights for the test into the model."""
        self._before_evaluation()

    def after_val_epoch(self, runner, metrics=None):
        """Restore the raw weights; validate them if ``evaluate_on_origin``."""
        raw = self._after_evaluation(runner, runner.val_loop, metrics)
        RuntimeInfoHook().after_val_epoch(runner, raw)

    def after_test_epoch(self, runner, metrics=None):
        """Restore the raw weights; test them if ``evaluate_on_origin``."""
        raw = self._after_evaluation(runner, runner.test_loop, metrics)
        RuntimeInfoHook().after_test_epoch(runner, raw)

    def _before_evaluation(self):
        self._place_ema(self.evaluate_on_ema)
        print_log(f'Evaluating the {"EMA" if self.evaluate_on_ema else "raw"} weights.',
                  logger='current')

    def _after_evaluation(self, runner, loop, metrics):
        """Return the metrics of the raw weights, and add them to ``metrics``."""
        self._place_ema(False)
        if not (self.evaluate_on_ema and self.evaluate_on_origin):
            return {}
        print_log('Evaluating the raw weights: names end in _raw.', logger='current')
        step = runner.model.val_step if loop is runner.val_loop else runner.model.test_step
        with _without_predictions(loop.evaluator) as evaluator, torch.no_grad():
            for data_batch in loop.dataloader:      # without hooks, which would draw figures again
                with autocast(enabled=loop.fp16):
                    outputs = step(data_batch)
                evaluator.process(data_samples=outputs, data_batch=data_batch)
            found = evaluator.evaluate(len(loop.dataloader.dataset))
        raw = {f'{name}_raw': value for name, value in found.items()}
        metrics.update(raw)
        return raw

    def before_save_checkpoint(self, runner, checkpoint):
        """Store both sets, the EMA weights as ``state_dict``, and label them in the meta."""
        checkpoint['ema_state_dict'] = weights_to_cpu(self.ema_model.state_dict())
        if not self.ema_in_model:
            self._swap_ema_state_dict(checkpoint)
        checkpoint['meta']['weights'] = dict(state_dict='ema', ema_state_dict='raw')
