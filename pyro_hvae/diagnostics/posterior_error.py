r"""Bound the error of a guide as a posterior, with a stated probability.

.. math:: \mathrm{KL}(q(z|x)\|p(z|x)) = \log p(x) - \mathrm{ELBO} \le \text{upper} - \text{lower},

with an upper bound of log p(x) (:func:`pyro_hvae.evidence_interval`) and a lower bound of the ELBO
(:func:`pyro_hvae.weights.mean_lower`).  :mod:`pyro_hvae.diagnostics.divergence_bounds` turns it into bounds of total
variation, means, standard deviations and quantiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_hvae.diagnostics.datatree import collect
from pyro_hvae.diagnostics.divergence_bounds import (
    MomentBounds,
    errors_by_chi2,
    errors_by_kl,
    total_variation_bound,
)
from pyro_hvae.diagnostics.sources import sources_of
from pyro_hvae.diagnostics.weights import smoothed_weights
from pyro_hvae.evidence import EvidenceInterval, evidence_interval
from pyro_hvae.evidence.sides import INFLATION, MOMENT_KHAT
from pyro_hvae.problem import Problem, of_pair
from pyro_hvae.weights import mean_lower, relative_variance
from pyro_hvae.weights.confidence import log_inverse

__all__ = ["ErrorEstimates", "PosteriorError", "posterior_error"]


@dataclass(frozen=True)
class ErrorEstimates:
    """Estimates from the draws and their smoothed weights.  They are no bounds.

    Attributes:
        kl: estimate of log p(x) less that of the ELBO, in nats.
        total_variation: half of the mean distance of the normalised weights from one.
        mean_shift: by site, the posterior's mean less the guide's, in standard deviations of the guide.
        sd_ratio: by site, the posterior's standard deviation over the guide's.
        khat: of the weights; above ``good_khat`` of the draws, no estimate is reliable.
    """

    kl: Tensor
    total_variation: Tensor
    mean_shift: dict[str, Any]
    sd_ratio: dict[str, Any]
    khat: Tensor


@dataclass(frozen=True)
class PosteriorError:
    """Bounds of the distance between guide and posterior of each datum, and estimates beside them.

    Tensors have the shape of the plates common to all sites.  A bound is ``inf`` (of total variation 1) where nothing
    is known.

    Attributes:
        kl: bound of KL(q(z|x) || p(z|x)) in nats.
        total_variation: bound of the largest difference of the probabilities of an event.
        chi2: bound of chi-squared of the posterior from the guide.
        gaussian: bounds of means and standard deviations by ``kl``, for posteriors with Gaussian tails.
        moment: the same by ``chi2``, for any posterior.
        delta: probability that ``kl``, and what follows from it, does not hold.
        assumptions: by name of the bound.
        estimates: from the same draws; no bounds.
        evidence: the interval of log p(x).
        plates: names of the plates that the data have.
    """

    kl: Tensor
    total_variation: Tensor
    chi2: Tensor
    gaussian: MomentBounds
    moment: MomentBounds
    delta: float
    assumptions: Mapping[str, str]
    estimates: ErrorEstimates
    evidence: EvidenceInterval
    plates: tuple[str, ...] = ()

    def quantile(self, draws: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Bound a quantile of the posterior by quantiles of the guide.

        Args:
            draws: of the guide, ``(S, *plates, *event)``.
            level: in (0, 1).

        Returns:
            Lower and upper bound, ``(*plates, *event)``; infinite where the total variation reaches the end of the
            guide's tail.

        Raises:
            ValueError: for a level outside of (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"the level of a quantile lies in (0, 1), got {level}")
        count, ordered = len(draws), draws.sort(0).values
        shape = self.total_variation.shape
        variation = self.total_variation.to(draws.device).reshape(shape + (1,) * (draws.dim() - 1 - len(shape)))
        first = ((level - variation) * count).floor().long() - 1
        last = ((level + variation) * count).ceil().long()
        ends = []
        for index, end in ((first, -torch.inf), (last, torch.inf)):
            at = index.clamp(0, count - 1).expand(draws.shape[1:])[None]
            outside = (index < 0) | (index > count - 1)
            ends.append(torch.where(outside, end, ordered.gather(0, at)[0]))
        return ends[0], ends[1]

    def to_dataset(self) -> Any:
        """Return the bounds as an ``xarray.Dataset`` over the data's plates, for a group of a tree."""
        import xarray as xr

        values = {
            "kl": self.kl,
            "total_variation": self.total_variation,
            "chi2": self.chi2,
            "log_evidence_lower": self.evidence.lower,
            "log_evidence_upper": self.evidence.upper,
        }
        for name, bounds in (("gaussian", self.gaussian), ("moment", self.moment)):
            for key in ("mean_shift", "sd_low", "sd_high"):
                values[f"{name}_{key}"] = getattr(bounds, key)
        values |= {"estimated_kl": self.estimates.kl, "estimated_total_variation": self.estimates.total_variation}
        dataset = xr.Dataset({name: (self.plates, value.cpu().numpy()) for name, value in values.items()})
        dataset.attrs = {"delta": self.delta} | {f"assumption_{key}": text for key, text in self.assumptions.items()}
        return dataset

    def __str__(self) -> str:
        who = f"of {self.kl.numel()} data, the largest" if self.kl.dim() else "of the whole posterior"
        lines = [
            f"{who} (each bound with probability {1 - self.delta:g}; in brackets the estimate, no bound):",
            f"KL(q(z|x) || p(z|x)) at most {float(self.kl.max()):.3g} nats ({float(self.estimates.kl.max()):.3g})",
            f"total variation at most {float(self.total_variation.max()):.3g} "
            f"({float(self.estimates.total_variation.max()):.3g})",
        ]
        shift = _largest(self.estimates.mean_shift, np.abs)
        for name, bounds in (("Gaussian tails", self.gaussian), ("any posterior", self.moment)):
            lines.append(
                f"{name}: means off by at most {float(bounds.mean_shift.max()):.3g} sd of the guide ({shift:.3g}), "
                f"sds {float(bounds.sd_low.min()):.3g} to {float(bounds.sd_high.max()):.3g} times the guide's"
            )
        return "\n".join([*lines, *(f"assumption of {name}: {text}" for name, text in self.assumptions.items())])


