"""Delay signals to the end of the present step."""

from __future__ import annotations

import signal
import threading
from typing import Any

__all__ = ["Signals"]


class Signals:
    """Record the first SIGINT or SIGTERM inside of the block; a second has its usual effect.

    In a thread other than the main one, where Python sets no handlers, nothing is recorded.

    Attributes:
        received: the recorded signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._receive)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, self._before[number])
