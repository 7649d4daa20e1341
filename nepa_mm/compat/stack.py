"""Requirements: which OpenMMLab stack is installed, whether it works, how to install it.

Two sets of distributions provide the same modules (mmengine, mmcv, mmpretrain, mmseg): the
maintained ``onedl-*`` builds (extra ``mm``, the current stack) and the original ones (extra
``openmmlab``, the classic stack). setup.py reads the tables below, so installation and import check
the same requirements. ``make test-oldest`` tests the lower bounds of the current stack, which
``python nepa_mm/compat/stack.py`` prints. An upper bound is set only where a newer version failed.
"""
import re
from collections.abc import Iterable
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
    'mmcv': 'onedl-mmcv>=2.3.1',    # 2.3.0 requires numpy<2
    'mmpretrain': 'onedl-mmpretrain>=1.3',
    'mmseg': 'onedl-mmsegmentation>=1.4',
}
CLASSIC = {
    'mmengine': 'mmengine>=0.10',
    'mmcv': 'mmcv-lite>=2.1,<2.2',
    'mmpretrain': 'mmpretrain>=1.2',
    'mmseg': 'mmsegmentation>=1.2',
}
SAME_MODULE = {'mmengine': ['mmengine-lite'], 'mmcv': ['mmcv', 'mmcv-full']}    # classic as well


def name_of(requirement: str) -> str:
    """Name in a requirement: ``'mmcv-lite>=2.1,<2.2'`` -> ``'mmcv-lite'``."""
    return re.match(r'[\w.-]+', requirement)[0]


def oldest() -> list[str]:
    """Lower bounds of the current stack as pins: ``['torch==2.5', ...]``."""
    return [requirement.replace('>=', '==') for requirement in (CORE | CURRENT).values()]


def versions(module: str) -> dict[str, str]:
    """Versions of the installed distributions that provide a module, by distribution."""
    tables = [table[module] for table in (CORE, CURRENT, CLASSIC) if module in table]
    found = {}
    for name in [*map(name_of, tables), *SAME_MODULE.get(module, [])]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def is_classic() -> bool:
    """Whether mmengine is the original distribution."""
    return 'mmengine' in versions('mmengine') or 'mmengine-lite' in versions('mmengine')


def require(*modules: str) -> None:
    """Check that one distribution provides each module, at a supported version.

    Modules without metadata (a clone on PYTHONPATH) are not checked.

    Raises:
        ImportError: A check failed. The message is one sentence with the command that fixes it.
    """
    table = CORE | (CLASSIC if is_classic() else CURRENT)
    missing = [table[module] for module in modules if util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f'nepa_mm needs {", ".join(map(name_of, missing))}, not installed here; '
            f'run: {pip_install(missing)}')

    from packaging.requirements import Requirement
    for module in modules:
        found = versions(module)
        if len(found) > 1:
            wanted = (CURRENT if name_of(CURRENT[module]) in found else CLASSIC)[module]
            raise ImportError(
                f'{" and ".join(found)} are both installed and overwrite each other\'s {module}; '
                f'run: pip uninstall -y {" ".join(found)} && {pip_install([wanted])}')
    wrong = {
        f'{name} {version}': table[module] for module in modules
        for name, version in versions(module).items()
        if not Requirement(table[module]).specifier.contains(version, prereleases=True)}
    if wrong:
        raise ImportError(
            f'nepa_mm needs {" ".join(wrong.values())}, but {", ".join(wrong)} is installed; '
            f'run: {pip_install(wrong.values())}')


def pip_install(requirements: Iterable[str]) -> str:
    """Command that installs requirements."""
    return 'pip install ' + ' '.join(f'"{requirement}"' for requirement in requirements)


def check_binaries() -> None:
    """Import torchvision and cv2, whose compiled parts often do not fit the machine.

    Raises:
        ImportError: One failed. The message is one sentence with the command that fixes it.
    """
    for module, command in (
            ('torchvision', 'pip install --upgrade --force-reinstall torch torchvision'),
            ('cv2', 'pip uninstall -y opencv-python && '
             'pip install --force-reinstall --no-deps opencv-python-headless')):
        try:
            import_module(module)
        except Exception as error:  # torchvision built for another torch raises RuntimeError
            raise ImportError(f'{module} does not load ({error}); run: {command}') from None


def register() -> None:
    """Register the locations of ``mmseg::``, ``mmpretrain::`` and ``nepa_mm::`` configs.

    On the classic stack, also apply the patches that it needs on a recent torch.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    # A module instead of a distribution: mmengine finds it next to the imported package, while the
    # metadata of an editable installation does not lead there.
    MODULE2PACKAGE['nepa_mm'] = 'nepa_mm.registry'
    if is_classic():
        from nepa_mm.compat.classic import adapt
        adapt()
    else:
        MODULE2PACKAGE.update(
            {module: name_of(CURRENT[module]) for module in ('mmpretrain', 'mmseg')})


def register_models() -> None:
    """Add the models of model-index.yml to mmpretrain's ``list_models`` and ``get_model``."""
    from mmpretrain.apis.model import ModelHub
    folder = Path(__file__).parents[1] / '.mim'
    if not ModelHub.has('nepa_vit-b'):
        ModelHub.register_model_index(folder / 'model-index.yml', config_prefix=folder)


if __name__ == '__main__':
    print(*oldest())
