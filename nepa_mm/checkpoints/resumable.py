"""The checkpoint from which a run can resume."""
import os
import zipfile
from contextlib import suppress
from pathlib import Path

from nepa_mm.checkpoints.io import read_checkpoint


def find_resumable_checkpoint(work_dir, needed=('optimizer', 'message_hub')):
    """The checkpoint of a run that is furthest along of those that are whole.

    How far one is it says itself, in its meta, for times and names of files change when they
    are copied. Whole are its checksums, what can be read, and what a resume needs.

    Args:
        work_dir (str): Folder with the files of the checkpoint hook. A file of another name
            counts if ``last_checkpoint`` names it.
        needed (tuple[str]): Entries that a resume needs beside ``state_dict``. Defaults to
            ('optimizer', 'message_hub').

    Returns:
        tuple[str | None, list[str]]: The file, None if there is none; what is wrong with
        each that may be further along, a sentence each.
    """
    work_dir, progress, problems = Path(work_dir), {}, []
    names = {file.name for pattern in ('epoch_*.pth', 'iter_*.pth', 'interrupted.pth')
             for file in work_dir.glob(pattern)}
    pointer = work_dir / 'last_checkpoint'
    if pointer.is_file():
        with suppress(OSError):
            names.add(Path(pointer.read_text(errors='replace').strip('\0 \n')).name)
    for file in sorted(work_dir / name for name in names if name):
        if not os.path.lexists(file):
            continue
        try:
            progress[file] = _progress(file)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    for file in sorted(progress, key=progress.get, reverse=True):
        try:
            checkpoint = read_checkpoint(file)      # which looks at checksums
            lacking = [key for key in needed if key not in checkpoint]
            if lacking:
                raise ValueError(f'{file} has no {" and no ".join(lacking)}.')
            return str(file), problems
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return None, problems


def _progress(file):
    """How far a checkpoint is: samples seen (or iterations), epochs, whether it was validated."""
    if not file.is_file():
        raise ValueError(f'{file} is no file.')
    if not zipfile.is_zipfile(file):
        raise ValueError(f'{file} is torn.')
    meta = read_checkpoint(file, 'meta')['meta']        # tensors stay on the disk
    run = meta.get('run')
    seen = run.get('seen') if isinstance(run, dict) else None
    found = [meta.get('iter') if seen is None else seen, meta.get('epoch')]
    if not all(type(number) is int for number in found):
        raise ValueError(f'{file} does not say how far the run was.')
    return *found, bool(meta.get('validating'))
