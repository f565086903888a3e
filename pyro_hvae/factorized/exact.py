"""Closed-form posteriors."""

from __future__ import annotations

import torch

from pyro_hvae.arguments import check_count
from pyro_hvae.factorized.gaussian import Gaussian, gaussian_posterior
from pyro_hvae.factorized.sites import Latents
from pyro_hvae.factorized.tables import Configurations, configurations
from pyro_hvae.problem import Problem

__all__ = ["check_num_samples", "exact_posterior"]


def exact_posterior(problem: Problem, latents: Latents) -> Configurations | Gaussian | None:
    """Return a list of configurations, a Gaussian, or None for any other posterior.

    Raises:
        ValueError: for an improper posterior, or one of discrete latents of which the support of one depends on
            another.
    """
    with torch.no_grad():
        tables = configurations(problem, latents)
        return gaussian_posterior(problem, latents) if tables is None else tables


def check_num_samples(num_samples: int) -> None:
    """Refuse fewer than 100 draws."""
    check_count("num_samples", num_samples)
    if num_samples < 100:
        raise ValueError(f"moments and tails need at least 100 draws, got num_samples={num_samples}")
