"""Find the checkpoint from which a run can resume."""
import os
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nepa_mm.checkpoints.io import read_checkpoint


def find_resumable_checkpoint(
        work_dir: str | Path,
        needed: Sequence[str] = ('optimizer', 'message_hub')) -> tuple[str | None, list[str]]:
    """Find the intact checkpoint of a run with the most progress.

    Progress is read from the meta of each file, because copying changes times and names. A file
    is intact if its checksums match, it can be read, and it has the needed entries.

    Args:
        work_dir (str | Path): Folder with the files of the checkpoint hook. A file of another
            name is considered if ``last_checkpoint`` names it.
        needed (Sequence[str]): Entries that a resume needs besides ``state_dict``. Defaults to
            ('optimizer', 'message_hub').

    Returns:
        tuple[str | None, list[str]]: The file, or None; one sentence for each rejected file that
        may have more progress.
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
            checkpoint = read_checkpoint(file)      # verifies checksums
            lacking = [key for key in needed if key not in checkpoint]
            if lacking:
                raise ValueError(f'{file} has no {" and no ".join(lacking)}.')
            return str(file), problems
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return None, problems


def _progress(file):
    """Sort key of a checkpoint: samples seen (or iterations), epochs, whether it was validated."""
    if not file.is_file():
        raise ValueError(f'{file} is no file.')
    if not zipfile.is_zipfile(file):
        raise ValueError(f'{file} is truncated or corrupt.')
    meta = read_checkpoint(file, 'meta')['meta']        # does not read the tensors
    run = meta.get('run')
    seen = run.get('seen') if isinstance(run, dict) else None
    found = [meta.get('iter') if seen is None else seen, meta.get('epoch')]
    if not all(type(number) is int for number in found):
        raise ValueError(f'{file} does not record the progress of the run.')
    return *found, bool(meta.get('validating'))


def keep_file_names(info: dict) -> None:
    """Reduce the paths of a checkpoint's ``runtime_info`` to valid file names and numbers.

    The run will remove these files, and the checkpoint may come from another folder or from
    an untrusted source.

    Args:
        info (dict): Changed in place.
    """
    for key, value in list(info.items()):
        if key == 'last_ckpt' or key.startswith('best_ckpt'):
            name = Path(str(value)).name
            info[key] = name if name.startswith('best_') or key == 'last_ckpt' else None
        elif key.startswith('best_score') and not isinstance(value, (int, float)):
            del info[key]
    ids = info.get('keep_ckpt_ids', [])
    info['keep_ckpt_ids'] = [step for step in ids if type(step) is int] if (
        isinstance(ids, list)) else []
