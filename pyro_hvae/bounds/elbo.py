r"""The evidence lower bound, whole and layer by layer.

.. math:: \log p(x) \ge \mathrm E_{q(z|x)}\bigl[\log p(x, z) - \log q(z|x)\bigr]

with equality where the guide is the posterior (Auto-Encoding Variational Bayes, Kingma and Welling, 2014).
Along a chain it splits into the reconstruction :math:`\mathrm E_q\log p(x|z_1)` less one term a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_hvae.bounds.base import Bound, Estimate, Program, Treatment, WeightBound
from pyro_hvae.traces import Reading, Structure
from pyro_hvae.traces.dependencies import Dependencies, dependencies
from pyro_hvae.traces.running import known

__all__ = ["LayerwiseELBO", "TraceELBO", "layer_terms"]


def layer_terms(reading: Reading, kl: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Reconstruction and one term a layer, each ``(K or 1, *plates)``; the bound is the first less the others.

    Args:
        kl: layers for which a true KL divergence stands ready; the others get ``rate_<site>``.
    """
    kl = {} if kl is None else kl
    log_p, log_q = reading.log_p, reading.log_q
    drawn = reading.structure.drawn
    observed = [term for name, term in log_p.items() if name not in drawn]
    observed += [-term for name, term in log_q.items() if name not in drawn]  # a guide's own factors
    terms = {}
    if observed:
        terms["reconstruction"] = sum(observed[1:], start=observed[0])
    for name in drawn:
        if name in kl:
            terms[f"kl_{name}"] = kl[name]
        else:
            terms[f"rate_{name}"] = log_q[name] - log_p[name] if name in log_p else log_q[name]
    return terms


class TraceELBO(WeightBound):
    r"""Evidence lower bound by plain Monte Carlo, :math:`\frac1K\sum_k \log w_k` per datum.

    Args:
        num_particles: K >= 1 draws of the guide, vectorised.
        gradient: ``"pathwise"``; ``"stl"``, of lower variance near the posterior; ``"score"`` where a site has no
            reparameterised draws.

    Raises:
        ValueError: for ``num_particles < 1``, an unknown gradient, or a pair that the gradient does not fit.

    Reference:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014).

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def posterior(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> TraceELBO().per_datum(model, posterior, torch.tensor([0.0, 2.0]))
        tensor([-1.2655, -2.2655])
    """

    gradients = ("pathwise", "stl", "score")

    def reduce(self, log_weights: Tensor) -> Tensor:
        return log_weights.mean(0)

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``reconstruction`` and ``rate_<site>`` for each draw, shape of the plates."""
        with torch.no_grad():
            reading = self.read(model, guide, args, kwargs)
            return _means(layer_terms(reading), reading)


class LayerwiseELBO(Bound):
    r"""Evidence lower bound, layer by layer, with a closed-form divergence wherever that is valid.

    .. math:: \mathrm E_q \log p(x|z_1) - \sum_t \mathrm E_q\bigl[\log q(z_t|\cdot)-\log p(z_t|\mathrm{pa}(z_t))\bigr]

    A term of the sum may be replaced by a KL divergence of the two conditionals only if no parent of
    :math:`z_t` in the model descends from it in the guide: in a chain whose guide runs bottom-up that is the top
    layer alone, in one whose guide runs top-down it is every layer.  Such terms are named ``kl_<site>``; the
    others are estimated from the draws and named ``rate_<site>``, since each may be negative.
    :func:`pyro_hvae.explain` shows which is which, and why.

    Args:
        num_particles: K >= 1 draws of the guide, vectorised.

    Raises:
        ValueError: for ``num_particles < 1`` or draws that can't be reparameterised.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> LayerwiseELBO().terms(model, guide, torch.tensor([0.0, 2.0]))["kl_z"]
        tensor([0.0000, 0.5000])
    """

    def estimate(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Estimate, Reading]:
        reading = self.read(model, guide, args, kwargs)
        terms = layer_terms(reading, self.divergences(model, guide, args, kwargs, reading))
        total = None
        for name, term in terms.items():
            signed = term if name == "reconstruction" else -term
            total = signed if total is None else total + signed
        assert total is not None
        value = _mean(total, reading)
        return Estimate(value, value, reading.scale), reading

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``reconstruction``, and ``kl_<site>`` or ``rate_<site>`` for each draw; nats, shape of the plates."""
        with torch.no_grad():
            reading = self.read(model, guide, args, kwargs)
            return _means(layer_terms(reading, self.divergences(model, guide, args, kwargs, reading)), reading)

    def treatment(self, name: str, structure: Structure, dependencies: Dependencies) -> Treatment:
        site = structure.sites[name]
        if site.role != "latent":
            return super().treatment(name, structure, dependencies)
        if _sums_out(structure):
            return Treatment("Monte Carlo", "the model sums a discrete site out, which may mix this one", "pathwise")
        broken = dependencies.broken_by(name)
        if broken:
            why = f"its model parent(s) {sorted(broken)} descend from it in the guide"
            if not dependencies.complete:
                why = "the programs' dependencies could not be followed, so a later draw may be a parent"
            return Treatment("Monte Carlo", why + ": a KL would not be the bound's term", "pathwise")
        if site.guide_distribution == "Delta":
            return Treatment("Monte Carlo", "the guide's draw is a transformed auxiliary one", "pathwise")
        return Treatment(
            "analytic",
            f"KL({site.guide_distribution} || {site.model_distribution}), if registered",
            "pathwise",
        )

    def divergences(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], reading: Reading
    ) -> dict[str, Tensor]:
        """KL divergences where they are valid and known in closed form."""
        if _sums_out(reading.structure):  # p(z_t | its parents) is a mixture then, not what the trace shows
            return {}
        found = dependencies_of(model, guide, args, kwargs, reading.structure)
        divergences = {}
        for name in reading.structure.latent:
            if name in found.broken or name not in reading.log_p:
                continue
            p, q = reading.model_trace.nodes[name], reading.guide_trace.nodes[name]
            if not _same(p["scale"], q["scale"]) or not _same(p["mask"], q["mask"]):
                continue
            try:
                divergence = kl_divergence(q["fn"], p["fn"])
            except NotImplementedError:
                continue
            divergences[name] = reading.weigh(p, divergence)
        return divergences


class _Found:
    """Dependencies of a pair, with the layers that they break worked out once."""

    def __init__(self, dependencies: Dependencies, structure: Structure) -> None:
        self.dependencies = dependencies
        self.broken = frozenset(
            name
            for name in structure.latent
            if structure.sites[name].guide_distribution == "Delta" or dependencies.broken_by(name)
        )


def dependencies_of(
    model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], structure: Structure
) -> _Found:
    """The dependencies of a pair, analysed once for each structure it shows."""
    cache = known(model, guide).dependencies
    if structure.signature not in cache:
        cache[structure.signature] = _Found(dependencies(model, guide, args, kwargs, structure), structure)
    return cache[structure.signature]


def _sums_out(structure: Structure) -> bool:
    return any(site.role == "enumerated" for site in structure.sites.values())


def _same(first: Any, second: Any) -> bool:
    return first is second or (not isinstance(first, Tensor) and not isinstance(second, Tensor) and first == second)


def _mean(term: Tensor, reading: Reading) -> Tensor:
    shape = tuple(plate.size for plate in reading.plates)
    return term.mean(0).expand(shape)


def _means(terms: Mapping[str, Tensor], reading: Reading) -> dict[str, Tensor]:
    return {name: _mean(term, reading) for name, term in terms.items()}
