"""Checkpoints from a stranger, through every command: nothing is executed, deleted or crashed.

Every case is a fork of this process in a folder of its own, and is watched: no marker appears,
nothing outside the folder changes, it ends by itself, takes little memory, and either works or
says one sentence with status 2.
"""
import builtins
import collections
import copy
import ctypes
import functools
import importlib
import io
import operator
import os
import pickle
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import traceback
import zipfile
from pathlib import Path

import mmengine
import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import save_file

from nepa_mm.checkpoints.huggingface import to_published
from nepa_mm.checkpoints.huggingface_config import DEFAULTS
from nepa_mm.checkpoints.io import read_checkpoint

from ..test_convert import SMALL, build, write_published
from ..tiny_runs import load_tool, run_test, run_train, save_classifier, save_image
from ..tiny_runs import save_pretraining as save_pretrain
from .files import mutate

SECONDS = 60
MEMORY = 2 << 30        # above what the parent has
RARE = 40       # every so manieth case goes through a command that takes seconds
convert, publish, export, predict, visualize = (load_tool(name).main for name in (
    'convert_checkpoint', 'publish_model', 'export', 'predict', 'visualize'))


# ---------------------------------------------------------------- what is called


class Call:
    """Pickles as a call of ``func``, which may be what another call returns."""

    def __init__(self, func, *args, state=None):
        self.func, self.args, self.state = func, args, state

    def __call__(self):
        raise AssertionError

    def __reduce__(self):
        return (self.func, self.args, *([] if self.state is None else [self.state]))


