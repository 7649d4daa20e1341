"""Measure the cost of training: step, data and framework; plan a run.

    python benchmarks/benchmark.py step --arch base --precision bf16 --batch 4 [--compile]
    python benchmarks/benchmark.py scaling --arch small
    python benchmarks/benchmark.py memory --arch large --batch 256 --precision bf16
    python benchmarks/benchmark.py train --arch tiny
    python benchmarks/benchmark.py loader --workers 8
    python benchmarks/benchmark.py plan --gpus 8 --model l --images-per-second 1000 ...

Candidates take turns in one process, so that a busy machine slows all of them equally. Figures are
medians; ratios are medians of the ratios of each turn. MFU is model FLOPs utilisation: the FLOPs
that NEPA needs (multiply-add = 2, backward = 2 x forward, visible pairs of tokens only, no
recomputation) per second, divided by the rate of a large matrix product measured between the turns.
All candidates are charged the same FLOPs.

`step` compares our model with an eager network written like the released code (nothing packed,
class token split off before the rotation, all 257 tokens, AdamW and EMA tensor by tensor), with
timm's Eva configured as NEPA, and, if installed, with stable-pretraining's NEPA and Hugging Face's
`vit_nepa`. The authors' checkout on PYTHONPATH also provides `vit_nepa`.
"""
import argparse
import os


class Parser(argparse.ArgumentParser):
    """Report a wrong command line in one sentence."""

    def error(self, message):
        """Exit without printing the usage."""
        self.exit(2, f'error: {message}.\n')


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)

    def command(name, help):
        sub = commands.add_parser(name, help=help)
        sub.add_argument('--json', metavar='FILE', help='also write the figures to this file')
        return sub

    def positive(text):
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f'{value} is not positive')
        return value

    def network(sub, arch, batch, repeats):
        sub.add_argument('--arch', choices=['tiny', 'small', 'base', 'large'], default=arch)
        sub.add_argument('--precision', choices=['fp32', 'bf16'], default='fp32')
        sub.add_argument('--batch', type=positive, default=batch, help='images per step')
        sub.add_argument('--repeats', type=positive, default=repeats, help='turns after the warmup')
        sub.add_argument('--compile', action='store_true', help='compile our blocks')
        return sub

    network(command('step', 'forward, loss, backward, optimizer, EMA'), 'base', 4, 5)
    network(command('scaling', 'time per FLOP over tokens, batch and depth'),
            'small', 2, 3).add_argument(
        '--batches', type=positive, nargs='+', default=[1, 16, 256],
        help='batch sizes to try; --batch applies to the other points')
    network(command('memory', 'memory of a step, with and without recomputation'),
            'large', 256, 1).add_argument(
        '--gpus', type=positive, default=1, help='GPUs that share the state, as with '
            'FSDPRunner')
    sub = command('train', 'the Runner compared with a bare loop')
    network(sub, 'tiny', 8, 3)
    sub.add_argument('--iterations', type=positive, default=100, help='iterations per turn')
    sub = command('loader', 'images per second of the data pipeline')
    sub.add_argument('--images', type=positive, default=200, help='JPEGs to generate')
    sub.add_argument('--workers', type=positive, default=os.cpu_count(), help='processes')
    sub.add_argument('--repeats', type=positive, default=3)
    sub = command('plan', 'hours, cost and bottleneck of a pretraining')
    sub.add_argument('--gpus', type=positive, required=True)
    sub.add_argument('--model', choices=['s', 'b', 'l'], required=True)
    sub.add_argument('--epochs', type=positive, help='default: those of the config')
    sub.add_argument('--images-per-second', type=float, help='of one GPU, as `step` measures it')
    sub.add_argument('--step-json', help='... or the file of `step --json`')
    sub.add_argument('--loader-images-per-second', type=float, help='of one CPU core')
    sub.add_argument('--loader-json', help='... or the file of `loader --json`')
    sub.add_argument('--cores', type=positive, default=8, help='CPU cores per GPU')
    sub.add_argument('--bandwidth', type=float, default=100., help='of the all-reduce, GB/s')
    sub.add_argument('--price', type=float, default=0., help='of one GPU for one hour')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import json
import resource
import statistics
import sys
import tempfile
from operator import truediv
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

import peers
import workloads
from nepa_mm import apis
from nepa_mm.datasets.resize import resize_image
from nepa_mm.engine.hooks.throughput import flops_per_image, peak_flops
from nepa_mm.utils.outputs import require_new_path

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
BASES = CONFIGS / '_base_'
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
IMAGENET = 1_281_167    # training images


# Turns

