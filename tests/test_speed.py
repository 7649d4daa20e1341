"""What makes training fast leaves its numbers alone: compiled blocks, fused AdamW, the log."""
import copy
import itertools
import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine import dist
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch import distributed
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from nepa_mm.engine.hooks import ModelEMAHook
from nepa_mm.engine.hooks.deferred_runtime_info import DeferredHistory
from nepa_mm.models import compilation
from nepa_mm.models.vit import NEPAViT

from .conftest import REPO, TINY, Copies, smooth_images
from .tiny_runs import options, run_script, save_image, save_pretraining

RUNS = itertools.count()
CONFIGS = [str(path.relative_to(REPO / 'configs')) for path in sorted(
    (REPO / 'configs').rglob('*.py')) if '_base_' not in path.parts]


def nepa(**options):
    torch.manual_seed(0)
    return MODELS.build(dict(type='NEPA', head=dict(type='NEPAHead'), backbone=dict(
        type='NEPAViT', arch=TINY, layer_scale_init_value=0.5, rope_rescale=None, **options)))


# Compiled blocks

@pytest.fixture
def graphs():
    """Counts what is compiled, and forgets it afterwards."""
    torch._dynamo.reset()
    counters.clear()
    compilation.compiled.cache_clear()
    yield counters['stats']
    compilation.compiled.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def traced(graphs, monkeypatch):
    """Compile without generating code, which takes no time; collects the inputs of each graph."""
    inputs_of_graphs = []

    def backend(graph, inputs):
        inputs_of_graphs.append(inputs)
        return graph
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=backend))
    return inputs_of_graphs


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a compiler')
def test_compiled_blocks_compute_the_same(graphs):
    eager, compiled = nepa(), nepa(compile_blocks=True)
    assert list(eager.state_dict()) == list(compiled.state_dict())
    images = smooth_images(2, size=56)
    for model in (eager, compiled):
        model.loss(images)['loss'].backward()
    assert graphs['unique_graphs'] == 2     # one for all three blocks, one for the loss
    for (name, ours), theirs in zip(compiled.named_parameters(), eager.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    average = copy.deepcopy(compiled)       # as EMA does
    with torch.no_grad():
        torch.testing.assert_close(average.loss(images), eager.loss(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('with_cp', [False, True])
def test_twelve_drop_path_rates_share_two_graphs(traced, with_cp):
    """The first block, which drops nothing, has its own; more than 8 would not be compiled."""
    model = NEPAViT(arch=TINY | dict(num_layers=12), drop_path_rate=0.3, with_cp=with_cp,
                    compile_blocks=True, layer_scale_init_value=0.5)
    model(torch.randn(4, 3, 28, 28))[0].sum().backward()
    assert len(traced) == 2
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    model(torch.randn(4, 3, 28, 28))
    assert len(traced) == 2     # evaluation is not compiled: hooks work there


def test_compiled_blocks_under_data_parallel(traced):
    """Gradients arrive as without compilation: blocks larger than a bucket, drop path."""
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    try:
        grads = []
        for compiled in (False, True):
            torch.manual_seed(0)
            model = NEPAViT(arch=dict(embed_dims=256, num_layers=3, num_heads=4,
                                      feedforward_channels=1024), drop_path_rate=0.3,
                            layer_scale_init_value=0.5, compile_blocks=compiled)
            parallel = DistributedDataParallel(model, bucket_cap_mb=1)
            torch.manual_seed(1)
            parallel(smooth_images(2, size=28))[0].select(1, 1).sum(dim=0)[0].backward()
            grads.append({name: p.grad for name, p in model.named_parameters()})
    finally:
        distributed.destroy_process_group()
    assert len(traced) == 2     # without and with drop path, none cut at a bucket
    assert sum(grad.abs().sum() for grad in grads[0].values()) > 1
    torch.testing.assert_close(*grads)


def test_a_short_batch_leaves_the_graph_of_full_batches_alone(traced):
    """A graph with symbolic sizes is slower and would serve full batches from then on."""
    model = NEPAViT(arch=TINY, compile_blocks=True)
    for batch in (4, 4, 3, 4, 3):
        model(torch.randn(batch, 3, 28, 28))
    assert len(traced) == 2
    for inputs in traced:       # a symbolic size would be an input, too
        assert all(isinstance(x, torch.Tensor) for x in inputs)


def test_a_machine_that_cannot_compile_says_so_once(monkeypatch, capfd):
    """The CPU does not compile by default, without a word."""
    assert not NEPAViT(arch=TINY).compiles(torch.zeros(1))
    compilation.can_compile.cache_clear()
    monkeypatch.setenv('PATH', '/nowhere')
    monkeypatch.delenv('CC', raising=False)
    MMLogger.get_instance('cannot compile')
    assert not compilation.can_compile() and not compilation.can_compile()
    assert capfd.readouterr().out.count('without torch.compile') == 1
    compilation.can_compile.cache_clear()


@pytest.mark.parametrize('variables, workers', [
    (dict(), 32), (dict(LOCAL_WORLD_SIZE='8'), 4), (dict(LOCAL_WORLD_SIZE='64'), 1),
    (dict(OMPI_COMM_WORLD_LOCAL_SIZE='4'), 8), (dict(SLURM_CPUS_PER_TASK='14'), 14),
    (dict(LOCAL_WORLD_SIZE='8', SLURM_CPUS_PER_TASK='128'), 4),
    (dict(LOCAL_WORLD_SIZE='8', TORCHINDUCTOR_COMPILE_THREADS='20'), 20)])
def test_processes_of_a_machine_share_the_compile_workers(traced, monkeypatch, variables, workers):
    """torch alone starts 32 for each of them, on a machine of 64 cores."""
    monkeypatch.setattr(os, 'environ', {
        name: value for name, value in dict(os.environ, **variables).items()
        if name in variables or 'SIZE' not in name and 'SLURM' not in name})
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(64))
    with inductor_config.patch(compile_threads=inductor_config.decide_compile_threads()):
        nepa(compile_blocks=True).loss(smooth_images(2, size=28))
        assert inductor_config.compile_threads == workers


def test_compiled_run_saves_and_resumes_like_an_eager_one(traced, tmp_path):
    """Names, averaged and raw weights; an eager run may go on from a compiled one."""
    for compiled in (False, True):
        run(tmp_path / str(compiled), epochs=1, model=nepa(compile_blocks=compiled))
    assert traced
    eager, compiled = (torch.load(tmp_path / name / 'epoch_1.pth', weights_only=False)
                       for name in ('False', 'True'))
    for key in ('state_dict', 'ema_state_dict'):
        # AdamW makes a step of 1e-2 of the tiniest gradient, hence something of its rounding
        torch.testing.assert_close(eager[key], compiled[key], rtol=1e-4, atol=1e-4)
    assert run(tmp_path / 'True', epochs=2, resume=True).iter == 24


def test_drop_path_drops_images_at_its_rate():
    drop_path = NEPAViT(arch=TINY, drop_path_rate=0.25).layers[-1].drop_path.train()
    torch.manual_seed(0)
    out = drop_path(torch.ones(4000, 2, 3))
    kept = out[:, 0, 0] != 0
    assert torch.equal(out, kept[:, None, None] * torch.full((4000, 2, 3), 1 / 0.75))
    assert abs(kept.float().mean() - 0.75) < 0.03


# Fused AdamW

def optimizer_of(model, fused):
    return build_optim_wrapper(model, ConfigDict(
        type='BF16OptimWrapper', constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05, fused=fused),
        clip_grad=dict(max_norm=1.)))


def test_fused_adamw_takes_the_same_steps():
    weights = []
    for fused in (False, True):
        model = nepa()
        wrapper = optimizer_of(model, fused)
        assert wrapper.optimizer.defaults['fused'] is fused
        for images in smooth_images(10, size=28).split(2):
            wrapper.update_params(model.loss(images)['loss'])
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize('path', CONFIGS)
def test_every_recipe_fuses_adamw(path):
    """Without it the guard reads the gradient norm before each step."""
    optimizer = Config.fromfile(REPO / 'configs' / path).optim_wrapper.optimizer
    assert optimizer.get('fused') or optimizer.type == 'LARS'


@pytest.mark.parametrize('path', CONFIGS)
def test_every_recipe_stops_its_workers(path):
    """See test_runs_stop_their_workers."""
    hooks = Config.fromfile(REPO / 'configs' / path).default_hooks
    assert hooks.workers.type == 'StopWorkersHook'


def test_fused_adamw_is_left_out_where_torch_has_none(monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.1.2')
    assert optimizer_of(nepa(), True).optimizer.defaults['fused'] is None


# Images on their way to the network

@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_preprocessor_equals_mmpretrains_bitwise(dtype):
    images, labels = torch.randint(256, (2, 3, 28, 42)).to(dtype), [object(), object()]
    before = images.clone()
    ours, theirs = (MODELS.build(dict(
        type=name, mean=[123.675, 116.28, 103.53], std=[58.4, 57.1, 57.4], to_rgb=True))(
            dict(inputs=images, data_samples=labels if ours else [])) for name, ours in (
                ('NEPADataPreprocessor', True), ('SelfSupDataPreprocessor', False)))
    assert torch.equal(ours['inputs'], theirs['inputs']) and ours['inputs'].dtype == torch.float32
    assert torch.equal(images, before) and ours['data_samples'] is labels


def labelled(kind, labels, **options):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    samples = [DataSample().set_gt_label(label) for label in labels]
    prepare = MODELS.build(dict(type=kind, mean=[123.675, 116.28, 103.53], num_classes=9,
                                std=[58.4, 57.1, 57.4], to_rgb=True, **options))
    return prepare, dict(inputs=torch.randint(256, (4, 3, 28, 42), dtype=torch.uint8),
                         data_samples=samples)


@pytest.mark.parametrize('labels', [[3, 8, 0, 3], [[3], [8, 1], [0], [3, 4, 5]]])
@pytest.mark.parametrize('options', [
    dict(), dict(to_onehot=True), dict(batch_augments=dict(augments=dict(type='Mixup', alpha=1.))),
    dict(batch_augments=dict(augments=dict(type='TimmBatchAugment')))])
def test_classifiers_preprocessor_equals_mmpretrains_bitwise(labels, options):
    ours, theirs = ([out['inputs'], *((sample.gt_label, sample.get('gt_score'))
                                      for sample in out['data_samples'])] for out in (
        prepare(data, training=True) for prepare, data in (
            labelled(kind, labels, **copy.deepcopy(options))
            for kind in ('NEPAClsDataPreprocessor', 'ClsDataPreprocessor'))))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


CLASSIFIERS = [path for path in CONFIGS if 'classification' in path or path.startswith(
    ('custom/finetune', 'custom/linear', 'demo/digits_finetune', 'demo/digits_linear'))]


@pytest.mark.parametrize('path', CLASSIFIERS)
def test_fine_tuning_copies_images_and_labels_once_without_waiting(path):
    """With the meta device for a GPU."""
    cfg = Config.fromfile(REPO / 'configs' / path).model
    assert cfg.type == 'ImageClassifier'
    cfg.backbone = dict(type='NEPAViT', arch=TINY)
    prepare = MODELS.build(cfg).data_preprocessor.to('meta')
    data = labelled('ClsDataPreprocessor', [3, 8, 0, 3])[1]
    with Copies() as copies:
        prepare(data, training=True)
    assert copies.waits == [False, False]


# The log

class ReadCounter(TorchDispatchMode):
    """Counts how often the host reads from a tensor, inside torch and by calls from Python.

    Apart are those of tensors that were there before the iteration: on a GPU their values may
    have arrived long ago.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.on_host = Calls(self), set()
        self.reset()

    def reset(self):
        self.reads, self.late, self.fresh = 0, 0, []

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.calls.__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += args[0].data_ptr() not in self.on_host
        return func(*args, **kwargs or {})


class Calls(TorchFunctionMode):
    """The second half of ReadCounter: tolist() of a tensor on the CPU reaches no kernel."""

    def __init__(self, counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func is torch.Tensor.tolist:
            fresh = any(args[0] is tensor for tensor in self.counter.fresh)
            self.counter.reads += fresh
            self.counter.late += not fresh
        elif torch.is_tensor(result):
            self.counter.fresh.append(result)
        return result


def run(work_dir, info='DeferredRuntimeInfoHook', epochs=2, hooks=(), resume=False,
        info_options=None, model=None, fused=True, **options):
    """Train on 12 iterations an epoch; the log has a line every 4."""
    torch.manual_seed(0)
    runner = Runner(
        model or nepa(), str(work_dir), experiment_name=f'speed_{next(RUNS)}', resume=resume,
        train_dataloader=DataLoader(
            [dict(inputs=image, data_samples=0) for image in smooth_images(24, size=28)], 2),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(type='BF16OptimWrapper', clip_grad=dict(max_norm=1.),
                           optimizer=dict(type='AdamW', lr=1e-2, fused=fused)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=4),
                           runtime_info=dict(type=info, **info_options or {})),
        custom_hooks=[dict(type='ModelEMAHook'), dict(type='NEPAMonitorHook', interval=4), *hooks],
        default_scope='mmpretrain', randomness=dict(seed=0), **options)
    runner.train()
    return runner


def printed(work_dir):
    """The logged values, but for times, of all calls of the Runner."""
    lines = [json.loads(line) for path in sorted(work_dir.glob('*/vis_data/scalars.json'))
             for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if 'time' not in name}
            for line in lines]


class Reads(Hook):
    """The reads of every iteration, hooks included, and those of older tensors."""

    priority = 'LOWEST'

    def __init__(self):
        self.counter, self.counts, self.late = ReadCounter(), [], []

    def before_train(self, runner):
        average, = (hook.ema_model for hook in runner.hooks if isinstance(hook, ModelEMAHook))
        self.counter.on_host.add(average.steps.data_ptr())      # never on a GPU
        self.counter.__enter__()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.counts.append(self.counter.reads)
        self.late.append(self.counter.late)
        self.counter.reset()

    def after_train(self, runner):
        self.counter.__exit__(None, None, None)


@HOOKS.register_module()
class SavedReadsHook(Reads):
    """Writes them to a file, for runs of several processes."""

    def after_train(self, runner):
        super().after_train(runner)
        Path(runner.work_dir, f'reads_{dist.get_rank()}.json').write_text(
            json.dumps(list(zip(self.counts, self.late))))


OUR_HOOKS = [dict(type='NonFiniteGuardHook'), dict(type='ExactResumeHook'),
             dict(type='UnreadableImageHook'),
             dict(type='AtomicCheckpointHook', interval=1, priority='VERY_LOW')]


@pytest.mark.parametrize('info, fused, waits', [
    ('DeferredRuntimeInfoHook', True, False),
    ('RuntimeInfoHook', True, True),        # for the loss
    ('DeferredRuntimeInfoHook', False, True)])      # for the guard
def test_no_wait_for_the_device_between_two_lines_of_the_log(tmp_path, info, fused, waits):
    """But for the guard's look at the update before."""
    reads = Reads()
    run(tmp_path, info, fused=fused, hooks=[*OUR_HOOKS, reads])
    # In the first iteration every history starts; it is replaced after the second. The first one
    # of an epoch comes after saving, and the data loader draws a seed.
    between = [(n, late) for i, (n, late) in enumerate(zip(reads.counts, reads.late))
               if i > 1 and i % 12 and (i + 1) % 4]
    assert len(between) == 15
    assert all(n for n, _ in between) if waits else set(between) == {(0, 1)}


@pytest.mark.parametrize('guarded', [True, False])
def test_two_processes_do_not_wait_either(folder, guarded):
    """They agree about SIGTERM in every update, and read the answer one update later."""
    cfg = Config.fromfile(save_pretraining())
    for index in range(4, 32):
        save_image(Path(f'data/imagenet/train/n00000000/{index}.JPEG'))
    cfg.custom_imports = dict(imports=['nepa_mm', 'tests.test_speed'])
    cfg.optim_wrapper = dict(type='BF16OptimWrapper', clip_grad=dict(max_norm=1.),
                             optimizer=dict(type='AdamW', lr=1e-3, fused=True))
    cfg.default_hooks = dict(logger=dict(type='LoggerHook', interval=100),
                             runtime_info=dict(type='DeferredRuntimeInfoHook'))
    cfg.custom_hooks = [dict(type='ModelEMAHook', momentum=0.5), *OUR_HOOKS[not guarded:],
                        dict(type='SavedReadsHook')]
    cfg.dump('reads.py')
    code, output = run_script('dist_train.sh', Path('reads.py').absolute(), 2, '--work-dir', 'two',
                              *options('train_dataloader.batch_size=1'), cwd=folder)
    assert code == 0, output
    for rank in (0, 1):
        reads = json.loads(Path(f'two/reads_{rank}.json').read_text())
        assert len(reads) == 16
        assert all(read == [0, 1] for read in reads[2:-1]), reads


def test_what_is_printed_and_saved_is_the_same(tmp_path):
    deferred, stock = run(tmp_path / 'deferred'), run(tmp_path / 'stock', 'RuntimeInfoHook')
    assert printed(tmp_path / 'deferred') == printed(tmp_path / 'stock')
    assert {'loss', 'grad_norm', 'lift'} <= set(printed(tmp_path / 'deferred')[-1])
    for name, history in stock.message_hub.log_scalars.items():
        if 'time' not in name:
            ours = deferred.message_hub.get_scalar(name)
            assert isinstance(ours, DeferredHistory)
            assert np.array_equal(ours.data, history.data)
    saved = torch.load(tmp_path / 'deferred/epoch_2.pth', weights_only=False)['message_hub']
    assert {type(history) for history in saved['log_scalars'].values()} == {HistoryBuffer}


def test_resumed_run_logs_what_a_straight_one_does(tmp_path):
    run(tmp_path / 'straight')
    run(tmp_path / 'resumed', epochs=1)
    run(tmp_path / 'resumed', resume=True)
    assert printed(tmp_path / 'resumed') == printed(tmp_path / 'straight')


class Old(Hook):
    """Makes a run look as if it had done 500,000 iterations."""

    priority = 'HIGHEST'

    def before_train(self, runner):
        for name in ('loss', 'time', 'data_time', 'lr', 'grad_norm'):
            runner.message_hub.log_scalars[f'train/{name}'] = HistoryBuffer(
                np.full(500_000, 7.), np.ones(500_000))


def test_history_stays_bounded_late_in_a_run(tmp_path):
    old, new = (run(tmp_path / name, info, hooks=[Old()]) for name, info in (
        ('old', 'RuntimeInfoHook'), ('new', 'DeferredRuntimeInfoHook')))
    assert printed(tmp_path / 'old') == printed(tmp_path / 'new')
    assert len(old.message_hub.get_scalar('train/loss').data[0]) == 500_024
    lengths = {len(h.data[0]) for h in new.message_hub.log_scalars.values()}
    assert max(lengths) == 10_000
    assert new.message_hub.get_scalar('train/loss').data[0][0] == 7


def test_history_reads_at_its_length():
    """Values on a device must not pile up where nobody looks."""
    history = DeferredHistory(HistoryBuffer([1.], [1]), max_length=3)
    for value in (2., torch.tensor(3.), 4.):
        history.update(value)
    assert history.new == [] and history.data[0].tolist() == [2., 3., 4.]
    assert (history.mean(2), history.min(), history.current()) == (3.5, 2., 4.)


@pytest.mark.parametrize('window', [dict(window_size=11), dict(window_size='global'),
                                    dict(window_size='epoch'), dict()])
def test_windows_longer_than_the_history_are_refused(tmp_path, window):
    processor = dict(custom_cfg=[dict(data_src='loss', method_name='mean', **window)])
    with pytest.raises(ValueError, match='log_processor has a window of .* but '):
        run(tmp_path, info_options=dict(max_length=10), log_processor=processor)
