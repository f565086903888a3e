"""Heartbeats among the processes of a run.

A thread of each process exchanges a few numbers with the others twice a second, over a group of its own.  By this

1. a signal to one process stops all of them after the same step, and no step waits for it;
2. a process that fails, ends or stops answering ends the others, which would wait for it in their next collective.

A step begins with :meth:`Pulse.enter`.  When a signal is known, each process closes the gate to further steps, says how
many it has begun, and opens it again; all stop after the largest of these numbers.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ["GRACE", "INTERVAL", "PATIENCE", "LostProcessError", "Pulse"]

INTERVAL = 0.5
"""Seconds between beats."""
PATIENCE = 15.0
"""Seconds after which a process that does not answer is taken for lost; it answers while it computes or writes."""
GRACE = 10.0
"""Seconds that a process may wait for a lost one in a collective, besides two steps, before it is ended itself."""

WORKING, DONE, FAILED = 0, 1, 2


class LostProcessError(RuntimeError):
    """Error: another process of the run has failed, has ended, or does not answer."""


class Pulse:
    """Heartbeats of one process; all processes of the default group must make one at the same place.

    Args:
        rank, world_size: of the default group.

    Attributes:
        lost: what happened to another process, or None.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.lost: str | None = None
        self._group = dist.new_group(backend="gloo")
        places: list[tuple[str, int]] = [("", 0)] * world_size
        dist.all_gather_object(places, (socket.gethostname(), os.getpid()), group=self._group)
        self._places = places
        self._state, self._received, self._signal = WORKING, 0, 0
        self._begun, self._time, self._longest = 0, time.monotonic(), 0.0
        self._last: int | None = None
        self._gate = threading.Lock()
        self._wake, self._left, self._known = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pyro_hvae pulse", daemon=True)
        self._thread.start()

    def enter(self, received: int | None) -> int | None:
        """Begin a step.

        Args:
            received: a signal that this process has received, or None.

        Returns:
            The signal after which all processes stop here, without this step; None to go on.

        Raises:
            LostProcessError: if another process is lost.
        """
        with self._gate:
            if self.lost is not None:
                self._left.set()
                raise LostProcessError(self.lost)
            if self._last is not None and self._begun >= self._last:
                return self._signal
            self._received = received or 0
            self._begun += 1
            now = time.monotonic()
            self._longest, self._time = max(self._longest, now - self._time), now
            return None

    def leave(self, error: BaseException | None) -> None:
        """End the heartbeats; without an error, wait until all processes are done."""
        self._state = WORKING if self.lost else DONE if error is None else FAILED
        self._wake.set()
        self._left.set()
        self._thread.join(None if error is None else PATIENCE)

    def reason(self, error: BaseException) -> str | None:
        """Return which process is lost, if that is why a collective failed."""
        if isinstance(error, LostProcessError):
            return str(error)
        if not isinstance(error, RuntimeError) or not _of_collective(error):
            return None
        self._left.set()
        self._wake.set()
        self._known.wait(PATIENCE)
        return self.lost or "another process of the run does not take part any more"

    def _exchange(self, *numbers: int) -> torch.Tensor:
        """Return a row of numbers from each process."""
        table = torch.zeros(self.world_size, len(numbers), dtype=torch.int64)
        table[self.rank] = torch.tensor(numbers)
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=PATIENCE)
        self._group.allreduce([table], options).wait()
        return table

    def _beat(self) -> None:
        try:
            while self._alive():
                self._wake.wait(INTERVAL)
                self._wake.clear()
        except Exception:
            self._lose(f"a process of the run has ended, or has not answered for {PATIENCE:g} s: {self._peers()}")

    def _alive(self) -> bool:
        """Exchange one beat; whether there is to be another."""
        state = self._state
        states, signals = self._exchange(state, self._received).T
        if (states == FAILED).any():
            if state != FAILED:
                failed = [rank for rank, other in enumerate(states.tolist()) if other == FAILED]
                self._lose(f"process {failed} of the run has failed: its own error says why")
            return False
        if bool(signals.any()) and self._last is None:
            with self._gate:
                begun = self._exchange(self._begun)
                self._signal, self._last = int(signals.max()), int(begun.max())
        return not bool((states == DONE).all())

    def _peers(self) -> str:
        """Describe the other processes, and where they are on this machine, whether they are there."""
        others = [(rank, *place) for rank, place in enumerate(self._places) if rank != self.rank]
        return "; ".join(f"process {rank} ({pid} on {host}){self._condition(rank)}" for rank, host, pid in others)

    def _condition(self, rank: int) -> str:
        host, pid = self._places[rank]
        if host != socket.gethostname():
            return ""
        state = _process_state(pid)
        return {"": " has ended", "T": " is stopped", "Z": " has ended"}.get(state, " is there")

    def _lose(self, what: str) -> None:
        """Note that a process is lost, and see to it that this one does not wait for it for ever."""
        self.lost = what
        self._known.set()
        stopped = self._stopped()
        for pid in stopped:  # it goes on, learns that it is given up, and ends in its own way
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)
        grace = GRACE + 2 * self._longest  # it may be computing
        if self._left.wait(grace):
            return
        for pid in stopped:  # its sockets are closed, so that nobody waits for it
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if self._left.wait(grace):
            return
        print(f"{what}. This process waits for it in a collective, and ends", file=sys.stderr, flush=True)
        os._exit(1)

    def _stopped(self) -> list[int]:
        """Return processes of this machine that a signal has stopped."""
        here = socket.gethostname()
        own = [pid for host, pid in self._places if host == here and pid != os.getpid()]
        return [pid for pid in own if _process_state(pid) == "T"]


def _process_state(pid: int) -> str:
    """Return the letter by which Linux tells the state of a process; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        if os.name != "posix":  # there, os.kill ends a process
            return "?"
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:
            pass
        return "?"


def _of_collective(error: RuntimeError) -> bool:
    """Whether an error is of torch's communication."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "process group", "timed out"))