def take_turns(candidates, repeats, dtype, warmup=2):
    """Call all candidates in turn; return their durations (s) and the best matmul rate."""
    names = list(candidates)
    durations, peak = {name: [] for name in names}, 0.
    for turn in range(warmup + repeats):
        first = turn % len(names)       # rotate the order
        for name in names[first:] + names[:first]:
            result = candidates[name]()
            if turn >= warmup:
                durations[name].append(result)
        peak = max(peak, peak_flops(dtype, get_device(), repeats=2))
    return durations, peak


def warn_of_slow_bf16():
    """Warn of a CPU without bf16 instructions, on which bf16 is slower than fp32."""
    bf16, fp32 = (peak_flops(dtype, 'cpu', repeats=2) for dtype in (torch.bfloat16, torch.float32))
    if bf16 < fp32:
        print(f'Products in bf16 are {fp32 / bf16:.3g} times slower than in fp32 on this CPU '
              f'({bf16 / 1e9:.3g} and {fp32 / 1e9:.3g} GFLOP/s), for all that follows.',
              file=sys.stderr)


def environment(args, **more):
    """Return the command, the machine and more settings of a measurement."""
    gpu = get_device() == 'cuda'
    return dict(command=args.command, device=torch.cuda.get_device_name() if gpu else 'CPU',
                torch=torch.__version__, threads=torch.get_num_threads(), **more)