def gadgets(marker, precious):
    """Calls that would touch ``marker``, remove ``precious``, crash, hang or take memory."""
    code, touch = f'open({marker!r}, "w")', f'touch {marker}'
    rebuild = torch._tensor._rebuild_from_type_v2
    globals_ = Call(getattr, Call(getattr, HistoryBuffer, 'mean'), '__globals__')
    builtins_ = Call(Call(getattr, globals_, 'get'), '__builtins__')
    evaluate = Call(Call(getattr, builtins_, 'get'), 'eval')
    scripted = io.BytesIO()
    pickle.dump(Call(eval, code), scripted, 2)
    calls = [
        (os.system, touch), (os.popen, touch), (os.remove, precious), (os.unlink, precious),
        (os.rename, precious, precious + '2'), (os.abort,), (os._exit, 0), (os.mkdir, marker),
        (signal.raise_signal, 9), (subprocess.call, ['touch', marker]), (sys.exit, 0),
        (subprocess.Popen, ['touch', marker]), (subprocess.check_output, ['touch', marker]),
        (eval, code), (exec, code), (open, marker, 'w'), (builtins.__import__, 'antigravity'),
        (importlib.import_module, 'this'), (runpy.run_path, precious), (shutil.rmtree, precious),
        (shutil.copy, precious, marker), (Path.touch, Path(marker)), (Path.unlink, Path(precious)),
        (functools.partial(os.system, touch),), (operator.methodcaller('touch'), Path(marker)),
        (operator.attrgetter('system'), os.system), (map, eval, [code]),
        (list, Call(map, eval, [code])),
        (sorted, [code], eval), (max, [code, code], eval), (pickle.loads, scripted.getvalue()),
        (torch.storage._load_from_bytes, scripted.getvalue()), (torch.load, precious),
        (torch.hub.load, precious, 'x'), (torch.jit.load, precious), (mmengine.load, precious),
        (Config.fromstring, code, '.py'), (Config.fromfile, precious), (ctypes.string_at, 1),
        (time.sleep, 1000), (evaluate, code),
        (rebuild, evaluate, torch.Tensor, (code,), {}), (rebuild, eval, torch.Tensor, (code,), {}),
        (rebuild, os.system, torch.Tensor, (touch,), {}), (getattr, eval, '__self__'),
        (Call(getattr, Path(marker), 'touch'),), (getattr, HistoryBuffer, '__init__'),
        (getattr, HistoryBuffer, '__subclasses__'), (getattr, torch.Tensor, 'register_hook'),
        (collections.defaultdict, evaluate), (collections.OrderedDict, Call(map, eval, [code])),
        (np.load, precious), (np.fromfile, precious), (np.memmap, marker, 'u1', 'w+', 0, (9,)),
        (bytearray, 3 << 30), (torch.Tensor, 1 << 30), (torch.zeros, 1 << 30), (bytes, 3 << 30),
        (torch.FloatStorage, 1 << 30), (torch.UntypedStorage, 3 << 30), (np.zeros, 1 << 30),
        (np.ndarray, (1 << 30,)), (list, range(1 << 30)), (operator.mul, 'x', 3 << 30),
        (torch._utils._rebuild_parameter_with_state, torch.zeros(1), False, {}, dict(
            __class__=1, _backward_hooks=2)), (torch.nn.Parameter, torch.zeros(1), 'x'),
        (torch._utils._rebuild_device_tensor_from_numpy, np.zeros(1), torch.float32, 'cpu', False),
        (torch._utils._rebuild_wrapper_subclass, torch.Tensor, torch.float32, (1 << 40,), (1,), 0,
         torch.strided, 'cpu', False),
        (torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (9, 9), (9, 1), False),
        (torch.device, 'cuda:9999'), (torch.Size, ['x']), (collections.Counter, ['x']),
        (set, [(1, (2, (3,)))]), (slice, evaluate), (complex, 'x'), (np.dtype, 'O'),
        (np.dtype, 'V1000000000'), (np.dtype, [('a', 'O')]), (HistoryBuffer, [evaluate], [1]),
        (HistoryBuffer, np.zeros((9, 9)), np.zeros(9)), (HistoryBuffer, 3, 4, 5, 6)]
    codecs = [(np._core.multiarray.scalar if np.__version__ >= '2' else
               np.core.multiarray.scalar, np.dtype('O'), b'12345678')]
    states = [
        Call(collections.OrderedDict, state=dict(keys=evaluate, _metadata=7)),
        Call(HistoryBuffer, state=dict(statistics_methods=dict(mean=evaluate))),
        Call(HistoryBuffer, state=dict(max_length=-1, _log_history=3, _count_history='x')),
        Call(np.dtype, 'f8', state=(3, '<', None, None, None, 1 << 60, 1 << 60, 255)),
        Call(np.dtype, 'f8', state=(3, '>', ('a',), {'a': evaluate}, None, -1, -1, 63)),
        Call(np.ndarray, (0,), state=(1, (1 << 40,), np.dtype('f8'), False, b'')),
        Call(np.ndarray, (0,), state=(1, (9,), np.dtype('O'), False, [evaluate] * 9)),
        Call(torch.Tensor, state=(torch.zeros(1), 0, (1 << 40,), (1,))), evaluate, globals_]
    return [Call(*call) for call in calls + codecs] + states


# ---------------------------------------------------------------- pickles by hand


def by_hand(marker):
    """Pickles that no pickler writes."""
    deep, key = b'\x80\x02' + b'N' + b'\x85' * 300000, b'X\x01\0\0\0a'
    laugh = b'\x80\x02]q\x00' + b''.join(
        b'(' + b'h%c' % i * 10 + b'lq%c' % (i + 1) for i in range(60)) + b'.'
    collide = b''.join(b'\x8a\x11' + (i * (2 ** 61 - 1)).to_bytes(17, 'little') + b'N'
                       for i in range(1, 30000))
    return [
        deep + b'.', b'\x80\x02}' + deep[2:] + b'Ns.', b'\x80\x02]q\x00h\x00a.', laugh,
        b'\x80\x02]q\x00' + b''.join(b'](' + b'h%c' % i * 50 + b'eq%c' % (i + 1)
                                     for i in range(100)) + b'.',
        b'\x80\x02}q\x00' + key + b'h\x00s.', b'\x80\x02}(' + collide + b'u.',
        b'\x80\x02]r\xff\xff\xff\x7f.', b'\x80\x05\x96' + b'\xff' * 4 + b'\x03' + b'\0' * 3 + b'.',
        b'\x80\x02X\xff\xff\xff\x7fabc.', b'\x80\x02\x8b\xff\xff\xff\x7fabc.', b'\x80\x02.', b'',
        b'\x80\x02}' + key + b'X\x03\0\0\0\xed\xa0\x80s.', b'\x80\xff}.', b'\x80\x02)Q.',
        b'\x80\x02((X\x07\0\0\0storageK\x01K\x02K\x03K\x04tQ.', b'\x80\x02]}K\x01K\x02sb.',
        b'cos\nsystem\n(X%ctR.' % 5, f'cos\nsystem\n(Vtouch {marker}\ntR.'.encode(),
        f'(Vtouch {marker}\nios\nsystem\n.'.encode(), b'\x80\x02\x82\x01.',
        b'\x80\x02' + b'(' * 99999,
        b'\x80\x02ccollections\nOrderedDict\n)RK\x01K\x02sccollections\nOrderedDict\n)R\x86.',
        b'\x80\x02cnumpy\nndarray\ncnumpy\nndarray\nR.', b'\x80\x02N)R.', b'\x80\x02N)\x81.',
        b'\x80\x02ccollections\nOrderedDict\n]cbuiltins\nslice\na\x85R.',
        b'\x80\x02cbuiltins\nslice\ncbuiltins\nslice\nR.', b'\x80\x02cbuiltins\ngetattr\n.']


