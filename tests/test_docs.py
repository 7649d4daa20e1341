"""The pages: links lead to files, commands name real files and flags, snippets compile."""
import ast
import contextlib
import importlib
import io
import re
import textwrap
from functools import cache
from pathlib import Path

import pytest

from .conftest import REPO
from .tiny_runs import load_tool

PAGES = sorted(page for page in (
    REPO / 'README.md', REPO / 'CONTRIBUTING.md', *REPO.glob('docs/**/*.md'),
    *REPO.glob('configs/**/README.md')) if page.is_file())
BLOCK = re.compile(r'^ *```(\w*)\n(.*?)^ *```', re.M | re.S)
LINK = re.compile(r'\]\(([^)\s]+)\)')
INLINE = re.compile(r'`([^`]+)`')
TOP = 'nepa_mm|configs|tools|benchmarks|demo|tests|docs|resources|\\.dev_scripts'
PATH = re.compile(rf'(?<![\w./:-])(?:{TOP})/[\w./*-]*[\w*]')
BASE = re.compile(r'nepa_mm::([\w./-]+)|(?<![\w/])(_base_/[\w./-]+)')
TOOL = re.compile(r'(?:^|\s)((?:tools|benchmarks|demo)/\S+\.(?:py|sh))((?:\s+.*)?)$')
FLAG = re.compile(r'(?<![\w-])--[a-z][\w-]*')
ENDS = {'tools/dist_train.sh': 'tools/train.py', 'tools/slurm_train.sh': 'tools/train.py',
        'tools/dist_test.sh': 'tools/test.py', 'tools/slurm_test.sh': 'tools/test.py'}


def blocks(text, *languages):
    return [body for language, body in BLOCK.findall(text) if language in languages]


def code(text):
    """Code blocks, and code within the lines of the text."""
    return [body for _, body in BLOCK.findall(text)] + INLINE.findall(BLOCK.sub('', text))


def commands(text):
    """Shell lines, continued ones joined, without comments; and code within lines."""
    for body in [*blocks(text, 'shell', 'bash'), *INLINE.findall(BLOCK.sub('', text))]:
        for line in re.sub(r'\\\n', ' ', body).splitlines():
            yield ' '.join(re.sub(r'\s#.*', '', line).split())


def broken_links(text, folder):
    links = [link.partition('#')[0] for link in LINK.findall(BLOCK.sub('', text))
             if not re.match(r'\w+:', link)]
    return [link for link in links if link and not (folder / link).exists()]


def missing_paths(text):
    found = [path for part in code(text) for path in PATH.findall(part)]
    found += [f'configs/{a or b}' for part in code(text) for a, b in BASE.findall(part)]
    return [path for path in found if 'NAME' not in path and not list(REPO.glob(path))]


@cache
def flags_of(tool, command=''):
    """The flags in the --help text of a tool, or of one of its commands."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        load_tool(Path(tool).stem).main([*filter(None, [command]), '--help'])
    assert end.value.code == 0
    # usage and options; the description above them is prose
    return set(FLAG.findall(out.getvalue()))


def wrong_flags(text):
    wrong = []
    for line in commands(text):
        if (found := TOOL.search(line)) and FLAG.search(found[2]):
            tool = ENDS.get(found[1], found[1])
            command = re.match(r'\s+([a-z]+)', found[2])[1] if 'benchmark' in tool else ''
            wrong += [f'{line}: {flag}' for flag in FLAG.findall(found[2])
                      if flag not in flags_of(tool, command)]
    return wrong


def unknown_flags(text):
    """Flags named alone in the text, without a tool, that no tool has."""
    known = set().union(*(flags_of(str(tool.relative_to(REPO)))
                          for tool in REPO.glob('tools/**/*.py') if tool.name != 'launch.py'),
                        flags_of('benchmarks/benchmark.py', 'step'))
    return [flag for part in INLINE.findall(BLOCK.sub('', text)) if part.startswith('--')
            for flag in FLAG.findall(part) if flag not in known]


def uncompiled(text):
    """Python snippets that do not compile, or import what nepa_mm has not."""
    wrong = []
    for body in blocks(text, 'python'):
        try:
            tree = ast.parse(textwrap.dedent(body))
        except SyntaxError as error:
            wrong.append(str(error))
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith('nepa_mm'):
                try:
                    module = importlib.import_module(node.module)
                    wrong += [f'{node.module}.{name.name}' for name in node.names
                              if not hasattr(module, name.name)]
                except ImportError as error:
                    wrong.append(str(error))
    return wrong


def unknown_targets(text):
    targets = set(re.findall(r'^([\w-]+):', (REPO / 'Makefile').read_text(), re.M))
    return [target for line in commands(text)
            for target in re.findall(r'^make ([\w-]+)', line) if target not in targets]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_page(page):
    text = page.read_text()
    assert not broken_links(text, page.parent)
    assert not missing_paths(text)
    assert not uncompiled(text)
    assert not unknown_targets(text)
    assert not wrong_flags(text)
    assert not unknown_flags(text)


def test_every_page_is_in_the_index():
    index = (REPO / 'docs/README.md').read_text()
    readme = (REPO / 'README.md').read_text()
    for page in REPO.glob('docs/*.md'):
        if page.name != 'README.md':
            assert f']({page.name})' in index and f'](docs/{page.name})' in readme, page.name


def test_what_is_wrong_is_found():
    assert broken_links('[a](nowhere.md) and [b](../README.md#x)', REPO / 'docs') == ['nowhere.md']
    assert missing_paths('`tools/knn.py`, `tools/train.py` and `nepa_mm::pretrain/no.py`') == [
        'tools/knn.py', 'configs/pretrain/no.py']
    continued = 'tools/dist_train.sh C 8 --amp \\\n  --fast   # --slow'
    assert wrong_flags(f'```shell\n{continued}\n```\n') == [
        'tools/dist_train.sh C 8 --amp --fast: --fast']
    assert wrong_flags('`benchmarks/benchmark.py step --compile --gpus 8`')
    assert unknown_flags('`--work-dir` and `--no-such-flag`') == ['--no-such-flag']
    assert unknown_targets('`make test` and `make tea`') == ['tea']
    for snippet in ('if', 'from nepa_mm.convert import x', 'from nepa_mm.models.nepa import x'):
        assert len(uncompiled(f'```python\n{snippet}\n```\n')) == 1
