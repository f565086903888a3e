"""Compare products and other guides: both divergences from the posterior, and k-hat of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.factorized.draws import draw, log_density, prepare
from pyro_hvae.factorized.exact import check_num_samples, exact_posterior
from pyro_hvae.factorized.forward import divergence_from, forward_kl
from pyro_hvae.factorized.gaussian import Gaussian, gaussian_kl
from pyro_hvae.factorized.guide import ProductGuide
from pyro_hvae.factorized.match import match
from pyro_hvae.factorized.posterior import Posterior, Weighted
from pyro_hvae.factorized.reverse import reverse_kl
from pyro_hvae.factorized.sites import latents_of
from pyro_hvae.factorized.tables import Configurations
from pyro_hvae.problem import Problem, of_model
from pyro_hvae.problem.isolation import unchanged
from pyro_hvae.weights import check_weights, good_khat, pareto_khat

__all__ = ["Comparison", "compare_guides"]

Program = Callable[..., Any]


@dataclass(frozen=True, repr=False)
class Comparison:
    """Divergences of guides from one posterior, in nats.

    Tensors by guide have shape ``(G, *plates)``, those of the posterior ``(*plates)``, with the plates common to all
    sites.

    Attributes:
        names: of the guides.
        forward, forward_stderr: KL(p||q), and its Monte Carlo error, 0 where it is exact.
        reverse, reverse_stderr: KL(q||p) likewise; log p(x) less the ELBO.
        khat: of the weights p/q of each guide's draws.
        log_evidence, stderr: log p(x), and its error.
        total_correlation: the smallest KL(p||q) of a product; None where it is unknown.
        evidence_khat: of the weights behind log p(x) and KL(p||q); ``-inf`` where these are exact.
        how: the method that gave the posterior.
        plates: names of the plates.
        num_samples: draws of each guide.
        guides: the guides by name.
    """

    names: tuple[str, ...]
    forward: Tensor
    forward_stderr: Tensor
    reverse: Tensor
    reverse_stderr: Tensor
    khat: Tensor
    log_evidence: Tensor
    stderr: Tensor
    total_correlation: Tensor | None
    evidence_khat: Tensor
    how: str
    plates: tuple[str, ...]
    num_samples: int
    guides: Mapping[str, Program]

    @property
    def elbo(self) -> Tensor:
        """log p(x) - KL(q||p), ``(G, *plates)``."""
        return self.log_evidence - self.reverse

    def to_dataset(self) -> Any:
        """Return an ``xarray.Dataset`` of all numbers, with the dims ``guide`` and the plates."""
        import xarray as xr

        by_guide = ("guide", *self.plates)
        columns = {
            "forward_kl": (by_guide, self.forward),
            "forward_kl_stderr": (by_guide, self.forward_stderr),
            "reverse_kl": (by_guide, self.reverse),
            "reverse_kl_stderr": (by_guide, self.reverse_stderr),
            "elbo": (by_guide, self.elbo),
            "khat": (by_guide, self.khat),
            "log_evidence": (self.plates, self.log_evidence),
            "log_evidence_stderr": (self.plates, self.stderr),
            "log_evidence_khat": (self.plates, self.evidence_khat),
        }
        if self.total_correlation is not None:
            columns["total_correlation"] = (self.plates, self.total_correlation)
        attrs = {"how": self.how, "num_samples": self.num_samples, "good_k": good_khat(self.num_samples)}
        arrays = {name: (dims, value.detach().cpu().numpy()) for name, (dims, value) in columns.items()}
        return xr.Dataset(arrays, coords={"guide": list(self.names)}, attrs=attrs)

    def __repr__(self) -> str:
        count = self.log_evidence.numel()
        good = good_khat(self.num_samples)
        head = f"posterior by {self.how}: log p(x) {_mean(self.log_evidence)}"
        if bool((self.stderr > 0).any()):
            head += f" +- {float(self.stderr.pow(2).mean().sqrt()):.4f}"
        if self.total_correlation is not None:
            head += f", total correlation {_mean(self.total_correlation)}"
        lines = [head + " nats" + (f", means over {count} data" if count > 1 else "")]
        worst = float(self.evidence_khat.max())
        if worst > good:
            lines.append(f"not to be trusted: the weights behind log p(x) and KL(p||q) have k-hat {worst:.2f}")
        width = max(5, *map(len, self.names))
        k_name = "largest k-hat" if count > 1 else "k-hat"
        lines.append(f"{'guide':<{width}}  {'KL(p||q)':>10}  {'KL(q||p)':>10}  {'ELBO':>12}  {k_name:>13}")
        for row, name in enumerate(self.names):
            khat = float(self.khat[row].max())
            lines.append(
                f"{name:<{width}}  {_mean(self.forward[row]):>10}  {_mean(self.reverse[row]):>10}  "
                f"{_mean(self.elbo[row]):>12}  {khat:>13.2f}" + (" !" if khat > good else "")
            )
        if bool((self.khat > good).any()):
            lines.append(f"! k-hat above {good:.2f}: draws of this guide can't be corrected by weights")
        return "\n".join(lines)


@of_model
def compare_guides(
    problem: Problem,
    *,
    guides: Mapping[str, Program] | None = None,
    proposal: Program | None = None,
    families: Mapping[str, Any] | None = None,
    blocks: Sequence[Sequence[str]] = (),
    num_samples: int = 10_000,
) -> Comparison:
    r"""Compute both divergences of guides from the posterior, and k-hat of each.

    For a table, and for a linear-Gaussian model, the divergences of products are exact.  Elsewhere
    :math:`\mathrm{KL}(p\|q) = \mathrm E_p[\log p(x, z) - \log q(z)] - \log p(x)` and
    :math:`\mathrm{KL}(q\|p) = \log p(x) - \mathrm{ELBO}(q)` are estimated, with expectations under the posterior and
    log p(x) from weighted draws of all guides and the proposal together, a mixture in equal parts.

    Args:
        problem: a Pyro program with its data, ``compare_guides(model, *args, **kwargs)``, or a bound problem.
        guides: guides by name, products or others; by default :func:`forward_kl` and :func:`reverse_kl` are fitted.
        proposal: a further guide to draw from; by default the guide of the problem if it has one, else the prior.
        families, blocks: of the products that are fitted.
        num_samples: draws of each guide, at least 100.

    Returns:
        :class:`Comparison`; ``print`` shows a table, ``to_dataset()`` gives the numbers by datum.

    Raises:
        ValueError: as :func:`forward_kl`; for an empty ``guides``, or a guide with auxiliary or enumerated
            sites or without a density.

    Example:
        >>> from pyro_hvae.conjugate import two_causes
        >>> _ = torch.manual_seed(0)
        >>> table = compare_guides(two_causes, torch.tensor(3.0))
        >>> table.forward[0], table.reverse[1]
        (tensor(0.1438), tensor(0.1438))
    """
    check_num_samples(num_samples)
    problem = prepare(problem, proposal)
    if guides is None:
        shared: dict[str, Any] = {"families": families, "blocks": blocks}
        guides = {
            "forward": forward_kl(problem, num_samples=num_samples, **shared),
            "reverse": reverse_kl(problem, **shared),
        }
    elif not isinstance(guides, Mapping):
        raise TypeError(f"guides must be a mapping from names to Pyro programs, got {guides!r}")
    elif not guides:
        raise ValueError("guides is empty: give guides by name, or None for the two products")
    with unchanged(problem.model, problem.guide, *guides.values()), torch.no_grad():
        latents = latents_of(problem)
        exact = exact_posterior(problem, latents)
        posterior: Posterior
        if exact is None:
            problems = [problem, *(problem.with_guide(guide) for guide in guides.values())]
            posterior = Weighted(problems, latents, num_samples * (len(guides) + 1))
        else:
            posterior = exact
        rows = [_row(posterior, guide, num_samples) for guide in guides.values()]
        correlation = None
        if exact is not None:
            marginals = ProductGuide(latents, None, blocks)
            match(marginals, exact, num_samples)
            correlation = divergence_from(exact, marginals)
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return Comparison(
        names=tuple(guides),
        forward=columns[0],
        forward_stderr=columns[1],
        reverse=columns[2],
        reverse_stderr=columns[3],
        khat=columns[4],
        log_evidence=posterior.log_evidence,
        stderr=posterior.stderr,
        total_correlation=correlation,
        evidence_khat=posterior.khat,
        how=posterior.how,
        plates=tuple(plate.name for plate in latents.common),
        num_samples=num_samples,
        guides=dict(guides),
    )


def _row(posterior: Posterior, guide: Program, num_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return KL(p||q) and its error, KL(q||p) and its error, and k-hat."""
    problem, latents = posterior.problem.with_guide(guide), posterior.latents
    drawn = draw(problem, latents, num_samples)
    raw = drawn.log_p - drawn.log_q
    check_weights(raw)
    khat = pareto_khat(raw)
    none = torch.zeros_like(posterior.log_evidence)
    moments = guide.gaussian() if isinstance(guide, ProductGuide) else None
    if isinstance(posterior, Gaussian) and moments is not None:
        forward = gaussian_kl(posterior.mean, posterior.covariance, *moments)
        reverse = gaussian_kl(*moments, posterior.mean, posterior.covariance)
        return forward, none, reverse, none, khat
    values, log_weights, log_joint = posterior.sample(num_samples)
    log_q = log_density(problem, latents, values)
    weights = log_weights.exp()
    gap = torch.where(weights > 0, log_joint - log_q, 0.0)  # +inf where the guide has no density
    mean = (weights * gap).sum(0)
    forward = mean - posterior.log_evidence
    if isinstance(posterior, Configurations):
        terms = log_q.exp() * (log_q - log_weights)
        # The logits of a table are finite: a probability below the smallest number counts as 0.
        reverse = torch.where(log_q.exp() <= 1e-30, 0.0, terms).sum(0)
        return forward, none, reverse, none, khat
    # log p(x) is an estimate from the same draws: the error of KL(p||q) has both parts, to first order.
    influence = weights * (gap - mean)
    if not isinstance(posterior, Gaussian):
        influence = influence - weights + 1 / len(weights)
    reverse = posterior.log_evidence - raw.mean(0)
    reverse_error = (raw.var(0) / len(raw) + posterior.stderr**2).sqrt()
    forward_error = (influence**2).sum(0).sqrt()
    # One draw where the other has no density makes a divergence infinite; then its error is 0.
    return (
        forward,
        torch.where(forward == torch.inf, 0.0, forward_error),
        reverse,
        torch.where(reverse == torch.inf, 0.0, reverse_error),
        khat,
    )


def _mean(value: Tensor) -> str:
    return f"{float(value.mean()):.4f}"