def zipped(path, pickled, storages=(), compression=zipfile.ZIP_STORED, extra=()):
    """Write what torch.save would, around any pickle."""
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', pickled)
        archive.writestr('archive/version', b'3\n')
        for key, content in enumerate(storages):
            archive.writestr(f'archive/data/{key}', content)
        for name in extra:
            archive.writestr(name, b'x')


def tensor(numel, offset, size, stride, key=b'0'):
    """The pickle of {'state_dict': {'a': a tensor that claims anything}}."""
    def integer(num):
        raw = num.to_bytes(num.bit_length() // 8 + 1, 'little', signed=True)
        return b'\x8a' + bytes([len(raw)]) + raw

    def integers(nums):
        return b'(' + b''.join(map(integer, nums)) + b't'

    def text(value):
        return b'X' + struct.pack('<I', len(value)) + value

    return (text(b'a') + b'ctorch._utils\n_rebuild_tensor_v2\n((' + text(b'storage')
            + b'ctorch\nFloatStorage\n' + text(key) + text(b'cpu') + integer(numel) + b'tQ'
            + integer(offset) + integers(size) + integers(stride)
            + b'\x89ccollections\nOrderedDict\n)RtR')


def odd_archives(rng, path):
    """Write one of the archives that lie about sizes, or are something else."""
    head, tail = b'\x80\x02}X\x0a\0\0\0state_dict}(', b'us.'
    floats = rng.random(16).astype('f4').tobytes()
    claims = [(16, 0, [1 << 40], [0]), (1 << 30, 0, [1 << 30], [1]), (16, 1 << 40, [1], [1]),
              (16, -1, [4], [1]), (16, 0, [-4], [1]), (16, 0, [4], [-1]), (16, 8, [16], [1]),
              (16, 0, [1 << 31, 1 << 31], [1, 0]), (16, 0, [1 << 62] * 9, [0] * 9),
              (-1, 0, [1], [1]),
              (16, 0, [4, 4], [1 << 62, 1]), (1 << 70, 0, [1], [1]), (16, 0, [0, 1 << 61], [1, 1]),
              (16, 0, [1] * 70, [1] * 70), (16, 0, [4], [1, 1])]
    kind = int(rng.integers(len(claims) + 8))
    if kind < len(claims):
        zipped(path, head + tensor(*claims[kind]) + tail, [floats])
    elif kind == len(claims):       # 400 tensors, which share what they hold
        many = b''.join(b'X\x03\0\0\0%03d' % i + tensor(1 << 20, 0, [1 << 20], [1])[6:]
                        for i in range(400))
        zipped(path, head + many + tail, [bytes(4 << 20)])
    elif kind == len(claims) + 1:       # 7 GB in 7 MB would be as good; this one takes less time
        zipped(path, head + tensor(1 << 28, 0, [1 << 28], [1]) + tail, [],
               zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('archive/data/0', bytes(1 << 26))
    elif kind == len(claims) + 2:
        zipped(path, head + tensor(16, 0, [16], [1]) + tail, [floats], extra=['b/data.pkl'])
    elif kind == len(claims) + 3:
        zipped(path, head + tensor(16, 0, [16], [1], b'../../../precious') + tail, [floats],
               extra=['archive/data/../../../precious', '../../precious', '/tmp/precious'])
    elif kind == len(claims) + 4:
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    elif kind == len(claims) + 5:
        with tarfile.open(path, 'w') as archive:
            for name in ('storages', 'tensors', 'pickle', '../../precious'):
                archive.addfile(tarfile.TarInfo(name))
    elif kind == len(claims) + 6:       # one entry under many names
        zipped(path, head + tensor(16, 0, [16], [1]) + tail, [floats] * 50)
        content = path.read_bytes()
        begin = content.index(b'PK\x01\x02')
        path.write_bytes(content[:begin] + content[begin:].replace(
            struct.pack('<I', 64), struct.pack('<I', 1 << 30)))
    else:
        path.write_bytes(b'PK\x03\x04' + rng.bytes(300) + b'PK\x05\x06' + bytes(18))


# ---------------------------------------------------------------- trees of wrong types


def places(tree, path=()):
    """Every path into nested dicts and lists."""
    yield path
    for key, value in (tree.items() if isinstance(tree, dict) else
                       enumerate(tree) if isinstance(tree, list) else ()):
        yield from places(value, (*path, key))


def put(tree, path, value):
    """Put a value somewhere into a copy of a tree."""
    if not path:
        return value
    tree = copy.copy(tree)
    tree[path[0]] = put(tree[path[0]], path[1:], value)
    return tree


def wrong_values(marker, precious):
    code = f'open({marker!r}, "w")\nmodel = dict(type="os.mkdir", path={marker!r})'
    return [None, True, False, -1, 0, 3, 2 ** 40, -2 ** 63, 1e300, float('nan'), float('inf'), '',
            'x', 'x' * 9999, precious, '../precious', '/', code, f'[{code}]', '-' * 99999 + '1',
            '(' * 9999, '1' + '+1' * 99999, 'a' + '.a' * 99999, '\0', 'a\nb\x1b[31m', [], {}, (),
            [1],
            [[]], {'a': 1}, {1: 2}, (1, 2), torch.zeros(()), torch.zeros(0), torch.ones(3).bool(),
            torch.full((2, 2), float('nan')), torch.float32, torch.Size([3]), torch.device('cpu'),
            np.zeros(3), np.float64(1), HistoryBuffer(), HistoryBuffer([1., 2.], [1, 1]), b'abc',
            slice(1), {1, 2}, collections.Counter(a=1), collections.OrderedDict(a=1),
            [{'a': [{'a': []}]}], dict(classes=7), dict(classes=['a'] * 1000),
            dict(_scope_='os', type='os.mkdir', path=marker)]


def harm(marker, precious):
    """Values in the places that OpenMMLab takes for programs or files."""
    code = f'open({marker!r}, "w")'
    base = f'_base_ = [{precious!r}]\ncustom_imports = dict(imports=["antigravity"])'
    model = f'model = dict(type="os.mkdir", path={marker!r})'
    places = [('meta', 'config'), ('meta', 'cfg'), ('message_hub', 'runtime_info', 'cfg')]
    return [(place, text) for place in places for text in (code, base, model)] + [
        (('message_hub', 'runtime_info', 'keep_ckpt_ids'), ids) for ids in
        (['../../precious'], [precious], [[1]], 'abc', [1, 2, 3])] + [
        (('meta', 'epoch'), num) for num in (-1, 10 ** 30, '1', None)] + [
        (('param_schedulers',), [dict(step=1, optimizer=2, _get_value=3, last_step='x')])]


# ---------------------------------------------------------------- doors


def cheap_doors(case):
    """What is done with a hostile file in milliseconds: name and function."""
    def read():
        for reading in (read_checkpoint, CheckpointLoader.load_checkpoint):
            try:
                reading(case)
            except (ValueError, FileNotFoundError) as error:
                assert '\n' not in str(error), error

    return dict(read=read, publish=lambda: publish([case, 'out']),
                hf=lambda: convert([case, 'out', '--to', 'hf']))


def published_door(case):
    """The converter from the published format, whose weights are the hostile file."""
    shutil.copytree('../base/published', 'published')
    for file in Path('published').glob('*model*'):
        file.unlink()
    name = 'model.safetensors' if case.endswith('.safetensors') else 'pytorch_model.bin'
    shutil.copy(case, f'published/{name}')
    convert(['published', 'out.safetensors'])


def commands(case):
    """The commands that take seconds: name, what it reads by itself, and function."""
    run = ['../base/pretrain.py', '--work-dir', 'w', '--cfg-options']
    classify, image = '../base/classify.py', '../base/data/val/a/0.jpg'

    def auto():
        Path('w').mkdir()
        shutil.copy(case, 'w/epoch_1.pth')
        run_train(run[:-1])

    return dict(
        resume=('run', lambda: run_train([*run[:-1], '--resume', case])), auto=('run', auto),
        load_from=('run', lambda: run_train([*run, f'load_from={case}', 'resume=False'])),
        init_cfg=('run', lambda: run_train([
            *run, 'model.init_cfg.type=Pretrained', f'model.init_cfg.checkpoint={case}'])),
        visualize=('run', lambda: visualize(['../base/pretrain.py', case, image])),
        test=('classifier', lambda: run_test([classify, case, '--work-dir', 'w'])),
        predict=('classifier', lambda: predict([
            '--model', classify, '--checkpoint', case, image])),
        export=('classifier', lambda: export([classify, case])))


def pages():
    """Bytes of this process: in all, and in memory."""
    return [int(num) * resource.getpagesize()
            for num in Path('/proc/self/statm').read_text().split()[:2]]


def watched(work):
    """Fork, do the work in the current folder, and say what it did that it may not, or None."""
    (space, limit), said = pages(), Path('said')
    limit += MEMORY
    child = os.fork()
    if not child:
        try:
            signal.alarm(SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (space + 2 * MEMORY, -1))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for num, file in ((1, os.devnull), (2, str(said))):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), num)
            sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    _, status, used = os.wait4(child, 0)
    lines = said.read_text(errors='replace').splitlines()
    if os.WIFSIGNALED(status):
        return f'died of signal {os.WTERMSIG(status)}'
    if used.ru_maxrss * 1024 > limit:
        return f'took {used.ru_maxrss >> 10} MB'
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 2) or code == 2 and sum(line.startswith('error: ') for line in lines) != 1:
        return f'status {code}: ' + ' | '.join(lines[-6:])
    return None


