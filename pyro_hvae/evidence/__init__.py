"""The evidence log p(x) itself: estimated, bracketed, and compared with the bound that was trained."""

from pyro_hvae.evidence.annealed import Chains, anneal, annealing, sigmoid_temperatures, temperatures
from pyro_hvae.evidence.importance import Evidence, log_evidence
from pyro_hvae.evidence.sandwich import Sandwich, evidence_sandwich

__all__ = [
    "Chains",
    "Evidence",
    "Sandwich",
    "anneal",
    "annealing",
    "evidence_sandwich",
    "log_evidence",
    "sigmoid_temperatures",
    "temperatures",
]
