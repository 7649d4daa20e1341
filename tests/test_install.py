"""A wheel, a wheel from the source archive, and an editable installation, used from elsewhere."""
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from .conftest import REPO

CHECK = """
import json, sys
from importlib.metadata import version
from pathlib import Path
import nepa_mm
from mmengine.config import Config
mim = Path(nepa_mm.__file__).parent / '.mim'
print(json.dumps(dict(
    package=nepa_mm.__file__, metadata=version('nepa-mm'), version=nepa_mm.__version__,
    model=Config.fromfile('config.py').model.type,
    files=[str(path.relative_to(mim)) for folder in (mim, mim / 'configs', mim / 'tools')
           for path in folder.rglob('*')],
    links=[str(path) for path in mim.rglob('*') if path.is_symlink()])))
"""


def run(*command, **kwargs):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the checkout, so that building leaves nothing behind in the checkout."""
    folder = tmp_path_factory.mktemp('source') / 'nepa'
    folder.mkdir()
    unwanted = shutil.ignore_patterns('__pycache__', '*.egg-info')
    for name in ('nepa_mm', 'configs', 'tools', 'tests'):
        shutil.copytree(REPO / name, folder / name, symlinks=True, ignore=unwanted)
    for path in REPO.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


@pytest.fixture
def environment(tmp_path):
    """A fresh virtual environment that sees what is installed here, except nepa_mm.

    Links stand in for 6 GB of packages. The finder of an editable installation here does not
    work there, because nobody runs the .pth files behind the links.
    """
    packages = tmp_path / 'packages'
    packages.mkdir()
    for site in [Path(path) for path in sys.path if path.endswith('-packages')]:
        for entry in site.iterdir():
            if 'nepa_mm' not in entry.name and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    venv.create(tmp_path / 'venv')
    site, = tmp_path.glob('venv/lib/python*/site-packages')
    (site / 'packages.pth').write_text(f'{packages}\n')
    return tmp_path / 'venv'


def build_wheel(source, folder):
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-index', '--no-build-isolation',
        '-w', folder, source)
    wheel, = folder.glob('*.whl')
    return wheel


def build_from_archive(source, folder):
    code = 'import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])'
    run(sys.executable, '-c', code, folder, cwd=source)
    archive, = folder.glob('*.tar.gz')
    return build_wheel(archive, folder)


@pytest.mark.parametrize('how', ['wheel', 'archive', 'editable'])
def test_install(how, source, environment, tmp_path):
    if how == 'editable':
        target = ['--no-build-isolation', '-e', source]
        home = source / 'nepa_mm'
    else:
        (tmp_path / 'dist').mkdir()
        target = [(build_wheel if how == 'wheel' else build_from_archive)(
            source, tmp_path / 'dist')]
        home, = (path / 'nepa_mm' for path in environment.glob('lib/python*/site-packages'))
    run(sys.executable, '-m', 'pip', '--python', environment / 'bin/python', 'install',
        '--no-deps', '--no-index', *target)

    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    (elsewhere / 'config.py').write_text("_base_ = 'nepa_mm::pretrain/nepa_vit-b.py'")
    python = environment / 'bin/python'
    found = json.loads(run(python, '-c', CHECK, cwd=elsewhere).splitlines()[-1])
    assert Path(found['package']) == home / '__init__.py'
    assert found['metadata'] == found['version']
    assert found['model'] == 'NEPA'
    assert (home / 'visualization/explore.html').is_file()
    expected = {'model-index.yml'} | {
        str(path.relative_to(REPO)) for folder in ('configs', 'tools')
        for path in (REPO / folder).rglob('*') if path.suffix in ('.py', '.yml', '.md', '.sh')}
    assert expected <= set(found['files'])
    if how != 'editable':
        assert not found['links']
        assert not [path for path in home.rglob('.mim/**/*.sh') if not path.stat().st_mode & 0o100]
        tool = run(python, home / '.mim/tools/train.py', '--help', cwd=elsewhere)
        assert '--cfg-options' in tool


def test_requirements_of_the_extras(source, tmp_path):
    """The core names no OpenMMLab package, so that nobody's installation is overwritten."""
    build_wheel(source, tmp_path)
    code = ('import json, pathlib, sys\nfrom importlib.metadata import PathDistribution\n'
            'import zipfile\nwheel = zipfile.Path(sys.argv[1])\n'
            'info, = (p for p in wheel.iterdir() if p.name.endswith(".dist-info"))\n'
            'print(json.dumps(PathDistribution(info).requires))')
    wheel, = tmp_path.glob('*.whl')
    requires = json.loads(run(sys.executable, '-c', code, wheel))
    core = [line for line in requires if 'extra ==' not in line]
    assert core and not [line for line in core if 'mm' in line.replace('timm', '')]
    current = [line for line in requires if 'extra == "mm"' in line]
    assert [line for line in current if not line.startswith(('onedl-mm', 'numpy', 'torch'))] == []
    assert sum(line.startswith('onedl-mm') for line in current) == 4
    assert 'setuptools<82,>=77; extra == "openmmlab"' in requires


def test_model_index():
    """mmengine reads every file that model-index.yml names before it resolves `nepa_mm::`."""
    from mmengine.fileio import load
    metafiles = sorted(path.relative_to(REPO).as_posix()
                       for path in (REPO / 'configs').rglob('metafile.yml'))
    assert sorted(load(REPO / 'model-index.yml')['Import']) == metafiles
    for metafile in metafiles:
        for model in load(REPO / metafile)['Models']:
            assert (REPO / model['Config']).is_file()