@of_pair
def posterior_error(
    problem: Problem,
    *,
    delta: float = 0.05,
    num_draws: int = 4000,
    budget: int | None = None,
    posterior_samples: Mapping[str, Tensor] | None = None,
) -> PosteriorError:
    r"""Bound KL, total variation, and errors of means, standard deviations and quantiles of a guide.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``; or a bound
            :class:`~pyro_hvae.problem.Problem` instead of all of these.
        delta: probability that the bound of KL does not hold, for each datum.
        num_draws: S >= 100 draws of the guide for the ELBO, its moments and the estimates.
        budget, posterior_samples: of :func:`pyro_hvae.evidence_interval`, whose upper side is used.

    Returns:
        :class:`PosteriorError`.

    Raises:
        ValueError: for ``num_draws < 100``, a model without a guide, or as :func:`pyro_hvae.evidence_interval`.

    Reference:
        Validated Variational Inference via Practical Posterior Error Bounds (Huggins, Kasprzak, Campbell and
        Broderick, 2020).

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> _ = torch.manual_seed(0)
        >>> error = posterior_error(model, guide(scale=0.8), torch.tensor([0.0, 2.0]))  # KL 0.0164
        >>> bool(((error.kl > 0.0164) & (error.kl < 0.05)).all())
        True
    """
    log_inverse(delta)
    if num_draws < 100:
        raise ValueError(f"num_draws must be at least 100, got {num_draws}")
    if not problem.guided:
        raise ValueError("the error is that of a guide, and guide is None: give one")
    interval = evidence_interval(problem, delta=delta, budget=budget, posterior_samples=posterior_samples)
    with torch.no_grad():
        tree = collect(sources_of([problem], num_draws, None), ["posterior", "sample_stats"])
    stats = tree["sample_stats"]["log_weight"].transpose("chain", "draw", ...)
    log_weights = torch.as_tensor(stats.values)[0].double()
    elbo = mean_lower(log_weights, INFLATION * log_weights.var(0), delta / 2)
    kl = (interval.upper.cpu() - elbo).clamp(min=0.0)
    weights = smoothed_weights(tree)
    khat = torch.as_tensor(np.asarray(weights["khat"].values))
    chi2 = torch.where(khat <= MOMENT_KHAT, INFLATION * relative_variance(log_weights), torch.inf)
    moments = {
        str(name): _moments(draws.astype(float), weights["weight"])
        for name, draws in tree["posterior"].data_vars.items()
        if draws.dtype.kind in "iuf" and set(weights["khat"].dims) <= set(draws.dims)
    }
    kurtosis = max((float(one[2].max()) for one in moments.values()), default=3.0)
    normalised = torch.as_tensor(weights["weight"].values)[0] * len(log_weights)
    estimates = ErrorEstimates(
        kl=interval.estimate.cpu() - log_weights.mean(0),
        total_variation=0.5 * (normalised - 1).abs().mean(0),
        mean_shift={name: one[0] for name, one in moments.items()},
        sd_ratio={name: one[1] for name, one in moments.items()},
        khat=khat,
    )
    gaussian, moment = errors_by_kl(kl), errors_by_chi2(chi2, kurtosis)
    variance = f"the variance of the log-weights is at most {INFLATION:g} times that of the draws"
    assumptions = {
        "kl": f"of log p(x): {interval.assumptions['upper']}; of the ELBO: {variance}",
        "total_variation": "those of kl",
        "gaussian": f"those of kl; {gaussian.condition}",
        "moment": f"the relative variance of the weights is at most {INFLATION:g} times that of the draws",
        "quantiles": "those of kl; the guide's quantiles are known",
    }
    return PosteriorError(
        kl,
        total_variation_bound(kl),
        chi2,
        gaussian,
        moment,
        delta,
        assumptions,
        estimates,
        interval,
        tuple(str(dim) for dim in stats.dims[2:]),
    )


def _moments(draws: Any, weight: Any) -> tuple[Any, Any, Any]:
    """Return the weighted mean less the mean, the ratio of the sds, and the kurtosis of the draws."""
    over = ("chain", "draw")
    mean, sd = draws.mean(over), draws.std(over)
    shifted = draws - mean
    with np.errstate(all="ignore"):
        shift = (weight * shifted).sum(over) / sd
        variance = (weight * shifted**2).sum(over) - (weight * shifted).sum(over) ** 2
        kurtosis = ((shifted / sd) ** 4).mean(over).fillna(1.0)
        return shift, np.sqrt(variance) / sd, kurtosis


def _largest(values: Mapping[str, Any], transform: Any) -> float:
    return max((float(transform(value).max()) for value in values.values()), default=float("nan"))
