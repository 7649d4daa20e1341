"""The house: imports run one way, and no file is long without a reason."""
import ast

from .conftest import REPO

PACKAGE = REPO / 'nepa_mm'
# each may import what stands before it
WINGS = ('utils', 'compat', 'checkpoints', 'datasets', 'models', 'engine', 'evaluation',
         'visualization', 'apis')
LONG = {
    'checkpoints/safe_load.py': 'one format, read by one table',
    'models/vit.py': 'a hundred lines describe the options',
}


def module_of(file):
    parts = file.relative_to(REPO).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(file, nested=True):
    """The modules that a file of the package imports, in full; ``nested`` within functions, too."""
    tree = ast.parse(file.read_text())
    package = file.relative_to(REPO).parent.parts
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:len(package) - node.level + 1]) if node.level else ''
            base = '.'.join(filter(None, (base, node.module)))
            for name in node.names:
                inner = REPO.joinpath(*base.split('.'), name.name)
                yield f'{base}.{name.name}' if (
                    inner.is_dir() or inner.with_suffix('.py').is_file()) else base


def sources():
    return [file for file in PACKAGE.rglob('*.py') if '.mim' not in file.parts]


def test_imports_run_one_way():
    for file in sources():
        wing = file.relative_to(PACKAGE).parts[0]
        for module in imports(file) if wing in WINGS else ():
            if module.startswith('nepa_mm.'):
                above = module.split('.')[1]
                assert above in WINGS and WINGS.index(above) <= WINGS.index(wing), (
                    f'{file.name} in {wing} imports {module}')


def test_no_circles_within_a_wing():
    files = {module_of(file): file for file in sources()}

    def walk(module, way):
        assert module not in way, f'{way} -> {module}'
        for other in imports(files[module], nested=False):
            if other in files and files[other].name != '__init__.py':
                walk(other, (*way, module))

    for module, file in files.items():
        if file.name != '__init__.py':
            walk(module, ())


def test_networks_need_no_decoder_and_no_hub():
    files = {module_of(file): file for file in sources()}
    reached, new = set(), [name for name in files if name.startswith('nepa_mm.models.')]
    while new:
        module = new.pop()
        if module in files and module not in reached:
            new += [name for name in imports(files[module], nested=False) if name != 'nepa_mm']
        reached.add(module)
    outside = {module.split('.')[0] for module in reached}
    assert 'torch' in outside and 'mmengine' in outside
    assert not outside & {'PIL', 'cv2', 'mmcv.image', 'torchvision', 'huggingface_hub', 'requests'}


def test_files_are_short():
    for file in sources():
        lines = len(file.read_text().splitlines())
        assert lines <= 300 or str(file.relative_to(PACKAGE)) in LONG, f'{file} has {lines} lines'


def test_public_signatures_carry_type_hints():
    """Of functions, and of the constructors of classes, without a leading underscore."""
    bare = []
    for file in sources():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if getattr(part, 'name', '') == '__init__']
            else:
                methods = [node] if isinstance(node, ast.FunctionDef) else []
            for function in methods if not node_name(node).startswith('_') else ():
                arguments = function.args.args + function.args.kwonlyargs
                bare += [f'{file.name}: {node.name}({one.arg})' for one in arguments
                         if one.arg != 'self' and not one.annotation]
    assert not bare


def node_name(node):
    return getattr(node, 'name', '')