# ---------------------------------------------------------------- the campaign


def prepare(base):
    """The configs, images and honest checkpoints: {name: tree}."""
    base.mkdir(parents=True)
    os.chdir(base)
    run = Config.fromfile(save_pretrain())
    run.default_hooks.checkpoint = dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=1)
    run.custom_hooks = [dict(type='ModelEMAHook', momentum=0.1)]
    run.param_scheduler = dict(type='CosineAnnealingLR', T_max=4, by_epoch=False)
    run.default_hooks.run_check = dict(type='RunCheckHook', odd='warn')    # of it half is run
    run.optim_wrapper.optimizer = dict(type='AdamW', lr=1e-3)
    run.train_cfg.max_epochs = 2
    run.dump('pretrain.py')
    classify, classifier = save_classifier()
    save_image(Path('data/val/a/0.jpg'))
    init_default_scope('mmpretrain')
    config = DEFAULTS | SMALL | dict(model_type='vit_nepa', id2label={'0': 'cat', '1': 'dog'})
    state = build(config, 2).state_dict()
    write_published(Path('published'), config, to_published(state))
    problem = watched(lambda: run_train(['pretrain.py', '--work-dir', 'run', '--cfg-options',
                                         'train_cfg.max_epochs=1']))
    assert not problem, problem
    assert Path('run/epoch_1.pth').is_file(), Path('said').read_text()
    os.chdir('..')
    return {name: torch.load(base / file, weights_only=False) for name, file in dict(
        run='run/epoch_1.pth', classifier=classifier).items()} | dict(
            published=to_published(state))


