"""The dependency check speaks in one sentence; the registrations reach every config."""
import re
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.datasets import ImageNet
from mmpretrain.models import ImageClassifier

from nepa_mm.checkpoints.safe_load import safe_load
from nepa_mm.compat import stack
from nepa_mm.compat.classic import MissingOperators
from nepa_mm.models.nepa import NEPA

from .conftest import REPO, TINY

CURRENT = {stack.name_of(requirement): requirement for requirement in stack.CURRENT.values()}


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these distributions are there: a dict to fill."""
    found = {'torch': '2.5.0', 'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6'}

    def version(name):
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    def find_spec(module):
        table = {**stack.CORE, **stack.CURRENT}
        return module if stack.versions(module) or table[module] in found else None

    monkeypatch.setattr(stack.metadata, 'version', version)
    monkeypatch.setattr(stack.util, 'find_spec', find_spec)
    return found


def sentence(*modules):
    with pytest.raises(ImportError) as error:
        stack.require(*modules)
    text = str(error.value)
    assert '\n' not in text and text.startswith('nepa_mm needs')
    return text


def test_complete(installed):
    stack.require('torch', 'mmengine', 'mmcv')
    del installed['torch']
    assert 'torch, not installed here' in sentence('torch', 'mmengine', 'mmcv')


def test_missing(installed):
    text = sentence('torch', 'mmcv', 'mmpretrain', 'timm')
    assert 'onedl-mmpretrain, timm, not installed here' in text
    assert text.endswith(f'pip install "{CURRENT["onedl-mmpretrain"]}" "{stack.CORE["timm"]}"')


def test_old(installed):
    installed.update({'onedl-mmengine': '0.10.2', 'torch': '1.13.1+cu117'})
    text = sentence('torch', 'mmengine', 'mmcv')
    assert 'but torch 1.13.1+cu117, onedl-mmengine 0.10.2 is installed' in text
    assert text.endswith(f'pip install "{CURRENT["torch"]}" "{CURRENT["onedl-mmengine"]}"')


def test_classic_stack(installed):
    installed.clear()
    installed.update({'mmengine': '0.10.7', 'mmcv': '2.2.0'})
    assert 'pip install "mmpretrain>=' in sentence('mmengine', 'mmcv', 'mmpretrain')
    assert 'mmcv-lite>=2.1,<2.2, but mmcv 2.2.0 is installed' in sentence('mmengine', 'mmcv')
    installed['mmcv'] = '2.1.0'
    stack.require('mmengine', 'mmcv')


def test_both_stacks(installed):
    installed['mmcv-lite'] = '2.1.0'
    with pytest.raises(ImportError, match='^onedl-mmcv and mmcv-lite are both installed') as error:
        stack.require('mmcv')
    assert 'pip uninstall -y onedl-mmcv mmcv-lite && pip install "onedl-mmcv' in str(error.value)


def test_two_builds_of_one_stack(installed):
    installed.clear()
    installed.update({'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmcv-lite': '2.1.0'})
    with pytest.raises(ImportError, match='uninstall -y mmcv-lite mmcv && pip install "mmcv-lite'):
        stack.require('mmcv')


def test_without_metadata(installed, monkeypatch):
    """A clone on PYTHONPATH has no version to check."""
    assert 'not installed here' in sentence('mmpretrain')
    monkeypatch.setattr(stack.util, 'find_spec', lambda module: module)
    stack.require('mmpretrain')


@pytest.mark.parametrize('module, reason, command', [
    ('torchvision', 'operator torchvision::nms does not exist', 'torch torchvision'),
    ('cv2', 'libGL.so.1: cannot open shared object file', 'opencv-python-headless')])
def test_binaries(tmp_path, module, reason, command):
    """A package that does not load is named by `import nepa_mm` itself."""
    (tmp_path / f'{module}.py').write_text(f'raise RuntimeError({reason!r})')
    code = f'import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(REPO)!r}]; import nepa_mm'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert re.fullmatch(rf'ImportError: {module} .*{reason}.*; run: pip .*{command}', last)


@pytest.mark.parametrize('base', [
    'nepa_mm::pretrain/nepa_vit-b.py', 'mmpretrain::_base_/default_runtime.py',
    'mmseg::_base_/default_runtime.py'])
def test_bases(tmp_path, base):
    if base.startswith('mmseg'):
        pytest.importorskip('mmseg')
    config = tmp_path / 'config.py'
    config.write_text(f'_base_ = {base!r}')
    assert Config.fromfile(config).default_scope in ('mmpretrain', 'mmseg')


def test_scope(tmp_path):
    """What is inherited from `nepa_mm::` builds like the config itself, mmpretrain's parts too."""
    config = tmp_path / 'config.py'
    config.write_text("_base_ = 'nepa_mm::pretrain/nepa_vit-b.py'")
    cfg = Config.fromfile(config)
    dataset = dict(cfg.train_dataloader.dataset, lazy_init=True)
    assert cfg.model._scope_ == dataset['_scope_'] == 'nepa_mm'
    cfg.model.backbone.arch = TINY
    assert isinstance(MODELS.build(cfg.model), NEPA)
    assert isinstance(DATASETS.build(dataset), ImageNet)


