"""Write the tables of the pages from metafiles and configs, or check that they agree.

    python .dev_scripts/readme_tables.py [--check]

A table stands between `<!-- table: configs/pretrain/metafile.yml -->` and `<!-- end of table -->`
and has the columns of the metafile: Metadata, Metrics, Source. Configs, as in `.../ablations/*.py`,
give a row each from their docstrings: Paper, Changes, Expected.
"""
import argparse
import os
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r'(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)', re.S)
FIELD = re.compile(r'^([A-Z]\w+): +(.*(?:\n {10}.*)*)', re.M)


def table(metafile, folder):
    """The table of a metafile, with links relative to a folder."""
    rows = []
    for model in yaml.safe_load((ROOT / metafile).read_text())['Models']:
        link = os.path.relpath(ROOT / model['Config'], folder)
        row = {'Model': f'[{model["Name"]}]({link})', **model.get('Metadata', {})}
        if 'Parameters' in row:
            row['Parameters'] = f'{row["Parameters"] / 1e6:.1f} M'
        for result in model.get('Results') or []:
            row |= result['Metrics'] | {'Source': result.get('Source', '')}
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row if key != 'Source'))
    columns += ['Source'] * any('Source' in row for row in rows)
    return format_rows(columns, rows)


def docstring_fields(config):
    """The fields of a config's docstring, e.g. ``Paper``, each on one line."""
    docstring = Path(config).read_text().split('"""')[1]
    return {name: ' '.join(value.split()) for name, value in FIELD.findall(docstring)}


def ablations(pattern, folder):
    """The table of the configs that match a pattern, with links relative to a folder."""
    rows = []
    for config in ROOT.glob(pattern):
        fields = docstring_fields(config)
        published = fields['Expected'].partition(' (published)')
        rows.append({
            'Paper': fields['Paper'].removeprefix('arXiv 2512.16922, ').rstrip('.'),
            'Config': f'[{config.stem}]({os.path.relpath(config, folder)})',
            'Changes': ', '.join(f'`{change}`' for change in fields['Changes'].split()),
            'Published': published[0].partition(' top-1')[0] if published[1] else '–'})
    rows.sort(key=lambda row: (row['Paper'].startswith('none'), row['Paper'], row['Config']))
    return format_rows(list(rows[0]), rows)


def format_rows(columns, rows):
    """Markdown; what a row lacks is a dash."""
    cells = [columns, ['---'] * len(columns), *([row.get(c, '–') for c in columns] for row in rows)]
    return ''.join(f'| {" | ".join(map(str, row))} |\n' for row in cells)


def render(page):
    """The text of a page with its tables filled in."""
    def fill(found):
        write = ablations if found[2].endswith('.py') else table
        return found[1] + write(found[2], page.parent) + found[3]
    return MARKED.sub(fill, page.read_text())


def pages():
    """The pages with a table."""
    found = sorted((*ROOT.glob('docs/*.md'), *ROOT.glob('configs/**/README.md')))
    return [path for path in found if MARKED.search(path.read_text())]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='fail instead of writing')
    args = parser.parse_args(argv)
    for path in pages():
        text = render(path)
        if text != path.read_text():
            if args.check:
                raise SystemExit(f'{path} differs from its metafile; '
                                 'type: python .dev_scripts/readme_tables.py')
            path.write_text(text)


if __name__ == '__main__':
    main()
