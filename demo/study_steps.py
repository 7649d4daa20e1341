"""The steps of study.py: pretraining, frozen features, fine-tuning, probes."""
import contextlib
import io
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from common import train, train_on_few_labels
from nepa_mm.apis import load_config
from nepa_mm.checkpoints.loading import load_pretrained
from nepa_mm.engine.hooks import NEPAMonitorHook
from nepa_mm.evaluation.frozen_features import evaluating, knn_scores, linear_scores
from nepa_mm.utils.files import atomic_write
from pictures import plot_predictions, plot_segmentation

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'fashion_mnist'
MONITORS = ('next_cosine', 'copy_cosine', 'lift', 'embedding_std', 'embedding_rank',
            'output_rank')
BACKBONE = 'model.backbone.'
HELD_OUT = 3            # one of 3 images of the bank chooses learning rates and blocks
TUNING_SEED = 1000


@dataclass(frozen=True)
class Size:
    """How much to run.

    Args:
        images (int): Training images of pretraining.
        bank (int): Training images for frozen features.
        test (int): Test images.
        epochs (int): Epochs of the main pretrainings; rows have a multiple of it.
        seeds (tuple[int, int]): Runs of rows with probes, and of other rows.
        labels (dict[int, int]): Epochs of fine-tuning by number of labels.
        few (int): Number of labels of ablations, tuning and the choice of blocks.
        lrs (dict[str, tuple]): Learning rates to choose from by config of pretraining.
        finetune_lrs (tuple[tuple]): Learning rates and layer decays of fine-tuning likewise.
        rows (tuple[str], optional): Rows to run. Defaults to None: all.
        scenes (tuple[int]): Numbers of labelled scenes for segmentation, the largest last. Defaults
            to (10, 30, 100).
        iters (int, optional): Iterations of segmentation. Defaults to None: those of the config.
    """

    images: int
    bank: int
    test: int
    epochs: int
    seeds: tuple
    labels: dict
    few: int = 1000
    lrs: dict = field(default_factory=dict)
    finetune_lrs: tuple = ()
    rows: tuple | None = None
    scenes: tuple = (10, 30, 100)
    iters: int | None = None


@dataclass(frozen=True)
class Row:
    """One way to obtain weights, and how they are evaluated.

    Args:
        pretrain (str, optional): The config. Defaults to None: random start.
        options (dict): Changes to it; those of the network hold for fine-tuning, too.
        epochs (float): Length as a multiple of the study's. Defaults to 0.25.
        finetune (str, optional): The config. Defaults to 'finetune'. None scores raw pixels.
        labels (str): 'all' numbers of labels, or 'few'. Defaults to 'few'.
        attention (tuple[str]): Attention of fine-tuning; with very many labels the first only.
            Defaults to ('bidirectional',).
        trainable (bool): Whether to fine-tune with a trainable patch embedding, too.
        probe (bool): Whether to train attentive probes and segment scenes. Defaults to False.
    """

    pretrain: str | None = 'pretrain'
    options: dict = field(default_factory=dict)
    epochs: float = 0.25
    finetune: str | None = 'finetune'
    labels: str = 'few'
    attention: tuple = ('bidirectional',)
    trainable: bool = False
    probe: bool = False

    @property
    def recipe(self):
        """Rows with the same recipe share their learning rates."""
        return f'{self.finetune}, {self.pretrain and "pretrained" or "random"}'


def network_options(row):
    """Options of a row that change the network."""
    return {key: value for key, value in row.options.items() if key.startswith(BACKBONE)}


def record(path, function, *args):
    """Return the record of a step, from its file or by running the step."""
    if path.exists():
        return json.loads(path.read_text())
    begin = time.time()
    with contextlib.redirect_stdout(io.StringIO()):     # logs go to files
        result = function(*args)
    result['seconds'] = round(time.time() - begin, 1)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result))
    return result


