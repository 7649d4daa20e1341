"""Downloads from the Hugging Face Hub, with a checksum test."""
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path


def download(address: str, names: Sequence[str]) -> str:
    """Download the first of several files that a repository on the Hugging Face Hub has.

    Args:
        address (str): ``hf://owner/name[@revision]``.
        names (Sequence[str]): Names of the files, in order of preference.

    Returns:
        str: Path of the file in huggingface_hub's cache, with a verified SHA-256.

    Raises:
        ValueError: The address is malformed, the Hub does not answer, the repository has none of
            the files, or the download is corrupt.
    """
    import huggingface_hub  # optional: only hf:// addresses need it
    match = re.fullmatch(r'hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?', address)
    if not match:
        raise ValueError(f'{address} is not an address of the form hf://owner/name[@revision].')
    for name in names:
        try:
            file = huggingface_hub.hf_hub_download(match[1], name, revision=match[2])
        except huggingface_hub.errors.LocalEntryNotFoundError as error:
            raise ValueError(f'{address} cannot be downloaded, since the Hugging Face Hub does not '
                             'answer, and is not in the local cache.') from error
        except huggingface_hub.errors.EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:      # no such repository, no permission, ...
            reason = str(error).strip().split('\n')[0]
            raise ValueError(f'{address} cannot be downloaded: {reason}') from error
        # the cache names a large file by its SHA-256
        expected = Path(file).resolve().name
        if re.fullmatch('[0-9a-f]{64}', expected) and sha256(file) != expected:
            raise ValueError(f'{file}, downloaded from {address}, is corrupt: its SHA-256 is not '
                             f'{expected}; delete it and try again.')
        return file
    raise ValueError(f'{address} has no {" and no ".join(names)}.')


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
