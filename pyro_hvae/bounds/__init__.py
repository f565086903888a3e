"""Bounds on the evidence, and objectives that are none: one family a file.

They read traces and know nothing of chains, so every pair of Pyro programs may be given to them.
"""

from pyro_hvae.bounds.base import Bound, Objective
from pyro_hvae.bounds.elbo import LayerwiseELBO, TraceELBO
from pyro_hvae.bounds.importance import IWELBO, ThermodynamicBound, VRBound, log_spacing

__all__ = ["Bound", "IWELBO", "LayerwiseELBO", "Objective", "ThermodynamicBound", "TraceELBO", "VRBound", "log_spacing"]
