"""Run the code cells of a notebook in one namespace, without Jupyter, and store what they show.

    python .dev_scripts/run_notebook.py docs/quickstart.ipynb

The cells hold plain Python, no magics. What a cell prints becomes its text output. The value of its
last expression becomes a PNG for a PIL image, and text for anything else. The cells run in the
notebook's folder, as in Jupyter.
"""
import argparse
import ast
import base64
import contextlib
import io
import json
import os
from pathlib import Path

MAX_BYTES = 300_000     # of a notebook with its outputs


def run_cell(source, namespace, name):
    """Run one cell.

    Args:
        source (str): Its code.
        namespace (dict): The globals of the notebook, changed in place.
        name (str): File name in tracebacks.

    Returns:
        tuple[str, Any]: What it printed, and the value of its last expression (None without one).
    """
    *statements, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        statements, last = [*statements, last], None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(statements, []), name, 'exec'), namespace)
        if last:
            value = eval(compile(ast.Expression(last.value), name, 'eval'), namespace)
    return printed.getvalue(), value


def run_notebook(path, replace=lambda source: source):
    """Run all code cells in order, in the folder of the notebook.

    Args:
        path (str | Path): The notebook.
        replace (Callable): Maps the source of a cell to the source that is run. Defaults to
            the identity.

    Returns:
        tuple[dict, dict]: The notebook with the outputs of this run, and the globals.
    """
    notebook = json.loads(Path(path).read_text(encoding='utf-8'))
    namespace, before = {'__name__': '__main__'}, os.getcwd()
    os.chdir(Path(path).parent)
    try:
        cells = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
        for number, cell in enumerate(cells, 1):
            printed, value = run_cell(
                replace(''.join(cell['source'])), namespace, f'{Path(path).name}, cell {number}')
            cell.update(execution_count=number, outputs=outputs(printed, value, number))
    finally:
        os.chdir(before)
    return notebook, namespace


def outputs(printed, value, number):
    """The outputs of a cell in the format of a notebook."""
    found = []
    if printed:
        found.append(dict(output_type='stream', name='stdout', text=printed.splitlines(True)))
    if value is not None:
        data = {'text/plain': [repr(value)]}
        if hasattr(value, 'save'):
            png = io.BytesIO()
            value.convert('RGB').save(png, 'PNG', optimize=True)
            data = {'image/png': base64.b64encode(png.getvalue()).decode(),
                    'text/plain': [f'<image of {value.width} x {value.height} pixels>']}
        found.append(dict(output_type='execute_result', execution_count=number, metadata={},
                          data=data))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebook', type=Path)
    args = parser.parse_args(argv)
    notebook, _ = run_notebook(args.notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + '\n'
    if len(text.encode()) > MAX_BYTES:
        raise SystemExit(f'{args.notebook} would have {len(text.encode())} bytes with its outputs, '
                         f'more than {MAX_BYTES}; nothing was written.')
    args.notebook.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
