"""Bounds on the evidence, estimates from above, and other objectives: one family per file.

They are functions of a run of a problem and know nothing of chains, so they take every pair of Pyro programs.
"""

from pyro_hvae.bounds.base import Bound, Estimate, Evaluation, Objective
from pyro_hvae.bounds.diffusion import DiffusionELBO, SimpleDiffusionLoss
from pyro_hvae.bounds.elbo import LayerwiseELBO, TraceELBO
from pyro_hvae.bounds.explain import Explanation, explain
from pyro_hvae.bounds.importance import IWELBO, MultiSampleBound, ThermodynamicBound, VRBound, log_spacing
from pyro_hvae.bounds.regularised import Regularised, warm_up
from pyro_hvae.bounds.smc import SMCBound
from pyro_hvae.bounds.upper import CUBO, EUBO
from pyro_hvae.bounds.wake import ReweightedWakeSleep, SleepPhase, WakePhase
from pyro_hvae.bounds.weighted import WeightBound

__all__ = [
    "CUBO",
    "EUBO",
    "IWELBO",
    "Bound",
    "DiffusionELBO",
    "Estimate",
    "Evaluation",
    "Explanation",
    "LayerwiseELBO",
    "MultiSampleBound",
    "Objective",
    "Regularised",
    "ReweightedWakeSleep",
    "SMCBound",
    "SimpleDiffusionLoss",
    "SleepPhase",
    "ThermodynamicBound",
    "TraceELBO",
    "VRBound",
    "WakePhase",
    "WeightBound",
    "explain",
    "log_spacing",
    "warm_up",
]
