"""Variational auto-encoders, Markovian hierarchical VAEs and variational diffusion models as Pyro programs.

A generative chain and an inference chain, in opposite directions, are all three of them; bounds, evidence and
diagnostics read the traces of any pair of Pyro programs.
"""

from pyro_hvae.bounds import (
    CUBO,
    EUBO,
    IWELBO,
    LayerwiseELBO,
    Regularised,
    ReweightedWakeSleep,
    SleepPhase,
    ThermodynamicBound,
    TraceELBO,
    VRBound,
    WakePhase,
    explain,
)

__version__ = "0.1.0"

__all__ = [
    "CUBO",
    "EUBO",
    "IWELBO",
    "LayerwiseELBO",
    "Regularised",
    "ReweightedWakeSleep",
    "SleepPhase",
    "ThermodynamicBound",
    "TraceELBO",
    "VRBound",
    "WakePhase",
    "__version__",
    "explain",
]
