"""Command-line arguments that several tools share.

This module stands beside the package and imports the standard library only. A tool reads its
command line with it before the slow imports of the package, so that ``--help`` and a wrong flag are
answered at once.
"""
import argparse
import ast
import os
import warnings
from collections.abc import Sequence
from typing import Any

CHECKPOINT_HELP = ('.pth or .safetensors file, folder with published weights, or '
                   'hf://owner/name[@revision]')
WEIGHTS = ('ema', 'raw')
CFG_OPTIONS_HELP = (
    'override settings of the config, e.g. train_dataloader.batch_size=64 or '
    'custom_hooks.0.momentum=0.01. A VALUE is a Python literal ("[1, 2]", "(0.9, 0.95)", '
    '"dict(type=\'X\')", None, True, 1e-3, "\'12\'" for text that looks like a number), or a,b,c '
    'for a list, or plain text. KEY= sets empty text. A dict is merged into the existing one; '
    'KEY._delete_=True empties that one first. In the shell, quote values with blanks or brackets')


def tool_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help prints the docstring of a tool unchanged."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_with_launcher(parser: argparse.ArgumentParser,
                        argv: Sequence[str] | None) -> argparse.Namespace:
    """Add ``--launcher`` and ``--local-rank``, parse, and set ``LOCAL_RANK`` if it is unset."""
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
        help='what started the processes; the shell scripts in tools/ set it')
    parser.add_argument(
        '--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag ``--weights``."""
    parser.add_argument(
        '--weights', choices=WEIGHTS,
        help='EMA or raw weights; default: EMA if the file has them (of a published folder '
        'model.safetensors, which transformers reads, too)')


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``; ``args.cfg_options`` is a dict, or None if the flag is absent."""
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE',
                        help=CFG_OPTIONS_HELP)


class CfgOptions(argparse.Action):
    """Collect ``KEY=VALUE`` in a dict; the flag may be given several times.

    Replaces mmengine's DictAction, which drops blanks and leaves a list of dicts as text.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        options = dict(getattr(namespace, self.dest) or {})
        for item in values:
            key, equals, text = item.partition('=')
            if not equals:
                raise argparse.ArgumentError(
                    self, f'{item!r} is not KEY=VALUE; quote a value with blanks, and put other '
                    'arguments before this flag.')
            if not all(name and name == name.strip() for name in key.split('.')):
                raise argparse.ArgumentError(
                    self, f'{item!r} has no proper key: KEY is names with dots between them, and '
                    'no blanks around =.')
            try:
                value = parse_value(text)
            except ValueError as error:
                raise argparse.ArgumentError(self, f'{key}: {error}') from error
            if key in options and repr(options[key]) != repr(value):
                raise argparse.ArgumentError(
                    self, f'{key} is given twice, as {options[key]!r} and as {value!r}; keep one.')
            options[key] = value
        setattr(namespace, self.dest, options)


def parse_value(text: str) -> Any:
    """Parse the value of a command-line option.

    Args:
        text (str): A Python literal, in which ``dict(...)`` may replace ``{...}``; or elements
            separated by commas, bare or in brackets for a list, in parentheses for a tuple; or
            text, which is returned unchanged.

    Returns:
        Any: The value.

    Raises:
        ValueError: Brackets do not match, or a dict is not a literal.
    """
    inner = text.strip()
    elements = _split(inner)
    if len(elements) > 1 or elements and inner.endswith(','):     # Python would make a tuple
        return [parse_value(element) for element in elements]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')     # SyntaxWarnings about the user's text
            value = _literal(ast.parse(inner, mode='eval').body)
        if isinstance(value, (str, int, float, list, tuple, dict, type(None))):
            return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    for number in (int, float):
        try:
            return number(inner)    # 007, inf
        except ValueError:
            pass
    if inner.lower() in ('true', 'false'):
        return inner.lower() == 'true'
    if inner.startswith(('dict(', '{')):
        raise ValueError(f'{text} is not a dict of Python literals; quote the text in it, as in '
                         '"dict(type=\'X\')".')
    if inner.startswith(('[', '(')):
        if not elements:
            raise ValueError(f'the brackets of {text} do not match; quote a value with blanks, '
                             'and text that starts with a bracket twice, as "\'...\'".')
        inside = _split(inner[1:-1])
        if inside and inner.endswith(']' if inner[0] == '[' else ')'):
            return (list if inner[0] == '[' else tuple)(map(parse_value, inside))
    return text


def _split(text):
    """Split at commas outside brackets and quotes; return [] if one of those is unbalanced."""
    elements, depth, quote, before = [''], 0, '', ','
    for char in text:
        if quote:
            quote = '' if char == quote else quote
        elif char in '\'"' and before in '[({,=:':
            quote = char
        else:
            depth += (char in '[({') - (char in '])}')
        if depth < 0:
            return []
        if char == ',' and not depth and not quote:
            elements.append('')
        else:
            elements[-1] += char
        before = before if char == ' ' else char
    if depth or quote:
        return []
    elements = [element.strip() for element in elements]
    return elements if elements[-1] else elements[:-1]


def _literal(node):
    """``ast.literal_eval`` with support for ``dict(...)``."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict' and not node.args:
        if all(keyword.arg for keyword in node.keywords):
            return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict) and all(node.keys):
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return {ast.List: list, ast.Tuple: tuple}[type(node)](map(_literal, node.elts))
    return ast.literal_eval(node)
