"""What each of two processes does for test_fsdp.py; the main one writes report.json."""
import json
import sys
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO

from mmengine import dist
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS

from nepa_mm.engine.fsdp_runner import FSDPRunner, is_shard
from nepa_mm.engine.hooks.non_finite_guard import NonFiniteGuardHook
from tests.tiny_runs import options, run_train

CONFIG, *SHARDED = sys.argv[1:]


@HOOKS.register_module()
class PoisonHook(Hook):
    """Not a number in the images of one process, once; takes the place of NEPAMonitorHook."""

    def __init__(self, interval):
        pass

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2 and dist.get_rank() == 1:
            data_batch['inputs'] = data_batch['inputs'].float() * float('nan')


def run(name, *args):
    print(f'--- {name}', flush=True)
    return run_train([CONFIG, '--launcher', 'pytorch', '--work-dir', name,
                      *options(f'experiment_name={name}', *args)])


def error_of(name, *args):
    """How a run ends that cannot be."""
    text = StringIO()
    try:
        with redirect_stderr(text):
            run(name, *SHARDED, *args)
    except ValueError as error:
        return str(error)
    except SystemExit:      # in one sentence, from the building of the Runner
        return text.getvalue()


def hook_of(runner, kind):
    return next(hook for hook in runner.hooks if isinstance(hook, kind))


def share(tensors):
    """Which share of the numbers this process holds, all of them being slices."""
    tensors = list(tensors)
    assert all(map(is_shard, tensors))
    return sum(t.to_local().numel() for t in tensors) / sum(t.numel() for t in tensors)


plain, sharded = run('plain'), run('sharded', *SHARDED)
assert isinstance(sharded, FSDPRunner)
optimizer = sharded.optim_wrapper.optimizer
shares = dict(
    weights=share(sharded.model.parameters()),
    average=share(hook_of(sharded, EMAHook).ema_model.parameters()),
    first_moment=share(state['exp_avg'] for state in optimizer.state.values()))
report = dict(
    shares=dist.all_gather_object(shares),
    norms=[list(hook_of(runner, NonFiniteGuardHook).norms) for runner in (plain, sharded)],
    logged=[runner.message_hub.get_scalar('train/grad_norm').data[0].tolist()
            for runner in (plain, sharded)])

run('resumed', *SHARDED)    # test_fsdp.py started it
poisoned = run('poisoned', *SHARDED, 'custom_hooks.1.type=PoisonHook',
               'default_hooks.guard.max_skipped=1')
report.update(
    skipped=dist.all_gather_object(hook_of(poisoned, NonFiniteGuardHook).skipped),
    finite=all(dist.all_gather_object(
        all(bool(p.to_local().isfinite().all()) for p in poisoned.model.parameters()))),
    errors=dict(
        wrapper=error_of('e1', 'model_wrapper_cfg.type=MMDistributedDataParallel'),
        average=error_of('e2', 'custom_hooks.0.begin_iter=3'),
        probe=error_of('e3', 'custom_hooks.1.type=OnlineProbeHook',
                       'custom_hooks.1.bank_dataloader=a', 'custom_hooks.1.query_dataloader=b')),
    kinds=Counter(type(module).__name__ for module in sharded.model.modules()))
if dist.is_main_process():
    with open('report.json', 'w') as file:
        json.dump(report, file)