@dataclass(frozen=True)
class Study:
    """The steps of one study.

    Args:
        work_dir (Path): Where records, logs and checkpoints go.
        data (Path): Folder of the images.
        size (Size): How much to run.
    """

    work_dir: Path
    data: Path
    size: Size

    def require_same_size(self):
        """Record the size; raise ValueError if the folder holds a study of another size."""
        path, size = self.work_dir / 'size.json', json.loads(json.dumps(asdict(self.size)))
        old = json.loads(path.read_text()) if path.exists() else size
        if old != size:
            changed = ', '.join(f'{key}={old.get(key)}' for key in size
                                if size[key] != old.get(key))
            raise ValueError(f'{self.work_dir} holds a study with {changed}; choose another '
                             '--work-dir or remove the folder.')
        with atomic_write(path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(size))

    def run(self, name, row, seed):
        """Run all steps of a row that are missing, with the chosen learning rates."""
        folder = self.work_dir / 'runs' / f'{name.replace(",", "").replace(" ", "-")}_{seed}'
        checkpoint = self.pretrain(row, folder, seed, self.chosen(row.pretrain))
        blocks = record(folder / 'blocks.json', self.blocks, row, checkpoint, seed)
        few = self.size.few
        labels = self.size.labels if row.labels == 'all' else [few] if row.finetune else []
        for count in labels:
            for attention in row.attention[:1 + (count < self.size.bank)]:
                record(folder / f'finetune_{attention}_{count}.json', self.finetune, row, folder,
                       seed, checkpoint, count, attention == 'causal')
        if row.trainable:
            record(folder / f'finetune_trainable_{few}.json', self.finetune, row, folder, seed,
                   checkpoint, few, False, True)
        if row.probe:
            held_out = blocks['held_out']
            best = int(np.argmax(held_out))
            record(folder / 'attentive.json', self.probe, folder, seed, checkpoint, best)
            *_, most = self.size.scenes
            frozen = {'block': best}
            tuned = {'block': len(held_out) - 1, 'causal': False, 'lr': 2e-3,
                     'frozen_stages': 0 if checkpoint else -1}
            for kind, count, config, settings in (
                    ('frozen', most, 'segment_linear', frozen), ('upernet', most, 'upernet', {}),
                    *(('tuned', count, 'segment_linear', tuned) for count in self.size.scenes)):
                name = f'segment_{kind}_{count}'
                record(folder / f'{name}.json', self.segment, config, folder / name, seed,
                       checkpoint, count, settings)

    def epochs(self, row):
        return max(round(row.epochs * self.size.epochs), 1)

    def pretrain(self, row, folder, seed, lr):
        """Pretrain unless it is done; return the checkpoint, or None for a random start."""
        if row.pretrain is None:
            return None
        epochs = self.epochs(row)
        record(folder / 'pretrain.json', self._pretrain, row, folder, seed, epochs, lr)
        return folder / 'pretrain' / f'epoch_{epochs}.pth'

    def _pretrain(self, row, folder, seed, epochs, lr):
        runner = train(CONFIGS / f'fashion_{row.pretrain}.py', folder / 'pretrain', {
            'train_cfg.max_epochs': epochs, 'param_scheduler.end': epochs,
            'default_hooks.checkpoint.interval': max(epochs // 5, 1), 'randomness.seed': seed,
            'train_dataloader.dataset.data_root': str(self.data),
            'train_dataloader.dataset.indices': self.size.images,
            **({'optim_wrapper.optimizer.lr': lr} if lr else {}), **row.options}, resume=True)
        scalars = runner.message_hub.log_scalars
        losses = np.asarray(scalars['train/loss'].data[0])
        result = dict(
            epochs=epochs, images=self.size.images, lr=runner.cfg.optim_wrapper.optimizer.lr,
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU',
            torch=torch.__version__,
            loss=[float(part.mean()) for part in np.array_split(losses, min(100, len(losses)))])
        for hook in runner.hooks:
            if isinstance(hook, NEPAMonitorHook):
                result['warned'] = sorted(hook.warned)
                result['monitors'] = {
                    key.removeprefix('train/'): [float(value) for value in buffer.data[0]]
                    for key, buffer in scalars.items() if key.endswith(MONITORS)}
        return result

    def blocks(self, row, checkpoint, seed, test=True):
        """Score the mean over the patches behind every block, without training the network.

        Returns:
            dict: ``held_out`` (linear probe with few labels on held-out training images); on the
            test images ``linear_1000`` and so on, and ``knn``. One accuracy in percent for each
            block.
        """
        model = self.network(row, checkpoint, seed) if row.finetune else None
        bank, labels = self.features(model, 'train', self.size.bank)
        first = len(labels) - len(labels) // HELD_OUT
        order = np.random.default_rng(seed).permutation(first)
        result = {}

        def score(name, function, chosen, queries, truth):
            result[name] = [
                100 * (function(x[chosen], labels[chosen], queries[i], 10).argmax(1) == truth)
                .float().mean().item() for i, x in enumerate(bank)]

        score('held_out', linear_scores, order[:self.size.few], [x[first:] for x in bank],
              labels[first:])
        if test:
            queries, targets = self.features(model, 'test', self.size.test)
            for count in self.size.labels:
                if count <= first:
                    score(f'linear_{count}', linear_scores, order[:count], queries, targets)
            score('knn', knn_scores, order, queries, targets)
        return result

    def network(self, row, checkpoint, seed):
        """A network that returns the mean over the patches behind every block."""
        config = 'pretrain_mae' if row.finetune == 'finetune_mae' else 'pretrain'
        cfg = load_config(CONFIGS / f'fashion_{config}.py', network_options(row))
        backbone = cfg.model.backbone
        if backbone.type == 'MAEViT':
            backbone.pop('mask_ratio')
            backbone.type = 'VisionTransformer'
        backbone.update(out_type='avg_featmap', out_indices=list(range(backbone.arch.num_layers)))
        init_default_scope('mmpretrain')
        torch.manual_seed(seed)
        model = MODELS.build(dict(type='ImageClassifier', backbone=backbone, data_preprocessor=dict(
            mean=[127.5], std=[127.5], to_rgb=False))).to(get_device())
        model.init_weights()
        if checkpoint:
            load_pretrained(model.backbone, checkpoint, 'backbone.')
        return model

    def loader(self, split, count):
        """The first images of a split, in batches of 500."""
        dataset = dict(type='FashionMNISTSubset', data_root=str(self.data), split=split,
                       indices=count, pipeline=[dict(type='PackInputs')])
        return Runner.build_dataloader(dict(
            batch_size=500, dataset=dataset, collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=False)))

    def features(self, model, split, count):
        """Features (blocks, images, D) and labels of the first images of a split."""
        found, labels = [], []
        with evaluating(model) if model else contextlib.nullcontext(), torch.no_grad():
            for batch in self.loader(split, count):
                if model is None:
                    found.append(batch['inputs'].flatten(1).float()[None].to(get_device()))
                else:
                    images = model.data_preprocessor(batch)['inputs']
                    found.append(torch.stack([x.float() for x in model.backbone(images)]))
                labels += [sample.gt_label for sample in batch['data_samples']]
        return torch.cat(found, 1), torch.cat(labels).to(found[0].device)

    def draw(self, row, num=8):
        """Draw what the networks of seed 0 expect next on test images, and how they segment."""
        runs, (*_, most) = self.work_dir / 'runs', self.size.scenes
        checkpoint = self.pretrain(row, runs / 'NEPA_0', 0, self.chosen(row.pretrain))
        cfg = load_config(CONFIGS / 'fashion_pretrain.py', {f'{BACKBONE}init_cfg': dict(
            type='Pretrained', checkpoint=str(checkpoint), prefix='backbone.')})
        init_default_scope('mmpretrain')
        model = MODELS.build(cfg.model).eval()
        MMLogger.get_current_instance().setLevel('WARNING')
        model.init_weights()
        bank, images = (next(iter(self.loader(split, count))) for split, count in (
            ('train', 500), ('test', num)))
        bank, images = (model.data_preprocessor(batch)['inputs'] for batch in (bank, images))
        plot_predictions(model, bank, images, 'clothes', self.work_dir / 'study_prediction.png')
        plot_segmentation(self.work_dir / 'scenes', {
            'prediction,\nwith pretraining': runs / f'NEPA_0/segment_tuned_{most}',
            'prediction,\nwithout': runs / f'random-start_0/segment_tuned_{most}'},
            f'Linear head, fine-tuned on {most} scenes of clothes',
            self.work_dir / 'study_scenes.png')

    def finetune(self, row, folder, seed, checkpoint, labels, causal=False, trainable=False,
                 chosen=None):
        """Fine-tune; return top-1 on the test images in percent.

        With ``chosen``, a pair of learning rate and layer decay, the result is that on held-out
        training images.
        """
        options = network_options(row)
        if chosen:
            options |= {'train_dataloader.dataset.num_labels': None,
                        'train_dataloader.dataset.indices': labels,
                        'val_dataloader.dataset.split': 'train',
                        'val_dataloader.dataset.indices': -(self.size.bank // HELD_OUT)}
        if row.finetune == 'finetune':
            options[f'{BACKBONE}causal'] = causal
            if trainable or not checkpoint:
                options[f'{BACKBONE}frozen_stages'] = -1
        if f'{BACKBONE}arch.embed_dims' in options:
            options['model.head.in_channels'] = options[f'{BACKBONE}arch.embed_dims']
        lr, decay = chosen or self.chosen(row.recipe) or (None, None)
        if lr:
            options |= {'optim_wrapper.optimizer.lr': lr, 'optim_wrapper.paramwise_cfg': dict(
                layer_decay_rate=decay, head_lr=lr)}
        name = f'finetune_{labels}{"_causal" * causal}{"_trainable" * trainable}'
        return self.classify(row.finetune, folder / name, labels, self.size.labels[labels], seed,
                             checkpoint, options)

    def probe(self, folder, seed, checkpoint, block):
        """Train an attentive probe on a frozen network."""
        labels = max(count for count in self.size.labels if count < self.size.bank)
        epochs = 3 * self.size.labels[labels]       # as long as fine-tuning takes, about
        return self.classify('attentive', folder / 'attentive', labels, epochs, seed, checkpoint, {
            f'{BACKBONE}out_indices': block})

    def segment(self, config, folder, seed, checkpoint, scenes, settings):
        """Train a segmentor on the first scenes; return mIoU on the validation scenes."""
        settings = dict(settings, pretrained=checkpoint and str(checkpoint), num_scenes=scenes)
        if self.size.iters:
            settings['iters'] = self.size.iters
        runner = train(CONFIGS / f'fashion_{config}.py', folder, {
            'randomness.seed': seed, **settings,
            **{f'{split}_dataloader.dataset.data_root': str(self.work_dir / 'scenes')
               for split in ('train', 'val')}})
        return dict(miou=runner.message_hub.get_scalar('val/mIoU').current())

    def classify(self, config, folder, labels, epochs, seed, checkpoint, options):
        return dict(top1=train_on_few_labels(
            CONFIGS / f'fashion_{config}.py', folder, labels, epochs, seed, checkpoint, {
                'train_dataloader.dataset.data_root': str(self.data),
                'val_dataloader.dataset.data_root': str(self.data),
                'val_dataloader.dataset.indices': self.size.test, **options}))

    def chosen(self, recipe):
        """The chosen learning rate of a recipe, or None: that of the config."""
        path = self.work_dir / 'chosen.json'
        return json.loads(path.read_text()).get(recipe) if path.exists() else None

    def try_lr(self, name, row, lr):
        """Score a learning rate of pretraining on held-out training images."""
        folder = self.work_dir / 'tuning' / f'{name}_{lr:g}'
        checkpoint = self.pretrain(replace(row, epochs=0.25), folder, TUNING_SEED, lr)
        return max(record(folder / 'blocks.json', self.blocks, row, checkpoint, TUNING_SEED,
                          False)['held_out'])

    def try_finetuning(self, name, row, chosen):
        """Score a learning rate and layer decay of fine-tuning likewise."""
        lr, decay = chosen
        folder = self.work_dir / 'tuning' / f'finetune_{name}_{lr:g}_{decay:g}'
        best = self.work_dir / 'tuning' / f'{name}_{self.chosen(row.pretrain) or 0:g}'
        checkpoint = self.pretrain(replace(row, epochs=0.25), best, TUNING_SEED, None)
        return record(folder / 'finetune.json', self.finetune, row, folder, TUNING_SEED,
                      checkpoint, self.size.few, False, False, chosen)['top1']
