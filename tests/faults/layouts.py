"""Go on with a run on other numbers of processes, from random moments, by the typed commands."""
import shutil
from pathlib import Path

from ..test_resume import EPOCHS, LAYOUTS, NUM, by_iterations, save_run, train, updates
from ..tiny_runs import save_image

CHANGES_PER_RUN = 3


def layouts(rng, num):
    """Yield, for each of ``num`` parts of runs, what was lost, or None.

    Learning rates, files and pixels of every update are those of an uninterrupted run.
    """
    changes = min(CHANGES_PER_RUN, num // 4)
    for i in range(NUM):
        save_image(Path(f'data/imagenet/train/n{i % 2:08d}/{i}.JPEG'))
    for change, names in ((None, list(LAYOUTS)), (by_iterations, list(LAYOUTS)[:2])):
        shutil.rmtree('straight', ignore_errors=True)
        config = save_run(change=change)
        train(config, 'straight', 'one_process')
        expected, done, run = updates('straight'), 0, 0
        while done < num // 2:
            folder, run, seen = f'run{run}', run + 1, 0
            shutil.rmtree(folder, ignore_errors=True)
            for part in range(changes + 1):
                last = part == changes
                stop = seen + int(rng.integers(1, max(2, (NUM // 2 * EPOCHS - seen) // 3)))
                train(config, folder, str(rng.choice(names)), stop_at=None if last else stop,
                      status=0 if last else 143)
                rows = updates(folder)
                for file in Path(folder).glob('record_*.jsonl'):
                    file.unlink()
                wrong = [row[:3] for row in rows] != [
                    row[:3] for row in expected[seen:seen + len(rows)]]
                seen, done = seen + len(rows), done + 1
                yield (f'{folder}: updates up to {seen} differ' if wrong else
                       f'{folder} ended after {seen} of {len(expected)} updates'
                       if last and seen != len(expected) else None)