def write_hostile(rng, path, honest, marker, precious):
    """Write one hostile file of any kind to ``path``, and say which kind."""
    kind = str(rng.choice(['call', 'call', 'hand', 'archive', 'type', 'type', 'harm', 'bytes',
                           'bytes', 'safetensors']))
    old = bool(rng.random() < 0.2)
    trees = list(places(honest))
    short = [place for place in trees if len(place) < 3]
    if kind == 'call':
        calls = gadgets(marker, precious)
        number = int(rng.integers(len(calls)))
        place = short[rng.integers(len(short))]
        protocol = int(rng.choice([2, 2, 2, 3, 4]))
        torch.save(put(honest, place, calls[number]), path, pickle_protocol=protocol,
                   _use_new_zipfile_serialization=not old)
        return f'call {number} at {place}'
    if kind == 'hand':
        pickles = by_hand(marker)
        number = int(rng.integers(len(pickles)))
        if old:
            path.write_bytes(pickles[number])
        else:
            zipped(path, pickles[number])
        return f'pickle {number}'
    if kind == 'archive':
        odd_archives(rng, path)
    elif kind == 'type':
        values = wrong_values(marker, precious)
        number = int(rng.integers(len(values)))
        among = short if rng.random() < 0.7 else trees
        place = among[rng.integers(len(among))]
        torch.save(put(honest, place, values[number]), path,
                   _use_new_zipfile_serialization=not old)
        return f'{repr(values[number])[:30]} at {place}'
    elif kind == 'harm' and 'message_hub' in honest:
        changes = harm(marker, precious)
        place, value = changes[rng.integers(len(changes))]
        honest = copy.deepcopy(honest)
        functools.reduce(operator.getitem, place[:-1], honest)[place[-1]] = value
        torch.save(honest, path)
        return f'{repr(value)[:30]} at {place}'
    elif kind == 'safetensors':
        tensors = honest.get('state_dict', honest)
        save_file(tensors, path, dict(nepa_mm=str(rng.choice(
            ['[' * 9999, '7', '{"model": 7}', '{"model": {"type": 3}}', '{', '{"input": {}}']))))
        if rng.random() < 0.7:
            path.write_bytes(mutate(rng, path.read_bytes()))
    else:
        torch.save(honest, path, _use_new_zipfile_serialization=not old)
        path.write_bytes(mutate(rng, path.read_bytes()))
    return kind


