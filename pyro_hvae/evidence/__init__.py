"""Estimates and brackets of the evidence log p(x), and its gap to the bound."""

from pyro_hvae.evidence.annealed import Chains, anneal, annealing
from pyro_hvae.evidence.conditioned import Conditioned, ConditionOptions, condition, reconstruction_guidance
from pyro_hvae.evidence.gap import PosteriorGap, RefinedGuide, posterior_gap, refine
from pyro_hvae.evidence.importance import Evidence, log_evidence
from pyro_hvae.evidence.interval import EvidenceInterval, Interval, evidence_interval
from pyro_hvae.evidence.learned import AnnealedBound
from pyro_hvae.evidence.moves import Moves
from pyro_hvae.evidence.roughness import RoughDensityWarning
from pyro_hvae.evidence.sandwich import Sandwich, evidence_sandwich
from pyro_hvae.evidence.temperatures import sigmoid_temperatures, temperatures

__all__ = [
    "AnnealedBound",
    "Chains",
    "ConditionOptions",
    "Conditioned",
    "Evidence",
    "EvidenceInterval",
    "Interval",
    "Moves",
    "PosteriorGap",
    "RefinedGuide",
    "RoughDensityWarning",
    "Sandwich",
    "anneal",
    "annealing",
    "condition",
    "evidence_interval",
    "evidence_sandwich",
    "log_evidence",
    "posterior_gap",
    "reconstruction_guidance",
    "refine",
    "sigmoid_temperatures",
    "temperatures",
]
