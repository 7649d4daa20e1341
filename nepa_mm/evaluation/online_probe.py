"""Evaluation during pretraining that does not change the run."""
import torch
from mmengine.dist import all_gather
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from nepa_mm.datasets.classes import align_datasets
from nepa_mm.datasets.pipelines import use_one_reader
from nepa_mm.engine.fsdp_runner import is_sharded
from nepa_mm.evaluation.frozen_features import extract_features, knn_scores, linear_scores
from nepa_mm.utils.random_state import preserve_rng_state
from nepa_mm.utils.signals import shield_workers


@HOOKS.register_module()
class OnlineProbeHook(Hook):
    """Accuracy of k-NN and of a linear probe on frozen features, every few epochs.

    Scores the raw weights (``knn_top1``, ``linear_top1``, in percent) and, with an EMA hook,
    the EMA weights (``..._ema``). Values go to the log and to every visualisation backend.
    Features are extracted without gradient, in evaluation mode and fp32. The probe has its
    own optimizer and restores the random states, so the run is bitwise the same with and
    without this hook.

    A collapse shows in k-NN. The linear probe hardly shows it: standardised features
    amplify small differences.

    Processes share the work, but each one holds all features. For a large data set use a
    part of it (``indices`` of OpenMMLab's data sets).

    Example::

        custom_hooks = [
            dict(type='ModelEMAHook', momentum=1e-4),
            dict(type='OnlineProbeHook', interval=10,
                 bank_dataloader=dict(batch_size=256, num_workers=8, dataset=dict(
                     type='CustomDataset', data_root='data/imagenette2',
                     data_prefix='train', pipeline=test_pipeline)),
                 query_dataloader=...)]

    Args:
        bank_dataloader (dict): Labelled images that vote and train the probe; a config
            like ``val_dataloader``, in a fixed order, with a pipeline that draws nothing.
        query_dataloader (dict): Labelled images to classify.
        interval (int): Epochs between two evaluations; the last epoch is always
            evaluated. Defaults to 10.
        feature (str): 'avg_featmap', 'last_token' or 'cls_token'. Defaults to
            'avg_featmap'.
        block (int): Block whose output is read. The last block predicts embeddings and is
            shallow (Table 6); earlier blocks may score higher. Defaults to -1.
        k (int): Neighbours that vote. Defaults to 20.

    Raises:
        ValueError: ``interval`` is not positive, the images have no labels, or the run is
            sharded (:class:`nepa_mm.engine.FSDPRunner`).
    """

    def __init__(self, bank_dataloader: dict, query_dataloader: dict, interval: int = 10,
                 feature: str = 'avg_featmap', block: int = -1, k: int = 20):
        if interval < 1:
            raise ValueError(f'interval must be positive, got {interval}.')
        self.bank, self.queries = bank_dataloader, query_dataloader
        self.interval, self.feature, self.block, self.k = interval, feature, block, k

    def before_train(self, runner):
        """Build the data loaders, so that missing data is an error at once."""
        if is_sharded(runner.model):
            raise ValueError(f'{type(self).__name__} needs full weights, which no process of '
                             'FSDPRunner holds: remove it and give checkpoints to '
                             'tools/analysis_tools/knn.py.')
        with preserve_rng_state():
            self.bank, self.queries = (
                loader if not isinstance(loader, dict) else runner.build_dataloader(
                    dict(sampler=dict(type='DefaultSampler', shuffle=False),
                         collate_fn=dict(type='default_collate')) | loader
                    | dict(drop_last=False), runner.seed)
                for loader in (self.bank, self.queries))
        for loader in (self.bank, self.queries):
            use_one_reader(loader.dataset, runner.model)
            shield_workers(loader)
        for sentence in align_datasets(self.queries.dataset, 'query_dataloader', self.bank.dataset,
                                       'bank_dataloader'):
            runner.logger.warning(sentence)

    def after_train_epoch(self, runner):
        """Evaluate the raw and the EMA weights."""
        if not (self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        averages = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
        with preserve_rng_state():
            result = self.evaluate(model)
            for average in averages:
                result |= {f'{name}_ema': value for name, value in self.evaluate(average).items()}
        runner.logger.info(f'Probe after epoch {runner.epoch + 1}: ' + '  '.join(
            f'{name}: {value:.2f}' for name, value in result.items()))
        runner.visualizer.add_scalars(
            dict(result, epoch=runner.epoch + 1, iter=runner.iter), step=runner.iter)

    def evaluate(self, model):
        """Top-1 accuracies of one model in percent, equal in every process."""
        bank, bank_labels = self._features(model, self.bank)
        queries, labels = self._features(model, self.queries)
        num_classes = int(max(bank_labels.max(), labels.max())) + 1
        scores = dict(
            knn=knn_scores(bank, bank_labels, queries, num_classes, k=self.k),
            linear=linear_scores(bank, bank_labels, queries, num_classes))
        return {f'{name}_top1': 100 * (score.argmax(dim=1) == labels).float().mean().item()
                for name, score in scores.items()}

    def _features(self, model, dataloader):
        """Features and labels of a data set, in its order, from all processes."""
        # process r of P has images r, r + P, ..., padded with the first images
        return [torch.stack(all_gather(part), dim=1).flatten(0, 1)[:len(dataloader.dataset)]
                for part in extract_features(model, dataloader, self.feature, self.block)]