def hostile(rng, num):
    """Yield, for each of ``num`` hostile files, what went wrong, or None."""
    here = Path.cwd()
    root, marker = here / 'hostile', str(here / 'marker')
    shutil.rmtree(root, ignore_errors=True)
    trees = prepare(root / 'base')
    precious = root / 'precious'
    precious.mkdir()
    (precious / 'file').write_text('precious')
    expected = [*sorted(root.rglob('base/*/*')), *precious.rglob('*')]
    for index in range(num):
        folder = root / 'case'
        folder.mkdir()
        os.chdir(folder)
        (folder / 'data').symlink_to('../base/data')
        rare = list(commands('').items())
        cheap = [*cheap_doors(''), 'mm']
        door = cheap[index % len(cheap)]
        source = 'published' if door == 'mm' else str(rng.choice(['run', 'classifier']))
        if index % RARE == 0:
            door, (source, _) = rare[index // RARE % len(rare)]
        what = write_hostile(rng, Path('case.pth'), trees[source], marker, str(precious))
        case = 'case.pth'
        if what == 'safetensors':
            case = str(Path(case).rename('case.safetensors'))
        problem = watched(
            commands(case)[door][1] if index % RARE == 0 else
            (lambda file=case: published_door(file)) if door == 'mm' else cheap_doors(case)[door])
        os.chdir(here)
        if os.path.exists(marker):
            problem = 'was executed'
            (os.rmdir if os.path.isdir(marker) else os.remove)(marker)
        left = [*sorted(root.rglob('base/*/*')), *precious.rglob('*')]
        if left != expected:
            problem, expected = f'changed {set(left) ^ set(expected)}', left
        shutil.rmtree(folder)
        yield problem and f'{door}, {what}: {problem}'
