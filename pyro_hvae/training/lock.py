"""One training run at a time in a run directory."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none, and no lock between processes here
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "RunLock"]

LOCK = ".lock"

_held: set[Path] = set()
_guard = threading.Lock()


class RunLock:
    """A lock that its process holds until :meth:`release`, or until it ends in any way.

    A lock of POSIX belongs to a process: forked workers do not inherit it, and threads of the process do not see it.
    The directories that threads hold are therefore kept in a set.

    Args:
        run_dir: an existing directory.

    Raises:
        RuntimeError: if another process or thread holds the lock, with the process.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir.resolve() / LOCK
        self._file: int | None = None
        with _guard:
            if self.path in _held:
                raise RuntimeError(_taken(run_dir, "another thread of this process"))
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                if fcntl is not None:
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.read(self._file, 200).decode(errors="replace").strip()
                os.close(self._file)
                self._file = None
                raise RuntimeError(_taken(run_dir, owner or "another process")) from error
            _held.add(self.path)
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Release the lock; the file stays."""
        if self._file is None:
            return
        with _guard:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None
            _held.discard(self.path)


def _taken(run_dir: Path, owner: str) -> str:
    return f"{run_dir} is in use by {owner}, which trains there: wait until it ends, or choose another run_dir"
