"""The evidence log p(x) itself: estimated, bracketed, and compared with the bound that was trained."""

from pyro_hvae.evidence.annealed import Chains, Moves, anneal, annealing, sigmoid_temperatures, temperatures
from pyro_hvae.evidence.gap import PosteriorGap, RefinedGuide, posterior_gap, refine
from pyro_hvae.evidence.importance import Evidence, log_evidence
from pyro_hvae.evidence.sandwich import Sandwich, evidence_sandwich

__all__ = [
    "Chains",
    "Evidence",
    "Moves",
    "PosteriorGap",
    "RefinedGuide",
    "Sandwich",
    "anneal",
    "annealing",
    "evidence_sandwich",
    "log_evidence",
    "posterior_gap",
    "refine",
    "sigmoid_temperatures",
    "temperatures",
]
