r"""The evidence lower bound, whole and layer by layer.

.. math:: \log p(x) \ge \mathrm E_{q(z|x)}\bigl[\log p(x, z) - \log q(z|x)\bigr]

with equality where the guide is the posterior (Auto-Encoding Variational Bayes, Kingma and Welling, 2014).
Along a chain it is the reconstruction :math:`\mathrm E_q\log p(x|z_1)` less one term per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_hvae.bounds.base import Bound, Estimate, Evaluation, Treatment
from pyro_hvae.bounds.divergences import divergence
from pyro_hvae.bounds.gradients import means_of_others
from pyro_hvae.bounds.weighted import WeightBound
from pyro_hvae.problem import Problem, Run, Structure
from pyro_hvae.problem.dependencies import Dependencies

__all__ = ["LayerwiseELBO", "TraceELBO", "layer_terms"]


def layer_terms(run: Run, kl: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the reconstruction and one term per layer, ``(K or 1, *plates)``; the bound is their difference.

    Args:
        kl: KL divergences by layer; layers without one get ``rate_<site>``.
    """
    kl = {} if kl is None else kl
    log_p, log_q = run.log_p, run.log_q
    drawn = run.structure.drawn
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
        >>> import torch
        >>> from pyro_hvae.conjugate import guide, model
        >>> TraceELBO().per_datum(model, guide(), torch.tensor([0.0, 2.0]))
        tensor([-1.2655, -2.2655])
    """

    gradients = ("pathwise", "stl", "score")

    def reduce(self, log_weights: Tensor) -> Tensor:
        return log_weights.mean(0)

    def weights_of(self, run: Run) -> Tensor:
        return run.log_ratios

    def leave_one_out(self, log_weights: Tensor) -> Tensor:
        count = len(log_weights)
        if count == 1:
            return log_weights
        return (log_weights - means_of_others(log_weights)) / count

    def evaluate(self, problem: Problem) -> Evaluation:
        """Return the bound, ``reconstruction`` and ``rate_<site>``; nats, shape of the plates."""
        run = self.draw(problem)
        return Evaluation(self.reduce(run.log_ratios), _means(layer_terms(run), run), run.structure, run.scale)


class LayerwiseELBO(Bound):
    r"""Evidence lower bound, layer by layer, with a closed-form divergence where that is valid.

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
        >>> import torch
        >>> from pyro_hvae.conjugate import guide, model
        >>> LayerwiseELBO().terms(model, guide(scale=1.0), torch.tensor([0.0, 2.0]))["kl_z"]
        tensor([0.0000, 0.5000])
    """

    def estimate(self, problem: Problem) -> Estimate:
        run, value, _ = self._layers(problem)
        return Estimate(value, value, run.scale, run=run)

    def evaluate(self, problem: Problem) -> Evaluation:
        """Return the bound, ``reconstruction``, and ``kl_<site>`` or ``rate_<site>``; nats, shape of the plates."""
        run, value, terms = self._layers(problem)
        return Evaluation(value, _means(terms, run), run.structure, run.scale)

    def _layers(self, problem: Problem) -> tuple[Run, Tensor, dict[str, Tensor]]:
        """Return a run, the bound and its terms."""
        analytic = self.analytic(problem)
        run = self.draw(problem)
        if run.structure is not problem.structure:
            analytic = self.analytic(problem)
        terms = layer_terms(run, self.divergences(run, analytic))
        summed: Any = 0.0
        for name, term in terms.items():
            summed = summed + term if name == "reconstruction" else summed - term
        return run, _mean(summed, run), terms

    def treatment(self, name: str, structure: Structure, dependencies: Dependencies) -> Treatment:
        site = structure.sites[name]
        if site.role != "latent":
            return super().treatment(name, structure, dependencies)
        if structure.enumerated:
            return Treatment("Monte Carlo", "the model sums a discrete site out, so this may be a mixture", "pathwise")
        broken = dependencies.broken_by(name)
        if broken:
            why = f"its model parent(s) {sorted(broken)} descend from it in the guide"
            if not dependencies.complete:
                why = "the programs' dependencies could not be analysed, so a later draw may be a parent"
            return Treatment("Monte Carlo", why + ": a KL would not be the bound's term", "pathwise")
        if site.guide_distribution == "Delta":
            return Treatment("Monte Carlo", "the guide's draw is a transformed auxiliary one", "pathwise")
        return Treatment(
            "analytic",
            f"KL({site.guide_distribution} || {site.model_distribution})",
            "pathwise",
        )

    def analytic(self, problem: Problem) -> frozenset[str]:
        """Return the layers whose term may be a closed-form divergence."""
        structure = problem.structure
        if structure.enumerated:  # p(z_t | its parents) is a mixture then, not the distribution in the trace
            return frozenset()
        dependencies = problem.dependencies
        return frozenset(
            name
            for name in structure.latent
            if structure.sites[name].guide_distribution != "Delta" and not dependencies.broken_by(name)
        )

    def divergences(self, run: Run, analytic: frozenset[str]) -> dict[str, Tensor]:
        """Return the KL divergences of the layers ``analytic`` that have a closed form."""
        divergences = {}
        for name in run.structure.latent:
            if name not in analytic or name not in run.log_p:
                continue
            p, q = run.model_trace.nodes[name], run.guide_trace.nodes[name]
            if not _same(p["scale"], q["scale"]) or not _same(p["mask"], q["mask"]):
                continue
            value = divergence(q["fn"], p["fn"])
            if value is not None:
                divergences[name] = run.weigh(p, value)
        return divergences


def _same(first: Any, second: Any) -> bool:
    return first is second or (not isinstance(first, Tensor) and not isinstance(second, Tensor) and first == second)


def _mean(term: Tensor, run: Run) -> Tensor:
    return term.mean(0).expand(run.shape[1:])


def _means(terms: Mapping[str, Tensor], run: Run) -> dict[str, Tensor]:
    return {name: _mean(term, run) for name, term in terms.items()}
