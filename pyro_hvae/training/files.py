"""Write and read the files of a run directory: atomically, checked, and never outside of it."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

__all__ = ["CheckpointError", "as_directory", "digest", "inside", "sync", "write", "write_atomically"]


class CheckpointError(ValueError):
    """Error: a file is no checkpoint, is damaged, or belongs to another architecture or another run."""


def as_directory(run_dir: str | os.PathLike[str]) -> Path:
    """Return the path of a run directory.

    Raises:
        TypeError: for what is no path.
        ValueError: for an empty one, or one with a null character.
    """
    if not isinstance(run_dir, (str, os.PathLike)):
        raise TypeError(f"run_dir must be the path of a directory, got {run_dir!r}")
    if not str(run_dir) or "\0" in str(run_dir):
        raise ValueError(f"run_dir must be the path of a directory, got {str(run_dir)!r}")
    return Path(run_dir)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(directory: Path, path: Path) -> Path:
    """Return ``path``; refuse one that leaves ``directory``, by a symbolic link or by ``..``.

    Raises:
        CheckpointError: naming the path and its target.
    """
    target = path.resolve()
    if not target.is_relative_to(directory.resolve()):
        raise CheckpointError(
            f"{path} leads to {target}, outside of {directory}: a run directory holds its files itself, so copy the "
            "file into it"
        )
    return path


def write(path: Path, content: bytes) -> None:
    """Write a new file, and force it to the disk.

    Raises:
        FileExistsError: if there is a file or a symbolic link of that name, which is not followed.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name, and rename it; a symbolic link at ``path`` is replaced, not followed."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(directory: Path) -> None:
    """Force the entries of a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