def report(args, env, rows):
    """Print the rows as a table, write them to ``--json``, and return them."""
    print('  '.join(f'{name} {value}' for name, value in env.items()))
    cells = [list(rows[0])] + [[f'{value:.4g}' if isinstance(value, float) else str(value)
                                for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print('  '.join(f'{cell:<{width}}' if i == 0 else f'{cell:>{width}}'
                        for i, (cell, width) in enumerate(zip(row, widths))))
    if args.json:
        Path(args.json).write_text(json.dumps(dict(env, rows=rows), indent=1) + '\n')
    return rows


# The step

def flops(model, size=224):
    """Return the FLOPs per square image of ``size`` pixels."""
    return flops_per_image(model, size, size)


def measure_memory(steps, models):
    """Wrap steps on a GPU; return them and a dict that collects their peak memory (GB).

    Other models lie on the same GPU, so the sum of a model's own state at rest (weights, AdamW, EMA
    weights) and of what its step adds is measured.
    """
    memory = {}

    def measured(name, run):
        state = 16 * sum(p.numel() for p in models[name].parameters())

        def measured_run():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = run()
            memory[name] = (state + torch.cuda.max_memory_allocated() - before) / 1e9
            return result
        return measured_run
    if get_device() == 'cuda':
        steps = {name: measured(name, run) for name, run in steps.items()}
    return steps, memory


def step(args):
    """Measure one training step per implementation."""
    images = torch.randn(args.batch, 3, 224, 224, device=get_device())
    models = peers.build_candidates(BASES, args.arch, args.compile)
    work = flops(models['nepa_mm'][0])
    steps, memory = measure_memory({
        name: peers.build_step(
            loss, peers.our_update(BASES, model) if name.startswith('nepa_mm')
            else peers.plain_update(model), images, args.precision == 'bf16')
        for name, (model, loss) in models.items()},
        {name: model for name, (model, _) in models.items()})
    durations, peak = take_turns(steps, args.repeats, DTYPES[args.precision])
    rows, ours = [], [sum(parts) for parts in durations['nepa_mm']]
    for name, times in durations.items():
        gradients, update = (statistics.median(part) for part in zip(*times))
        seconds = [sum(parts) for parts in times]
        rate = args.batch / statistics.median(seconds)
        rows.append({'implementation': name, 'gradients ms': gradients * 1e3,
                     'update ms': update * 1e3, 'images/s': rate,
                     'MFU %': 100 * rate * work / peak,
                     'speed to ours': statistics.median(map(truediv, ours, seconds)),
                     'GPU peak GB': memory.get(name, 'no GPU')})
    return report(args, environment(
        args, arch=args.arch, precision=args.precision, batch=args.batch, repeats=args.repeats,
        attention=peers.attention_kernel(models['nepa_mm'][0], DTYPES[args.precision]),
        matmul_tflops=round(peak / 1e12, 4), process_peak_gb=round(resource.getrusage(
            resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)), rows)


def scaling(args):
    """Measure forward and backward over tokens, batch and depth; time per FLOP should not rise."""
    dims = dict(peers.NEPAViT.arch_zoo[args.arch])
    points = [(size, args.batch, dims['num_layers']) for size in (112, 224, 336, 448, 560)]
    points += [(224, batch, dims['num_layers']) for batch in args.batches]
    points += [(224, args.batch, depth) for depth in (4, 24)]
    models = {depth: peers.build_nepa(BASES, arch=dict(dims, num_layers=depth),
                                      compile_blocks=args.compile)
              for depth in {depth for _, _, depth in points}}

    def candidate(size, batch, depth):
        model, images = models[depth], torch.randn(batch, 3, size, size, device=get_device())
        return peers.build_step(lambda images: model.loss(images)['loss'], model.zero_grad, images,
                                args.precision == 'bf16')
    durations, peak = take_turns({point: candidate(*point) for point in points}, args.repeats,
                                 DTYPES[args.precision], warmup=1)
    rows = []
    for (size, batch, depth), times in durations.items():
        work = batch * flops(models[depth], size)
        rows.append({'tokens': (size // 14) ** 2, 'batch': batch, 'depth': depth,
                     'ms': statistics.median(map(sum, times)) * 1e3, 'GFLOP': work / 1e9})
        rows[-1] |= {'ps/FLOP': rows[-1]['ms'] * 1e9 / work,
                     'MFU %': 100 * work / (rows[-1]['ms'] / 1e3) / peak}
    return report(args, environment(args, arch=args.arch, precision=args.precision,
                                    repeats=args.repeats), rows)


def memory(args):
    """Count the bytes of a step on small batches, and measure them on a GPU.

    Weights, gradients, AdamW's two states and the EMA weights take 20 bytes per parameter, divided
    by --gpus. Parameters gathered for the active block are not counted. Tensors saved by autograd
    are counted exactly, as a constant plus a multiple of the batch. With recomputation, the
    activations of one block are added. Short-lived tensors are not counted.
    """
    def build(**backbone):
        return peers.build_nepa(BASES, compile_blocks=args.compile, **backbone)

    def kept(model):
        """Return the bytes saved by a step without images, and per image."""
        one, two = (peers.saved_bytes(
            model, torch.randn(batch, 3, 224, 224, device=get_device()), args.precision == 'bf16')
            for batch in (1, 2))
        return 2 * one - two, two - one

    arch = dict(peers.NEPAViT.arch_zoo[args.arch])
    (_, one_block), (_, two_blocks) = (kept(build(arch=dict(arch, num_layers=n))) for n in (1, 2))
    rows = []
    for with_cp in (False, True):
        model = build(arch=arch, with_cp=with_cp)
        state = 20 * sum(p.numel() for p in model.parameters()) / args.gpus
        constant, image = kept(model)
        activations = constant + args.batch * (image + with_cp * (two_blocks - one_block))
        steps, measured = measure_memory({'step': peers.build_step(
            lambda images, model=model: model.loss(images)['loss'], peers.our_update(BASES, model),
            torch.randn(args.batch, 3, 224, 224, device=get_device()), args.precision == 'bf16')},
            dict(step=model))
        if get_device() == 'cuda' and args.gpus == 1:
            try:
                for _ in range(2):      # the first step creates the optimizer state
                    steps['step']()
            except torch.OutOfMemoryError:
                measured['step'] = 'out of memory'
        rows.append({'recomputation (with_cp)': 'on' if with_cp else 'off',
                     'state GB': state / 1e9, 'activations GB': activations / 1e9,
                     'sum GB': (state + activations) / 1e9,
                     'GPU peak GB': measured.get('step', 'no GPU' if args.gpus == 1 else '-')})
    return report(args, environment(args, arch=args.arch, precision=args.precision,
                                    batch=args.batch, gpus=args.gpus), rows)


# The framework and the data

def train(args):
    """Measure the milliseconds that the Runner adds to an iteration of a bare loop.

    Both alternate, so that other load slows both: after every iteration, on a GPU after every 10.
    Differences are taken between neighbours. The range is the 95 % confidence interval of their
    median.
    """
    network = dict(arch=args.arch, compile_blocks=args.compile)
    job = workloads.Training(CONFIGS, network, args.batch, args.iterations,
                             args.precision == 'bf16')
    late = 500_000
    durations, _ = take_turns({
        f'Runner at iteration {job.WARMUP}': job.pairs,
        f'Runner at iteration {late:,}': lambda: job.pairs(late),
        "... with mmengine's own log": lambda: job.pairs(late, 'RuntimeInfoHook')},
        args.repeats, DTYPES[args.precision], warmup=0)
    rows = []
    for name, turns in durations.items():
        pairs = sum(turns, [])
        runner, bare = (1e3 * statistics.median(times) for times in zip(*pairs))
        more = sorted(1e3 * (one - other) for one, other in pairs)
        reach = round(0.98 * len(more) ** 0.5)      # ranks around the median, by the sign test
        low, high = (more[min(max(rank, 0), len(more) - 1)] for rank in (
            len(more) // 2 - reach, len(more) // 2 + reach))
        median = statistics.median(more)
        rows.append({'loop': name, 'ms/iteration': runner, 'bare loop': bare, 'more ms': median,
                     'more %': 100 * median / bare,
                     'range %': f'{100 * low / bare:.2f} to {100 * high / bare:.2f}'})
    return report(args, environment(args, arch=args.arch, precision=args.precision,
                                    batch=args.batch, repeats=args.repeats,
                                    iterations=args.iterations), rows)


def loader(args):
    """Measure images per second of one process and of all workers together."""
    init_default_scope('mmpretrain')
    default = Config.fromfile(BASES / 'datasets' / 'imagenet_pretrain.py').train_pipeline
    crop, *rest = default
    crop = dict(crop, type='RandomResizedCrop', backend='pillow')
    pillow = dict(type='LoadImageFromFile', imdecode_backend='pillow')
    pipelines = {
        'LoadRandomResizedCrop (default)': default,
        'LoadImageWithPillow': [dict(type='LoadImageWithPillow'), crop, *rest],
        'mmpretrain with Pillow': [pillow, crop, *rest]}
    with tempfile.TemporaryDirectory() as folder:
        original, small = Path(folder, 'original'), Path(folder, 'short side 256')
        workloads.make_jpegs(original, args.images)
        for path in original.iterdir():
            resize_image(path, small / path.name, 256)
        durations, _ = take_turns({
            (name, source.name, workers): workloads.loading(
                sorted(source.iterdir()), steps, workers)
            for source in (original, small) for name, steps in pipelines.items()
            for workers in (0, args.workers)}, args.repeats, torch.float32, warmup=1)
    rate = {key: args.images / statistics.median(times) for key, times in durations.items()}
    usual = rate['mmpretrain with Pillow', 'original', 0]
    rows = [{'pipeline': name, 'files': source, 'images/s of one core': one,
             'speed to mmpretrain': one / usual,
             'images/s in total': rate[name, source, args.workers]}
            for (name, source, workers), one in rate.items() if workers == 0]
    return report(args, environment(args, images=args.images, workers=args.workers,
                                    repeats=args.repeats), rows)


# The plan

def plan(args):
    """Estimate hours and cost of a pretraining from its slowest part alone."""
    name = f'nepa_vit-{args.model}'
    cfg = Config.fromfile(CONFIGS / 'pretrain' / f'{name}.py')
    epochs, batch = args.epochs or cfg.train_cfg.max_epochs, cfg.auto_scale_lr.base_batch_size
    with torch.device('meta'):
        gradients = 4 * sum(p.numel() for p in peers.NEPAViT(
            **{k: v for k, v in cfg.model.backbone.items() if k != 'type'}).parameters())
    rates = dict(compute=args.images_per_second or from_json(args.step_json, 'images/s'),
                 data=args.cores * (args.loader_images_per_second or from_json(
                     args.loader_json, 'images/s of one core')))
    if min(rates.values()) <= 0 or args.bandwidth <= 0:
        raise ValueError('rates and bandwidth must be positive.')
    seconds = {part: batch / (args.gpus * rate) for part, rate in rates.items()}
    # in a ring of N processes, each sends and receives 2 (1 - 1/N) times the gradients
    seconds['all-reduce'] = 2 * (1 - 1 / args.gpus) * gradients / (args.bandwidth * 1e9)
    slowest = max(seconds, key=seconds.get)
    hours = epochs * IMAGENET / batch * seconds[slowest] / 3600
    rows = [{'part': part, 'ms/update': 1e3 * value, 'share of the slowest %':
             100 * value / seconds[slowest]} for part, value in seconds.items()]
    return report(args, dict(command='plan', model=name, gpus=args.gpus, epochs=epochs,
                             batch=batch, bottleneck=slowest, hours=round(hours, 2),
                             cost=round(hours * args.gpus * args.price, 2)), rows)


def from_json(path, column):
    """Read the rate of our implementation from a file written by ``--json``."""
    if path is None:
        raise ValueError(f'plan needs a measured rate of {column}: give the rate, or the file of '
                         '--json.')
    if not Path(path).is_file():
        raise FileNotFoundError(f'There is no file {path}.')
    row = json.loads(Path(path).read_text())['rows'][0]
    if column not in row:
        raise ValueError(f'{path} has no {column}; it was written by a different subcommand.')
    return row[column]


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line) and return the rows."""
    args = parse_args(argv)
    MMLogger.get_instance('benchmark', log_level='ERROR')
    apis.reuse_freed_memory()
    if getattr(args, 'precision', None) == 'bf16' and get_device() == 'cpu':
        warn_of_slow_bf16()
    with apis.user_errors():
        if getattr(args, 'json', None):
            require_new_path(args.json, '--json')
        commands = (step, scaling, memory, train, loader, plan)
        try:
            return {run.__name__: run for run in commands}[args.command](args)
        except torch.OutOfMemoryError as error:
            raise MemoryError('The GPU has too little memory; give a smaller --batch. '
                              + str(error).split('. ')[0] + '.') from error


if __name__ == '__main__':
    main()
