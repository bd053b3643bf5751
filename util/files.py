"""Atomic writes, and the digest of a file."""

import contextlib
import errno
import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without an error, that file replaces `path` at once.

    Readers see the earlier file or the whole new one, also after a crash or a power cut. If the block raises, `path`
    stays as it was and the temporary file is removed. Missing parent folders are made.

    The temporary name ends in `.partial`, so that a search for `*.png` never finds it. A writer that picks its format
    by the ending has to be told: `image.save(partial, format="PNG")`; `numpy.savez` needs an open file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # unique among processes and machines
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        with partial.open("rb") as file:  # by name: the writer may itself have replaced the file
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise OSError unless a file can be made in the place of `path`: before the work rather than after it."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()


def file_digest(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; reads 1 MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
