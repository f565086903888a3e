"""The run directory of one call of fit: its lock, the checkpoint it continues from, config and history."""

from __future__ import annotations

import platform
import secrets
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import pyro_hvae
from pyro_hvae.training import checkpoint
from pyro_hvae.training.checkpoint import CONFIG, CheckpointError
from pyro_hvae.training.distributed import Ranks
from pyro_hvae.training.files import inside
from pyro_hvae.training.history import History
from pyro_hvae.training.lock import RunLock
from pyro_hvae.training.settings import differences

__all__ = ["RunDirectory"]

HISTORY = "history.jsonl"


class RunDirectory:
    """A run directory that is locked inside of the block; without a path, all of this does nothing.

    Args:
        path: the directory, or None.
        resume: False, True, or ``"anyway"`` for other settings than those that were recorded.
        ranks: rank 0 locks and writes; all ranks read.

    Attributes:
        source: the checkpoint to continue from, or None for a new run.
        run: the number of the run, which its checkpoints carry.
        changed: names of settings that differ from the recorded ones, and are taken from this call.

    Raises:
        ValueError: for ``resume`` without a path.
        FileExistsError: if there is a run and ``resume`` is False.
        RuntimeError: if another run trains there.
        CheckpointError: if no checkpoint is whole.
    """

    def __init__(self, path: Path | None, resume: bool | str, ranks: Ranks) -> None:
        if path is None and resume:
            raise ValueError(f"resume={resume!r} continues the run of run_dir: pass run_dir")
        self.path, self.resume, self.ranks = path, resume, ranks
        self.source: Path | None = None
        self.run = secrets.token_hex(8)
        self.changed: frozenset[str] = frozenset()
        self._lock: RunLock | None = None
        self._recorded: dict[str, Any] = {}

    def __enter__(self) -> RunDirectory:
        if self.path is None:
            return self
        error: Exception | None = None
        if self.ranks.first:
            try:
                self._claim(self.path)
            except (RuntimeError, OSError) as caught:
                error = caught
        if self.ranks.any(error is not None):
            raise error or RuntimeError(f"the first process can't use {self.path}: its error says why")
        try:
            self._open(self.path)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _claim(self, path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"run_dir={str(path)!r} is a file: pass the path of a directory")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(path)
        checkpoint.tidy(path / "checkpoints")

    def _open(self, path: Path) -> None:
        names = [name for name in (CONFIG, HISTORY, "checkpoints") if (path / name).exists()]
        numbered = checkpoint.checkpoints(path / "checkpoints")
        if names and not self.resume:
            what = f"its last checkpoint is {numbered[-1].name}" if numbered else "it has no checkpoint yet"
            raise FileExistsError(
                f"{path} already holds a run ({what}): pass resume=True to {'continue' if numbered else 'start'} it"
                f"{'' if numbered else ' again'}, or another run_dir"
            )
        for name in (CONFIG, HISTORY, "checkpoints"):
            inside(path, path / name)
        if not numbered:
            return
        self._recorded = checkpoint.read_config(path) if (path / CONFIG).exists() else {}
        run = self._recorded.get("run")
        self.source = checkpoint.whole(numbered, run)
        self.run = run or self.run

    def compare(self, settings: Mapping[str, Any]) -> None:
        """Compare what shapes the result with what is recorded, where a run is continued.

        Raises:
            CheckpointError: naming each difference, unless ``resume="anyway"``, which warns.
        """
        recorded = self._recorded.get("settings")
        if self.source is None or recorded is None:
            return
        same_python = self._recorded.get("python") == python_version()
        found = differences(recorded, settings, code=same_python)
        self.changed = frozenset(found)
        if found:
            what = f"{self.path} was started with other settings: {'; '.join(found.values())}"
            if self.resume != "anyway":
                raise CheckpointError(
                    f"{what}. Pass what the run was started with, or resume='anyway' to go on with the new settings"
                )
            warnings.warn(f"{what}. The run goes on with those of now", UserWarning, stacklevel=3)
        own = {"pyro_hvae": pyro_hvae.__version__, "torch": torch.__version__, "python": python_version()}
        others = [f"{name} {self._recorded.get(name)} (now {now})" for name, now in own.items()
                  if self._recorded.get(name) != now]  # fmt: skip
        if others:
            warnings.warn(
                f"{self.path} was started by {', '.join(others)}: the last bits of the numbers may differ",
                UserWarning,
                stacklevel=3,
            )

    def begin(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Write the config of a new run, first of all its files; settings that were changed are recorded anew."""
        if self.path is None or not self.ranks.first or (self.source is not None and not self.changed):
            return
        versions = {"pyro_hvae": pyro_hvae.__version__, "torch": torch.__version__, "python": python_version()}
        checkpoint.write_config(self.path, {**versions, "run": self.run, **config, "settings": settings})
        if self.source is None:  # what an earlier start left
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
            (self.path / HISTORY).unlink(missing_ok=True)

    def history(self) -> History:
        """Return the history, which is kept in the directory by rank 0."""
        if self.path is None or not self.ranks.first:
            return History()
        path = self.path / HISTORY
        if self.source is not None and path.exists():
            return History(path, list(History.read(path)))
        return History(path)

    def set_damaged_aside(self) -> None:
        """Rename damaged checkpoints after the one that a run continues from."""
        if self.source is None or not self.ranks.first:
            return
        for path in checkpoint.checkpoints(self.source.parent):
            if path.name > self.source.name:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)


def python_version() -> str:
    return f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}"
