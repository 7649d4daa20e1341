"""`make faults`: every campaign in full; writes REPORT.md and fails if something was lost."""
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from .campaigns import CAMPAIGNS, run_numbered


def main():
    """Run all, two at a time, print each at its end, and write the report beside this file."""
    rows, failed = ['| campaign | tried | survived | lost | seconds |', '|---|--:|--:|--:|--:|'], 0
    report, began = Path(__file__).with_name('REPORT.md').resolve(), time.perf_counter()
    with ProcessPoolExecutor(2, get_context('spawn'), max_tasks_per_child=1) as pool:
        results = pool.map(run_numbered, range(len(CAMPAIGNS)))
        for (title, *_), (tried, lost, seconds) in zip(CAMPAIGNS, results):
            failed += len(lost)
            counts = f'{tried} | {tried - len(lost)} | {len(lost)}'
            rows.append(f'| {title} | {counts} | {seconds:.0f} |')
            print(rows[-1], *lost[:10], sep='\n', flush=True)
    report.write_text(
        '# What was broken on purpose\n\n'
        f'Written by `make faults` (seed 0) in {time.perf_counter() - began:.0f} seconds, two '
        f'campaigns at a time, with torch {torch.__version__} and Python '
        f'{platform.python_version()} on {len(os.sched_getaffinity(0))} cores. An image survived '
        'when it was read or replaced and counted, a file when it was read as it was or refused '
        'in one sentence with nothing half-written.\n\n' + '\n'.join(rows) + '\n')
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
