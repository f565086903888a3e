"""Bounds on the evidence, estimates from above, and objectives that are neither: one family a file.

They read traces and know nothing of chains, so every pair of Pyro programs may be given to them.
"""

from pyro_hvae.bounds.base import Bound, Objective
from pyro_hvae.bounds.diffusion import DiffusionELBO, SimpleDiffusionLoss
from pyro_hvae.bounds.elbo import LayerwiseELBO, TraceELBO
from pyro_hvae.bounds.explain import Explanation, explain
from pyro_hvae.bounds.importance import IWELBO, ThermodynamicBound, VRBound, log_spacing
from pyro_hvae.bounds.regularised import Regularised, warm_up
from pyro_hvae.bounds.upper import CUBO, EUBO
from pyro_hvae.bounds.wake import ReweightedWakeSleep, SleepPhase, WakePhase

__all__ = [
    "CUBO",
    "EUBO",
    "IWELBO",
    "Bound",
    "DiffusionELBO",
    "Explanation",
    "LayerwiseELBO",
    "Objective",
    "Regularised",
    "ReweightedWakeSleep",
    "SimpleDiffusionLoss",
    "SleepPhase",
    "ThermodynamicBound",
    "TraceELBO",
    "VRBound",
    "WakePhase",
    "explain",
    "log_spacing",
    "warm_up",
]
