"""Which OpenMMLab stack is installed, what to type when it is not, and what it has to be told.

One set of imports (mmengine, mmcv, mmpretrain, mmseg), two sets of distributions: the maintained
``onedl-*`` builds (extra ``mm``) and the original ones (extra ``openmmlab``). setup.py reads the
tables below, so what is asked for at installation is what is checked at import. Lower bounds of the
current stack are tested: `make test-oldest` installs what `python nepa_mm/stack.py` prints. There
is no upper bound that was not seen to be needed.
"""
import re
from importlib import import_module, metadata, util
from pathlib import Path

CORE = {    # module: requirement
    'torch': 'torch>=2.4',
    'torchvision': 'torchvision>=0.19',
    'timm': 'timm>=1.0.9',
    'safetensors': 'safetensors>=0.4',
    'numpy': 'numpy>=1.26.4',
    'PIL': 'pillow>=10.1',
    'packaging': 'packaging>=22',
}
CURRENT = {
    'torch': 'torch>=2.5',
    'torchvision': 'torchvision>=0.20',
    'numpy': 'numpy>=2.0.1',        # onedl-mmsegmentation's
    'mmengine': 'onedl-mmengine>=0.10.8',
    'mmcv': 'onedl-mmcv>=2.3.1',    # 2.3.0 asks for numpy<2
    'mmpretrain': 'onedl-mmpretrain>=1.3',
    'mmseg': 'onedl-mmsegmentation>=1.4',
}
CLASSIC = {
    'mmengine': 'mmengine>=0.10',
    'mmcv': 'mmcv-lite>=2.1,<2.2',
    'mmpretrain': 'mmpretrain>=1.2',
    'mmseg': 'mmsegmentation>=1.2',
}
SAME_MODULE = {'mmengine': ['mmengine-lite'], 'mmcv': ['mmcv', 'mmcv-full']}    # classic, too


def name_of(requirement):
    """``'mmcv-lite>=2.1,<2.2'`` -> ``'mmcv-lite'``."""
    return re.match(r'[\w.-]+', requirement)[0]


def oldest():
    """The lower bounds of the current stack as pip's pins: ``['torch==2.5', ...]``."""
    return [requirement.replace('>=', '==') for requirement in (CORE | CURRENT).values()]


def versions(module):
    """The installed distributions that provide a module: {distribution: version}."""
    tables = [table[module] for table in (CORE, CURRENT, CLASSIC) if module in table]
    found = {}
    for name in [*map(name_of, tables), *SAME_MODULE.get(module, [])]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def is_classic():
    """Whether mmengine is the original distribution."""
    return 'mmengine' in versions('mmengine') or 'mmengine-lite' in versions('mmengine')


def require(*modules):
    """Check that modules of the tables above are installed, once, at a version that works.

    Modules without metadata (a clone on PYTHONPATH) are taken as they are.

    Raises:
        ImportError: in one sentence, which says what is wrong and what to type.
    """
    table = CORE | (CLASSIC if is_classic() else CURRENT)
    missing = [table[module] for module in modules if util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f'nepa_mm needs {", ".join(map(name_of, missing))}, not installed here; '
            f'type: {pip_install(missing)}')

    from packaging.requirements import Requirement
    for module in modules:
        found = versions(module)
        if len(found) > 1:
            wanted = (CURRENT if name_of(CURRENT[module]) in found else CLASSIC)[module]
            raise ImportError(
                f'{" and ".join(found)} are both installed and overwrite each other\'s {module}; '
                f'type: pip uninstall -y {" ".join(found)} && {pip_install([wanted])}')
    wrong = {
        f'{name} {version}': table[module] for module in modules
        for name, version in versions(module).items()
        if not Requirement(table[module]).specifier.contains(version, prereleases=True)}
    if wrong:
        raise ImportError(
            f'nepa_mm needs {" ".join(wrong.values())}, but {", ".join(wrong)} is installed; '
            f'type: {pip_install(wrong.values())}')


def pip_install(requirements):
    return 'pip install ' + ' '.join(f'"{requirement}"' for requirement in requirements)


def check_binaries():
    """Load the two packages whose compiled parts often do not fit the machine.

    Raises:
        ImportError: in one sentence, which says what is wrong and what to type.
    """
    for module, command in (
            ('torchvision', 'pip install --upgrade --force-reinstall torch torchvision'),
            ('cv2', 'pip uninstall -y opencv-python && '
             'pip install --force-reinstall --no-deps opencv-python-headless')):
        try:
            import_module(module)
        except Exception as error:  # a torchvision of another torch: RuntimeError; no libGL: ...
            raise ImportError(f'{module} does not load ({error}); type: {command}') from None


def register():
    """Tell mmengine where ``mmseg::``, ``mmpretrain::`` and ``nepa_mm::`` configs are.

    On the classic stack, apply what it needs on a recent torch, too.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    # A module is looked up like a distribution, but found next to what was imported, where the
    # metadata of an editable installation would not lead.
    MODULE2PACKAGE['nepa_mm'] = 'nepa_mm.registry'
    if is_classic():
        from nepa_mm.compat.classic import adapt
        adapt()
    else:
        MODULE2PACKAGE.update(
            {module: name_of(CURRENT[module]) for module in ('mmpretrain', 'mmseg')})


def register_models():
    """Let mmpretrain's ``list_models`` and ``get_model`` find the models of model-index.yml."""
    from mmpretrain.apis.model import ModelHub
    folder = Path(__file__).parents[1] / '.mim'
    if not ModelHub.has('nepa_vit-b'):
        ModelHub.register_model_index(folder / 'model-index.yml', config_prefix=folder)


if __name__ == '__main__':
    print(*oldest())