@pytest.mark.parametrize('scope, module', [
    (None, 'mmpretrain'), ('mmpretrain', 'mmpretrain'), ('mmseg', 'mmseg')])
def test_scope_is_transparent(scope, module):
    """mmpretrain and mmseg both have a BaseDataset: the scope in use decides which is meant."""
    pytest.importorskip(module)
    with DefaultScope.overwrite_default_scope(scope), \
            DefaultScope.overwrite_default_scope('nepa_mm'), \
            MODELS.switch_scope_and_registry(None) as models, \
            DATASETS.switch_scope_and_registry(None) as datasets:
        assert models.scope == 'nepa_mm' and models.get('NEPA') is NEPA
        assert models.get('CrossEntropyLoss').__module__.startswith(module)
        assert models.get('mmpretrain.ImageClassifier') is ImageClassifier
        assert models.get('NoSuchModel') is None
        assert datasets.scope == 'nepa_mm'


@pytest.mark.parametrize('name', ['default_collate', 'pseudo_collate'])
def test_collate_functions_of_inherited_configs(name):
    """mmengine passes them the scope of the config."""
    batch, = Runner.build_dataloader(dict(
        batch_size=2, num_workers=0, dataset=[dict(x=torch.ones(3)), dict(x=torch.zeros(3))],
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type=name, _scope_='nepa_mm')))
    assert (type(batch['x']) is list) == (name == 'pseudo_collate')
    assert [x.tolist() for x in batch['x']] == [[1] * 3, [0] * 3]


@pytest.mark.skipif(stack.is_classic(), reason='the classic stack keeps its own names')
def test_package_table():
    assert MODULE2PACKAGE['mmseg'] == 'onedl-mmsegmentation'
    assert MODULE2PACKAGE['mmpretrain'] == 'onedl-mmpretrain'


def test_missing_operators():
    """Classic stack: mmseg's modules can be imported without the operators, not call them."""
    operators = MissingOperators('mmcv._ext')
    assert operators.__spec__.loader is None
    with pytest.raises(ImportError, match='^nms_forward is a compiled operator.*; run: pip '):
        operators.nms_forward()


def test_log_records(tmp_path):
    """Both stacks: what the log records of a checkpoint consist of can be read."""
    records = HistoryBuffer([1., 2.], [1, 1])
    torch.save(dict(loss=records, step=np.float64(3)), tmp_path / 'a.pth')
    loaded = safe_load(tmp_path / 'a.pth')
    assert (loaded['loss'].mean(), loaded['step']) == (1.5, 3)


SNAPSHOT = """
import sys
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType

def snapshot():
    '''What every loaded module of the stack, and every class in it, has under which name.'''
    seen = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith(('mmengine', 'mmcv', 'mmpretrain', 'mmseg')):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, ModuleType):
                continue
            seen[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                seen.update({(name, key, k): v for k, v in vars(value).items()})
    return seen

for name in MODULES:
    import_module(name)
before = snapshot()
import nepa_mm
after = snapshot()
# CheckpointLoader.register_scheme copies its table: what was in it must still be
print([key for key in before if after.get(key) is not before[key]
       and not (key[-1] == '_schemes' and before[key].items() <= after[key].items())])
"""


@pytest.mark.skipif(stack.is_classic(), reason='the classic stack is adapted')
def test_nothing_is_patched():
    def run(code):
        return subprocess.run(
            [sys.executable, '-c', code], cwd=REPO, capture_output=True, text=True, check=True
        ).stdout.strip().splitlines()[-1]

    modules = run(
        'import nepa_mm, sys; print([name for name in sys.modules if name.startswith('
        '("mmengine.", "mmcv.", "mmpretrain.", "mmseg.")) and sys.modules[name].__spec__])')
    assert 'mmengine.registry' in modules and 'mmpretrain.models' in modules
    assert run(f'MODULES = {modules}' + SNAPSHOT) == '[]'
