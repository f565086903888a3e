r"""Estimate the evidence by weighted draws: marginalisation (seed eq. 1) and Bayes' rule (seed eq. 2).

.. math:: p(x) = \int p(x, z)\,dz = \mathrm E_{q(z|x)}\Bigl[\frac{p(x, z)}{q(z|x)}\Bigr],
          \qquad p(x) = \frac{p(x, z^*)}{p(z^*|x)}.

The first is estimated with the guide as q, or with the prior (simple Monte Carlo), or summed exactly where every
latent is discrete.  The second needs a posterior density at a point; it is estimated from draws of an independence
sampler that has the guide as its proposal (Marginal Likelihood From the Metropolis-Hastings Output, Chib and Jeliazkov,
2001).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from pyro.infer import config_enumerate
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hvae.arguments import check_choice, check_count, check_switch
from pyro_hvae.bounds.smc import SMCBound
from pyro_hvae.evidence.annealed import run_chains, tuned_moves
from pyro_hvae.evidence.bases import base_problem, drawn_prior
from pyro_hvae.evidence.path import Path
from pyro_hvae.modules import evaluation_mode
from pyro_hvae.notebook import html_table
from pyro_hvae.problem import Problem, of_pair
from pyro_hvae.problem.isolation import isolated
from pyro_hvae.problem.prior import no_latents
from pyro_hvae.weights import (
    check_weights,
    chunks,
    default_chunk,
    effective_sample_size,
    good_khat,
    joined,
    log_mean_exp,
    log_mean_exp_stderr,
    pareto_khat,
)

__all__ = ["Evidence", "Sampling", "draw_log_weights", "evidence_of_weights", "log_evidence"]


@dataclass(frozen=True)
class Evidence:
    """An estimate of log p(x) for each datum, in nats, with diagnostics of its reliability.

    Attributes:
        value: the estimate, shape of the plates common to all sites.
        stderr: its standard error; meaningful where ``khat`` is at most ``good``, and 0 where the sum is exact.
        ess: effective number of the draws' weights, between 1 and ``num_samples``.
        khat: Pareto shape of the weights (``-inf``: exact); above ``good`` neither value nor error is reliable.
        num_samples: draws a datum; 1 where the sum is exact.
        method: the method; ``"enumerate"`` where no latent was drawn.
    """

    value: Tensor
    stderr: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: int
    method: str

    @property
    def good(self) -> float:
        """The largest reliable k-hat of so many draws, :func:`pyro_hvae.weights.good_khat`."""
        return good_khat(max(self.num_samples, 2))

    def bits_per_dim(self, dims: int) -> Tensor:
        """Return -log2 p(x) per dimension of a datum.

        Raises:
            ValueError: for ``dims < 1``.
        """
        if dims < 1:
            raise ValueError(f"a datum has at least one dimension, got {dims}")
        return -self.value / (dims * math.log(2.0))

    def __str__(self) -> str:
        (_, value), (name, error), (_, khat) = self._facts().items()
        mean = "mean " if self.value.dim() else ""
        return f"{self._title()}: {mean}{value}, {name} {error}, k-hat {khat}"

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._facts())

    def _title(self) -> str:
        return f"log p(x) by {self.method}, {self.num_samples} draws"

    def _facts(self) -> dict[str, str]:
        above, worst = int((self.khat > self.good).sum()), float(self.khat.max())
        if not self.value.dim():
            return {
                "value": f"{float(self.value):.4f} nats, of all data together",
                "standard error": f"{float(self.stderr):.3g}",
                "k-hat": f"{worst:.2f}, {'above' if above else 'within'} the limit {self.good:.2f}",
            }
        return {
            "mean": f"{float(self.value.mean()):.4f} nats over {self.value.numel()} data",
            "largest standard error": f"{float(self.stderr.max()):.3g}",
            "k-hat": f"above {self.good:.2f} for {above} (largest {worst:.2f})",
        }


@dataclass(frozen=True)
class Sampling:
    """Draws per datum, draws at once (None: chosen by the size of the programs), and whether to show a bar."""

    num_samples: int
    chunk_size: int | None = None
    progress: bool = False

    def counts(self, problem: Problem) -> list[int]:
        """Return the numbers of draws that run at once."""
        return chunks(self.num_samples, self.chunk_size or default_chunk(problem.structure.entries))


@of_pair
def log_evidence(
    problem: Problem,
    *,
    num_samples: int = 1000,
    method: str = "importance",
    chunk_size: int | None = None,
    progress: bool = False,
) -> Evidence:
    r"""Estimate log p(x) for each datum.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``; or a bound
            :class:`~pyro_hvae.problem.Problem` instead of all of these.  The guide may be None for ``"prior"``,
            ``"annealed"`` (from the prior), ``"enumerate"``, ``"exact"``, and for a model whose latents are all summed
            out.
        num_samples: K draws a datum.
        method: ``"importance"`` weighs draws of the guide; ``"prior"`` draws of the prior; ``"bayes"`` divides the
            joint by the posterior density at a point; ``"annealed"`` runs annealed importance sampling from the guide
            with ``num_samples`` chains (see :func:`pyro_hvae.evidence.anneal` for more control); ``"smc"`` resamples
            the guide's draws along a chain (:class:`pyro_hvae.SMCBound`): 50 filters of ``num_samples / 50`` particles,
            whose estimates are averaged; error, ess and k-hat are those of the 50; ``"enumerate"`` sums exactly over
            latents that are all discrete; ``"exact"`` asks the model, which has ``log_marginal`` (a
            :class:`~pyro_hvae.StateSpace` with linear-Gaussian kernels or discrete states).  Where the model marks
            all latents ``infer={"enumerate": "parallel"}``, every method is that sum.
        chunk_size: draws (or chains) that run at once; memory grows with it, and with K numbers per datum.  By
            default draws times indices of the largest site's plates stay below 20,000.
        progress: show a bar.

    Returns:
        :class:`Evidence`, with the shape of the plates common to all sites.

    Raises:
        ValueError: for an unknown method, counts that are too small, a model without latents, a guide that is a point
            estimate, a subsampled plate that does not enclose all sites, or a datum for which no draw has a positive
            weight.

    Reference:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016), which uses K = 5000.

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> _ = torch.manual_seed(0)
        >>> log_evidence(model, guide(scale=1.0), torch.tensor([0.0, 2.0])).value.round(decimals=1)
        tensor([-1.3000, -2.3000])
    """
    check_choice("method", method, _METHODS)
    check_count("num_samples", num_samples)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_switch("progress", progress)
    least = 1 if method in ("enumerate", "exact") else 10
    if num_samples < least or (chunk_size is not None and chunk_size < 1):
        raise ValueError(f"need num_samples >= {least} and chunk_size >= 1, got {num_samples} and {chunk_size}")
    if method in ("enumerate", "exact"):
        return _enumerate(problem) if method == "enumerate" else _by_model(problem)
    source = problem if problem.guided and method != "prior" else problem.prior()
    if source.structure.enumerated and not source.structure.drawn:
        return _exact(source)
    if not problem.guided and method in ("importance", "bayes", "smc"):
        raise ValueError(f"method {method!r} draws from a guide, and guide is None: use 'prior', or give one")
    return _METHODS[method](problem, Sampling(num_samples, chunk_size, progress))


def draw_log_weights(problem: Problem, sampling: Sampling) -> Tensor:
    """Draw log-weights ``(K, *plates)`` in chunks; refuse pairs whose weights do not estimate the evidence."""
    structure = problem.structure
    if not structure.drawn:
        raise ValueError(
            f"the model has no latent site that the guide draws (sites: {sorted(structure.sites)}): its evidence is "
            'its log-likelihood, which needs no estimate (method="enumerate" sums discrete sites out)'
        )
    structure.require_whole("the evidence")
    problem.require_density("importance sampling")

    def parts() -> Iterator[Tensor]:
        with tqdm(total=sampling.num_samples, disable=not sampling.progress, desc="log p(x)", unit="draw") as bar:
            for run in problem.runs(sampling.counts(problem)):
                yield run.log_weights
                bar.update(run.num_particles)

    with torch.no_grad():
        weights = joined(parts(), sampling.num_samples)
    check_weights(weights)
    return weights


def evidence_of_weights(weights: Tensor, method: str) -> Evidence:
    """Return the log of the average weight, its standard error by the delta method, and diagnostics."""
    return Evidence(
        value=log_mean_exp(weights),
        stderr=log_mean_exp_stderr(weights),
        ess=effective_sample_size(weights),
        khat=pareto_khat(weights),
        num_samples=len(weights),
        method=method,
    )


def _bayes(problem: Problem, sampling: Sampling) -> Evidence:
    r"""Return log p(x, z*) less log p(z*|x), with p(z*|x) = q(z*) E_post[a(z, z*)] / E_q[a(z*, z)].

    a(z, z') = min(1, w(z')/w(z)) is the acceptance probability of the independence sampler.  The two expectations use
    separate draws; z* is the draw of median positive weight of a third set.
    """
    third = sampling.num_samples // 3
    sizes = (third, third, sampling.num_samples - 2 * third)
    pilot, posterior, proposal = (
        draw_log_weights(problem, Sampling(size, sampling.chunk_size, sampling.progress)) for size in sizes
    )
    at_point = pilot.masked_fill(pilot == -torch.inf, torch.nan).nanquantile(0.5, 0, interpolation="nearest")
    normalised = posterior.log_softmax(0)
    accepted = (at_point - posterior).clamp(max=0.0)
    into = (normalised + accepted).logsumexp(0)
    away = (proposal - at_point).clamp(max=0.0)
    out = log_mean_exp(away)
    # Delta method: a self-normalised average in the denominator, a plain one in the numerator.
    into_error = (normalised.exp() ** 2 * (accepted.exp() - into.exp()) ** 2).sum(0) / (2 * into).exp()
    both = torch.cat([posterior, proposal])
    return Evidence(
        value=at_point - into + out,
        stderr=(into_error + log_mean_exp_stderr(away) ** 2).sqrt(),
        ess=effective_sample_size(both),
        khat=pareto_khat(both),
        num_samples=sampling.num_samples,
        method="bayes",
    )


def _annealed(problem: Problem, sampling: Sampling) -> Evidence:
    start = base_problem(problem, "guide" if problem.guided else "prior")
    counts = sampling.counts(start)
    moves = tuned_moves(start, counts[0])
    parts = [run_chains(moves.on(Path(start, count)), progress=sampling.progress).log_weights for count in counts]
    weights = torch.cat(parts)
    check_weights(weights)
    return evidence_of_weights(weights, "annealed")


def _enumerate(problem: Problem) -> Evidence:
    try:
        return _exact(problem.with_guide(no_latents).with_model(config_enumerate(problem.model)))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f'method="enumerate" sums over latents that are all discrete and finite: {error}') from error


@runtime_checkable
class HasLogMarginal(Protocol):
    """A model that knows its evidence: ``log_marginal``, called as the model is, gives log p(x) of each datum."""

    def log_marginal(self, *args: Any, **kwargs: Any) -> Tensor: ...


def _by_model(problem: Problem) -> Evidence:
    model = problem.model
    if not isinstance(model, HasLogMarginal):
        raise ValueError(
            f"method='exact' asks the model for its log_marginal, which {type(model).__name__} does not have: use "
            "'enumerate' for discrete latents, or an estimate ('importance', 'smc', 'annealed')"
        )
    source = problem if problem.guided else problem.prior()
    source.structure.require_whole("the evidence")  # looks at the data as any estimate does
    with torch.no_grad(), isolated(model), evaluation_mode(model):
        value = model.log_marginal(*problem.args, **problem.kwargs)
    check_weights(value.unsqueeze(0))
    return _known(value, "exact")


def _known(value: Tensor, method: str) -> Evidence:
    return Evidence(
        value, torch.zeros_like(value), torch.ones_like(value), torch.full_like(value, -torch.inf), 1, method
    )


def _exact(problem: Problem) -> Evidence:
    """Return the evidence of a problem without draws."""
    problem.structure.require_whole("the evidence")
    with torch.no_grad():
        weights = problem.run().log_weights
    check_weights(weights)
    return _known(weights[0], "enumerate")


_FILTERS = 50  # enough for a k-hat of their estimates


def _smc(problem: Problem, sampling: Sampling) -> Evidence:
    """Return the log of the mean of independent particle filters' estimates, and its error from their spread."""
    if sampling.num_samples < 2 * _FILTERS:
        raise ValueError(
            f"method='smc' runs {_FILTERS} filters of num_samples / {_FILTERS} particles, so it needs num_samples >= "
            f"{2 * _FILTERS}; got {sampling.num_samples}"
        )
    problem.structure.require_whole("the evidence")
    bound = SMCBound(sampling.num_samples // _FILTERS)
    with torch.no_grad():
        steps = tqdm(range(_FILTERS), disable=not sampling.progress, desc="log p(x)", unit="filter")
        estimates = torch.stack([bound.evaluate(problem).value for _ in steps])
    check_weights(estimates)
    return evidence_of_weights(estimates, "smc")


_METHODS: dict[str, Callable[[Problem, Sampling], Evidence]] = {
    "importance": lambda problem, sampling: evidence_of_weights(draw_log_weights(problem, sampling), "importance"),
    "prior": lambda problem, sampling: evidence_of_weights(draw_log_weights(drawn_prior(problem), sampling), "prior"),
    "bayes": _bayes,
    "annealed": _annealed,
    "enumerate": lambda problem, _: _enumerate(problem),
    "exact": lambda problem, _: _by_model(problem),
    "smc": _smc,
}
