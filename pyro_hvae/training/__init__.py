"""Training: a loop, checkpoints that resume bit for bit, and many processes."""

from typing import TYPE_CHECKING, Any

from pyro_hvae.training.averages import Averages
from pyro_hvae.training.callbacks import Callback, ConsoleLog, EarlyStopping, ProgressBar, TensorBoard
from pyro_hvae.training.checkpoint import CheckpointError
from pyro_hvae.training.compile import compile_step
from pyro_hvae.training.distributed import Ranks
from pyro_hvae.training.fit import Result, fit, fit_restarts
from pyro_hvae.training.history import History
from pyro_hvae.training.loop import Run
from pyro_hvae.training.nonfinite import NonFiniteError
from pyro_hvae.training.pulse import LostProcessError
from pyro_hvae.training.rebuild import load
from pyro_hvae.training.trust import UntrustedError

if TYPE_CHECKING:
    from pyro_hvae.training.lightning import PairModule

__all__ = [
    "Averages",
    "Callback",
    "CheckpointError",
    "ConsoleLog",
    "EarlyStopping",
    "History",
    "LostProcessError",
    "NonFiniteError",
    "PairModule",
    "ProgressBar",
    "Ranks",
    "Result",
    "Run",
    "TensorBoard",
    "UntrustedError",
    "compile_step",
    "fit",
    "fit_restarts",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import :class:`PairModule`, and Lightning with it, when it is asked for."""
    if name == "PairModule":
        from pyro_hvae.training.lightning import PairModule

        return PairModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
