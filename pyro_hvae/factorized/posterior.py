r"""Posteriors as weighted draws, of three kinds:

- :class:`pyro_hvae.factorized.tables.Configurations`: every latent is discrete and finite, and a datum has few
  configurations.  All are listed, with their exact posterior probabilities as weights.
- :class:`pyro_hvae.factorized.gaussian.Gaussian`: the posterior of a linear-Gaussian model, in closed form.
- :class:`Weighted`: anything else.  Draws of a proposal, weighted by :math:`p(x, z)/q(z)` with the tail of the weights
  smoothed (Pareto Smoothed Importance Sampling, Vehtari, Simpson, Gelman, Yao and Gabry, 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hvae.factorized.draws import draw, log_density
from pyro_hvae.factorized.sites import Latents
from pyro_hvae.problem import Problem
from pyro_hvae.weights import check_weights, effective_sample_size, log_mean_exp, psis

__all__ = ["Posterior", "Sample", "Weighted"]


class Sample(NamedTuple):
    """Values with the posterior's weights.

    Attributes:
        values: by site, ``(K, *site.shape)``.
        log_weights: normalised along dim 0, ``(K, *data)``.
        log_joint: log p(x, z), ``(K, *data)``.
    """

    values: dict[str, Tensor]
    log_weights: Tensor
    log_joint: Tensor


class Posterior:
    """A posterior; ``log_evidence`` has the shape of the data, and ``stderr`` is its error.

    Attributes:
        how: the method, for reports.
        khat, ess: of its weights; ``-inf`` and None where it is exact.
    """

    how: str
    problem: Problem
    latents: Latents
    log_evidence: Tensor
    stderr: Tensor
    khat: Tensor
    ess: Tensor | None = None

    def sample(self, count: int) -> Sample:
        """Return values with weights; ``count`` of them where draws are made."""
        raise NotImplementedError


class Weighted(Posterior):
    """Draws of proposals, a mixture in equal parts, with smoothed weights.

    Args:
        problems: one model with its data and several guides.
        latents: of the model.
        num_samples: of all guides together.

    Raises:
        ValueError: for guides that all leave out a part of the model's support, weights that are NaN or +inf, or a
            datum without a positive one.
    """

    def __init__(self, problems: Sequence[Problem], latents: Latents, num_samples: int) -> None:
        self.problem, self.latents, self.how = problems[0], latents, "importance weights"
        if all(problem.structure.uncovered for problem in problems):  # one guide that covers the support suffices
            problems[0].require_density("a posterior by importance weights")
        share = -(-num_samples // len(problems))
        with torch.no_grad():
            drawn = [draw(problem, latents, share) for problem in problems]
            self.values = {name: torch.cat([part.values[name] for part in drawn]) for name in latents.sites}
            self.log_joint = torch.cat([part.log_p for part in drawn])
            log_q = drawn[0].log_q
            if len(problems) > 1:
                at_all = [log_density(problem, latents, self.values) for problem in problems]
                log_q = torch.stack(at_all).logsumexp(0) - math.log(len(problems))
            raw = self.log_joint - log_q
            check_weights(raw)
            self.log_weights, self.khat = psis(raw)
            self.ess = effective_sample_size(self.log_weights)
            self.log_evidence = log_mean_exp(raw)
            count = len(raw)
            self.stderr = ((count / self.ess - 1).clamp(min=0) / (count - 1)).sqrt()

    def sample(self, count: int) -> Sample:
        return Sample(self.values, self.log_weights, self.log_joint)
