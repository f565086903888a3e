r"""A posterior as weighted draws: every configuration of discrete tables, a Gaussian, or draws of a proposal.

Three kinds, told apart by looking at the model:

- ``"tables"``: every latent is discrete and finite, and a datum has few configurations.  All are listed, with weights
  that are their exact posterior probabilities.
- ``"gaussian"``: every latent is real and log p(x, z) is quadratic in them, which its gradient shows:
  :math:`\nabla\log p(x, z) = h - \Lambda z` at points far apart.  Then mean :math:`\Lambda^{-1}h`, precision
  :math:`\Lambda` and evidence :math:`\log p(x, m) + \tfrac D2\log 2\pi - \tfrac12\log|\Lambda|` are exact.
- ``"weighted"``: anything else.  Draws of a proposal, weighted by :math:`p(x, z)/q(z)` with the tail of the weights
  smoothed (Pareto Smoothed Importance Sampling, Vehtari, Simpson, Gelman, Yao and Gabry, 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.factorized.families import is_identity
from pyro_hvae.factorized.sites import Latents, Site, latents_of, support_of
from pyro_hvae.psis import psis
from pyro_hvae.traces import Evaluator, Reading, prior_guide, read
from pyro_hvae.traces.reading import total

__all__ = ["Configurations", "Gaussian", "Joint", "Posterior", "Weighted", "exactly"]

Program = Callable[..., Any]

MOST_CONFIGURATIONS = 20_000
"""Of one datum; a longer list is weighed or trained instead."""

MOST_DIMENSIONS = 1000
"""Of a datum's latents, up to which a second derivative is looked at."""


