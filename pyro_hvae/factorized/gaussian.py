r"""Gaussian posteriors of linear-Gaussian models.

Two conditions must hold.  The model must be linear-Gaussian by its sites and operations
(:func:`pyro_hvae.factorized.affine.is_linear_gaussian`), so that log p(x, z) is quadratic in z everywhere.  And its
gradient :math:`\nabla\log p(x, z) = h - \Lambda z`, computed at zero, must predict value and gradient at distant
points.  Then mean :math:`\Lambda^{-1}h`, precision :math:`\Lambda` and evidence
:math:`\log p(x, m) + \tfrac D2\log 2\pi - \tfrac12\log|\Lambda|` are exact.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hvae.factorized.affine import is_linear_gaussian
from pyro_hvae.factorized.families import is_identity
from pyro_hvae.factorized.posterior import Posterior, Sample
from pyro_hvae.factorized.sites import Latents
from pyro_hvae.problem import Problem, total

__all__ = ["Gaussian", "gaussian_kl", "gaussian_posterior"]

MOST_DIMENSIONS = 1000
"""Largest number of latents of a datum for which second derivatives are computed."""


class Gaussian(Posterior):
    """A Gaussian posterior: ``mean`` ``(*data, D)`` and ``precision`` ``(*data, D, D)``, sites concatenated."""

    def __init__(
        self, problem: Problem, latents: Latents, mean: Tensor, precision: Tensor, log_evidence: Tensor
    ) -> None:
        self.problem, self.latents, self.how = problem, latents, "a Gaussian"
        self.mean, self.precision, self.log_evidence = mean, precision, log_evidence
        self.covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        self.stderr = torch.zeros_like(log_evidence)
        self.khat = torch.full_like(log_evidence, -torch.inf)

    def sample(self, count: int) -> Sample:
        normal = torch.distributions.MultivariateNormal(self.mean, precision_matrix=self.precision)
        flat = normal.sample((count,))
        uniform = torch.full_like(flat[..., 0], -math.log(count))
        return Sample(self.latents.split(flat), uniform, self.log_evidence + normal.log_prob(flat))


class _Expansion(NamedTuple):
    """log p(x, z) at one point of each datum: value ``(*data)``, gradient ``(*data, D)``, second derivatives."""

    value: Tensor
    slope: Tensor
    curve: Tensor


def gaussian_posterior(problem: Problem, latents: Latents) -> Gaussian | None:
    """Return the posterior of a linear-Gaussian model, None for any other.

    Raises:
        ValueError: for a log joint that is quadratic and has no maximum, so that the posterior is improper.
    """
    sites = latents.sites.values()
    if any(site.support.is_discrete or not is_identity(site.to_support) for site in sites):
        return None
    dims = sum(latents.elements(site) for site in sites)
    if dims > MOST_DIMENSIONS or not is_linear_gaussian(problem):
        return None
    zero = latents.like.new_zeros(*latents.data_shape, dims)
    at_zero = _expand(problem, latents, zero, second=True)
    if at_zero is None or not all(bool(torch.isfinite(part).all()) for part in at_zero):
        return None
    generator = torch.Generator().manual_seed(0)  # a separate generator: the check must not change later draws
    for scale in (0.3, 1.0, 10.0):
        point = scale * torch.randn(zero.shape, generator=generator, dtype=zero.dtype).to(zero)
        if not _is_predicted(problem, latents, at_zero, point):
            return None
    value, slope, curve = at_zero
    factor, failed = torch.linalg.cholesky_ex(-0.5 * (curve + curve.mT))
    if bool((failed > 0).any()):
        raise ValueError(
            f"the posterior is improper: log p(x, z) is quadratic in the {dims} latent numbers of a datum and has no "
            f"maximum for {int((failed > 0).sum())} of {failed.numel()} data; give the latents proper priors"
        )
    mean = torch.cholesky_solve(slope[..., None], factor)[..., 0]
    side = torch.randn(zero.shape, generator=generator, dtype=zero.dtype).sign().to(zero)
    away = torch.linalg.solve_triangular(factor.mT, side[..., None], upper=True)[..., 0]
    for deviations in (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0):  # and within the posterior
        if not _is_predicted(problem, latents, at_zero, mean + deviations * away):
            return None
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    evidence = value + 0.5 * (slope * mean).sum(-1) + 0.5 * dims * math.log(2 * math.pi) - log_det
    return Gaussian(problem, latents, mean, -0.5 * (curve + curve.mT), evidence)


def _expand(problem: Problem, latents: Latents, z: Tensor, *, second: bool = False) -> _Expansion | None:
    """Return the expansion at ``z``, ``(*data, D)``; None where log p(x, z) has no derivatives."""
    dims = z.shape[-1]
    with torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        values = {name: value[0] for name, value in latents.split(z[None]).items()}
        run = problem.run(1, values).over(latents.common)
        log_p = run.shaped(total(run.log_p))[0]
        if not log_p.requires_grad:
            return None
        (slope,) = torch.autograd.grad(log_p.sum(), z, create_graph=second, materialize_grads=True)
        rows = []
        if second:
            if not slope.requires_grad:
                return None
            for d in range(dims):
                rows.append(torch.autograd.grad(slope[..., d].sum(), z, retain_graph=True, materialize_grads=True)[0])
    return _Expansion(log_p.detach(), slope.detach(), torch.stack(rows, -2) if rows else slope.new_zeros(()))


def _is_predicted(problem: Problem, latents: Latents, at_zero: _Expansion, z: Tensor) -> bool:
    """Whether value and gradient at ``z`` are those of the quadratic function from the derivatives at zero."""
    there = _expand(problem, latents, z)
    if there is None:
        return False
    value, slope, curve = at_zero
    bend = (curve @ z[..., None])[..., 0]
    expected = value + ((slope + 0.5 * bend) * z).sum(-1)
    size = slope.abs().max() + (curve.abs() @ z.abs()[..., None]).max()
    height = value.abs().max() + ((slope.abs() + bend.abs()) * z.abs()).sum(-1).max()
    tolerance = 1e3 * torch.finfo(z.dtype).eps
    return bool(((there.slope - slope - bend).abs() <= tolerance * size).all()) and bool(
        ((there.value - expected).abs() <= tolerance * height).all()
    )


def gaussian_kl(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """Return KL of two Gaussians, ``(*data, D)`` and ``(*data, D, D)`` to ``(*data)``."""
    factor, other = torch.linalg.cholesky(covariance), torch.linalg.cholesky(other_covariance)
    solved = torch.linalg.solve_triangular(other, factor, upper=False)
    shift = torch.linalg.solve_triangular(other, (mean - other_mean)[..., None], upper=False)
    logs = other.diagonal(dim1=-2, dim2=-1).log().sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return logs + 0.5 * ((solved**2).sum((-2, -1)) + (shift**2).sum((-2, -1)) - mean.shape[-1])