@dataclass(frozen=True)
class Joint:
    """log p(x, z) of a model at given values of its latents."""

    model: Program
    base: Program
    args: tuple
    kwargs: Mapping[str, Any]
    latents: Latents

    def readings(self, guide: Program, values: Mapping[str, Tensor]) -> list[Reading]:
        """A guide and the model at K values of each site, in chunks."""
        count = len(next(iter(values.values())))
        size = max(1, 20_000 // max(1, self.largest))
        found, evaluators = [], {}
        for start in range(0, count, size):
            part = min(size, count - start)
            if part not in evaluators:
                evaluators[part] = Evaluator(self.model, guide, self.args, self.kwargs, num_particles=part)
            found.append(evaluators[part]({name: value[start : start + part] for name, value in values.items()}))
        return found

    @property
    def largest(self) -> int:
        return max(math.prod(site.batch_shape) for site in self.latents.sites.values())

    def shaped(self, reading: Reading, terms: Mapping[str, Tensor]) -> Tensor:
        return total(terms).expand(reading.num_particles, *self.latents.data_shape)

    def at(self, values: Mapping[str, Tensor]) -> Tensor:
        """log p(x, z), ``(K, *data)``."""
        return torch.cat(
            [
                self.shaped(r.over(self.latents.common), r.over(self.latents.common).log_p)
                for r in self.readings(self.base, values)
            ]
        )

    def density(self, guide: Program, values: Mapping[str, Tensor]) -> Tensor:
        """log q(z) of a guide, ``(K, *data)``."""
        parts = [r.over(self.latents.common) for r in self.readings(guide, values)]
        return torch.cat([self.shaped(r, r.log_q) for r in parts])

    def draws(self, guide: Program, count: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Draws of a guide ``(K, *site.shape)``, and log p(x, z) and log q(z) there, ``(K, *data)``."""
        size = max(1, 20_000 // max(1, self.largest))
        values: dict[str, list[Tensor]] = {name: [] for name in self.latents.sites}
        log_p, log_q = [], []
        for start in range(0, count, size):
            part = min(size, count - start)
            reading = read(self.model, guide, self.args, self.kwargs, num_particles=part).over(self.latents.common)
            if reading.structure.auxiliary:
                raise ValueError(
                    f"the guide draws {list(reading.structure.auxiliary)}, which the model lacks: the density of its "
                    "draws of the latents is an integral over them that nobody knows. Give a guide without such sites"
                )
            missing = [name for name in self.latents.sites if name not in reading.values]
            if missing:
                raise ValueError(
                    f"the guide draws nothing for site(s) {missing}, which the model sums out: give a guide that draws "
                    "them too, or use log_evidence, which takes it as it is"
                )
            for name, site in self.latents.sites.items():
                values[name].append(reading.values[name].reshape(part, *site.shape))
            log_p.append(self.shaped(reading, reading.log_p))
            log_q.append(self.shaped(reading, reading.log_q))
        return {name: torch.cat(parts) for name, parts in values.items()}, torch.cat(log_p), torch.cat(log_q)


class Posterior:
    """What is known of a posterior; ``log_evidence`` has the shape of the data, and ``stderr`` its error.

    Attributes:
        how: in words, for reports.
        khat, ess: of the weights behind it; ``-inf`` and None where it is exact.
    """

    how: str
    joint: Joint
    log_evidence: Tensor
    stderr: Tensor
    khat: Tensor
    ess: Tensor | None = None

    def draws(self, count: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Values by site ``(K, *site.shape)``, normalised log-weights and log p(x, z), both ``(K, *data)``."""
        raise NotImplementedError


class Weighted(Posterior):
    """Draws of a proposal with smoothed weights.

    Raises:
        ValueError: for fewer than 100 draws, weights that are NaN or +inf, or none that is positive.
    """

    def __init__(self, joint: Joint, proposals: list[Program], num_samples: int) -> None:
        self.joint, self.how = joint, "importance weights"
        with torch.no_grad():
            self.draw(proposals, num_samples)

    def draw(self, proposals: list[Program], num_samples: int) -> None:
        joint = self.joint
        share = -(-num_samples // len(proposals))
        drawn = [joint.draws(proposal, share) for proposal in proposals]
        self.values = {name: torch.cat([values[name] for values, _, _ in drawn]) for name in joint.latents.sites}
        self.log_joint = torch.cat([log_p for _, log_p, _ in drawn])
        if len(proposals) == 1:
            log_q = drawn[0][2]
        else:  # draws of a mixture in equal parts
            at_all = [joint.density(proposal, self.values) for proposal in proposals]
            log_q = torch.stack(at_all).logsumexp(0) - math.log(len(proposals))
        self.raw = self.log_joint - log_q
        check_weights(self.raw)
        self.log_weights, self.khat = psis(self.raw)
        count = len(self.raw)
        self.ess = 1 / (2 * self.log_weights).logsumexp(0).exp()
        self.log_evidence = self.raw.logsumexp(0) - math.log(count)
        self.stderr = ((count / self.ess - 1).clamp(min=0) / (count - 1)).sqrt()

    def draws(self, count: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        return self.values, self.log_weights, self.log_joint


class Configurations(Posterior):
    """Every configuration of a datum's discrete latents, with its exact posterior probability.

    Attributes:
        sizes: values that each element can take, in the order of the sites and of their elements.
        log_joint: log p(x, z), ``(K, *data)``, the last element running fastest.
    """

    def __init__(self, joint: Joint, supports: Mapping[str, Tensor], elements: Mapping[str, int]) -> None:
        self.joint, self.how = joint, "enumeration"
        latents = joint.latents
        self.elements = {name: elements[name] for name in latents.sites}
        self.sizes = [len(supports[name]) for name in latents.sites for _ in range(elements[name])]
        index = torch.cartesian_prod(*(torch.arange(size, device=latents.like.device) for size in self.sizes))
        self.index = index.reshape(-1, len(self.sizes))
        self.values, start = {}, 0
        for name, site in latents.sites.items():
            flat = supports[name][self.index[:, start : start + elements[name]]]
            flat = flat.reshape(len(flat), *(1,) * len(latents.data_shape), -1)
            self.values[name] = latents.unflatten(flat.expand(len(flat), *latents.data_shape, -1), site)
            start += elements[name]
        self.log_joint = joint.at(self.values)
        check_weights(self.log_joint)
        self.log_evidence = self.log_joint.logsumexp(0)
        self.log_weights = self.log_joint - self.log_evidence
        self.stderr = torch.zeros_like(self.log_evidence)
        self.khat = torch.full_like(self.log_evidence, -torch.inf)

    def draws(self, count: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        return self.values, self.log_weights, self.log_joint


class Gaussian(Posterior):
    """A jointly Gaussian posterior: ``mean`` ``(*data, D)`` and ``precision`` ``(*data, D, D)``, sites side by side."""

    def __init__(self, joint: Joint, mean: Tensor, precision: Tensor, log_evidence: Tensor) -> None:
        self.joint, self.how = joint, "a Gaussian"
        self.mean, self.precision, self.log_evidence = mean, precision, log_evidence
        self.covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        self.stderr = torch.zeros_like(log_evidence)
        self.khat = torch.full_like(log_evidence, -torch.inf)

    def draws(self, count: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        normal = torch.distributions.MultivariateNormal(self.mean, precision_matrix=self.precision)
        flat = normal.sample((count,))
        uniform = torch.full_like(flat[..., 0], -math.log(count))
        return split(self.joint.latents, flat), uniform, self.log_evidence + normal.log_prob(flat)


def exactly(
    model: Program, args: tuple, kwargs: Mapping[str, Any], proposal: Program | None, num_samples: int
) -> tuple[Joint, Posterior | None]:
    """A model's log joint, with the proposal (the prior if None) as its base, and its posterior where that is closed.

    Raises:
        ValueError: for fewer than 100 draws, a model without latents, or an improper posterior.
    """
    if num_samples < 100:
        raise ValueError(f"moments and tails want some hundreds of draws, at least 100; got num_samples={num_samples}")
    joint = joint_of(model, args, kwargs, proposal)
    return joint, exact_posterior(joint)


def joint_of(model: Program, args: tuple, kwargs: Mapping[str, Any], proposal: Program | None) -> Joint:
    base = prior_guide(model) if proposal is None else proposal
    return Joint(model, base, args, kwargs, latents_of(model, base, args, kwargs))


def exact_posterior(joint: Joint) -> Posterior | None:
    """The posterior in closed form, None where it has none that is known here.

    Raises:
        ValueError: for a log joint that is quadratic and has no maximum, so that the posterior is improper.
    """
    with torch.no_grad():
        found = configurations(joint)
        return gaussian(joint) if found is None else found


def configurations(joint: Joint) -> Configurations | None:
    supports, elements, count = {}, {}, 1.0
    for name, site in joint.latents.sites.items():
        support = support_of(site)
        if support is None:
            return None
        supports[name] = support.to(joint.latents.like.device)
        elements[name] = elements_of(joint.latents, site)
        count *= float(len(support)) ** elements[name]
        if count > MOST_CONFIGURATIONS:
            return None
    return Configurations(joint, supports, elements)


def gaussian(joint: Joint) -> Gaussian | None:
    latents = joint.latents
    for site in latents.sites.values():
        if site.support.is_discrete or not is_identity(site.to_support):
            return None
    dims = sum(elements_of(latents, site) for site in latents.sites.values())
    if dims > MOST_DIMENSIONS:
        return None
    zero = latents.like.new_zeros(*latents.data_shape, dims)
    evaluate = Evaluator(joint.model, joint.base, joint.args, joint.kwargs)

    def gradient(z: Tensor, twice: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
        with torch.enable_grad():
            z = z.requires_grad_()
            values = {name: value[0] for name, value in split(latents, z[None]).items()}
            reading = evaluate(values).over(latents.common)
            log_p = joint.shaped(reading, reading.log_p)[0]
            if not log_p.requires_grad:
                return None
            (slope,) = torch.autograd.grad(log_p.sum(), z, create_graph=twice, materialize_grads=True)
            rows = []
            if twice and not slope.requires_grad:
                return None
            for d in range(dims if twice else 0):
                rows.append(torch.autograd.grad(slope[..., d].sum(), z, retain_graph=True, materialize_grads=True)[0])
        curve = torch.stack(rows, -2) if rows else slope.new_zeros(())
        return log_p.detach(), slope.detach(), curve

    first = gradient(zero.clone(), twice=True)
    if first is None or not all(bool(torch.isfinite(part).all()) for part in first):
        return None
    log_p, slope, curve = first

    def quadratic(z: Tensor) -> bool:
        """Whether value and slope at a point are those that the derivatives at zero foretell."""
        there = gradient(z)
        bend = (curve @ z[..., None])[..., 0]
        expected = log_p + ((slope + 0.5 * bend) * z).sum(-1)
        size = slope.abs().max() + (curve.abs() @ z.abs()[..., None]).max()
        height = log_p.abs().max() + ((slope.abs() + bend.abs()) * z.abs()).sum(-1).max()
        tolerance = 1e3 * torch.finfo(zero.dtype).eps
        return (
            there is not None
            and bool(((there[1] - slope - bend).abs() <= tolerance * size).all())
            and bool(((there[0] - expected).abs() <= tolerance * height).all())
        )

    generator = torch.Generator().manual_seed(0)  # a test of the model, which must not change what is drawn later
    for scale in (0.3, 1.0, 10.0):
        if not quadratic(scale * torch.randn(zero.shape, generator=generator, dtype=zero.dtype).to(zero)):
            return None
    precision = -0.5 * (curve + curve.mT)
    factor, failed = torch.linalg.cholesky_ex(precision)
    if bool((failed > 0).any()):
        raise ValueError(
            f"the posterior is improper: log p(x, z) is quadratic in the {dims} latent numbers of a datum and has no "
            f"maximum for {int((failed > 0).sum())} of {failed.numel()} data; give the latents proper priors"
        )
    mean = torch.cholesky_solve(slope[..., None], factor)[..., 0]
    side = torch.randn(zero.shape, generator=generator, dtype=zero.dtype).sign().to(zero)
    away = torch.linalg.solve_triangular(factor.mT, side[..., None], upper=True)[..., 0]
    for deviations in (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0):  # and where the posterior is
        if not quadratic(mean + deviations * away):
            return None
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    evidence = log_p + 0.5 * (slope * mean).sum(-1) + 0.5 * dims * math.log(2 * math.pi) - log_det
    return Gaussian(joint, mean, precision, evidence)


def elements_of(latents: Latents, site: Site) -> int:
    """How many numbers of a site belong to one datum."""
    return latents.flatten(latents.like.expand(1, *site.shape), site).shape[-1]


def split(latents: Latents, flat: Tensor) -> dict[str, Tensor]:
    """Numbers side by side ``(K, *data, D)`` as values by site ``(K, *site.shape)``."""
    sizes = [elements_of(latents, site) for site in latents.sites.values()]
    parts = flat.split(sizes, -1)
    return {name: latents.unflatten(part, site) for (name, site), part in zip(latents.sites.items(), parts)}


def check_weights(weights: Tensor) -> None:
    """Refuse NaN, +inf, and data for which nothing has any weight.

    Raises:
        ValueError: with the count and first index of such data.
    """
    for bad, what in (
        ((torch.isnan(weights) | (weights == torch.inf)).any(0), "have a log-weight that is NaN or +inf"),
        ((weights == -torch.inf).all(0), "have no draw with a positive weight: log p(x, z) is -inf at every one"),
    ):
        if bool(bad.any()):
            first = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"{int(bad.sum())} of {bad.numel()} data {what}" + (f"; the first has index {first}" if first else "")
            )
