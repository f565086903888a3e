"""Findings about the particles of a conditioned diffusion: whether the twist stands well for p(y | z_t)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_hvae.diagnostics.report import Finding
from pyro_hvae.evidence import Conditioned

__all__ = ["conditioned_findings", "conditioned_numbers"]

_SPREAD = (
    "Efficient Implementation of Markov Chain Monte Carlo When Using an Unbiased Likelihood Estimator, Doucet et al., "
    "2015"
)
_TDS = "Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, Wu et al., 2023"
_KHAT = "Pareto Smoothed Importance Sampling, Vehtari et al., 2024"
_SPREAD_LIMIT, _SPREAD_WRONG = 1.0, 2.0
_TAIL_MATTERS = 0.3  # spreads below it leave no room for a tail
_KHAT_LIMIT = 0.7  # of many draws: that of few filters is so noisy that a lower one would alarm without reason
_SHARE_LIMIT = 0.1
_ADVICE = (
    "more cg_iterations; a larger denoiser_error if the denoiser is learned; then more num_particles, or more layers"
)


def conditioned_numbers(found: Conditioned) -> dict[str, Any]:
    """Return the numbers behind the findings, by datum."""
    return {
        "log_evidence": found.value,
        "stderr": found.stderr,
        "spread": _spread(found),
        "khat": found.khat,
        "ess": found.ess,
        "step_ess": found.step_ess,
        "resamplings": found.resamplings,
    }


def conditioned_findings(found: Conditioned) -> list[Finding]:
    """Report whether filters agree on p(y), whether their estimates have a heavy tail, and steps that lose particles.

    The spread is the standard deviation of the filters' estimates of p(y), relative to their mean.  Where it is large,
    the mean rests on few filters.  No finding excludes that all filters miss the same part of the posterior; then log
    p(y) rises with the number of particles.
    """
    return [_of_spread(found), *_of_tail(found), *_of_steps(found)]


def _spread(found: Conditioned) -> Tensor:
    return found.stderr * found.num_filters**0.5


def _of_spread(found: Conditioned) -> Finding:
    spread = _spread(found)
    off = ~(spread <= _SPREAD_LIMIT)
    worst, count, size = float(spread.max()), int(off.sum()), found.num_particles
    what = (
        f"log p(y): filters of {size} particles differ by up to {worst:.2f} of their mean, standard error up to "
        f"{float(found.stderr.max()):.3f} nats"
    )
    if not count:
        return Finding("good", what, "the weighted draws and log p(y) can be trusted", "", _SPREAD)
    return Finding(
        "wrong" if bool((~(spread <= _SPREAD_WRONG)).any()) else "doubtful",
        f"{what}; above {_SPREAD_LIMIT:g} for {count} of {spread.numel()} data",
        "log p(y) and the draws rest on few filters, and the standard error may be too small: the twist is bad",
        _ADVICE,
        _SPREAD,
    )


def _of_tail(found: Conditioned) -> list[Finding]:
    heavy = (found.khat > _KHAT_LIMIT) & ~(_spread(found) <= _TAIL_MATTERS)
    if not bool(heavy.any()):
        return []
    return [
        Finding(
            "doubtful",
            f"k-hat of the filters' estimates: {int(heavy.sum())} of {heavy.numel()} data above {_KHAT_LIMIT:g}, "
            f"largest {float(found.khat[heavy].max()):.2f}",
            "the mean of the estimates has no reliable error",
            "more num_particles, or more num_filters to be sure",
            _KHAT,
        )
    ]


def _of_steps(found: Conditioned) -> list[Finding]:
    least, steps = found.step_ess.min(0)
    low = least < _SHARE_LIMIT
    if not bool(low.any()):
        return []
    step = int(steps[least.argmin()])
    site = "x" if step == len(found.step_ess) - 1 else f"z{len(found.step_ess) - 1 - step}"
    return [
        Finding(
            "doubtful",
            f"effective number of particles: below {_SHARE_LIMIT:.0%} at a step for {int(low.sum())} of {low.numel()} "
            f"data, least {float(least.min()):.1%} at {site}",
            f"the twist stands badly for p(y | z) above {site}: few particles survive the step",
            _ADVICE,
            _TDS,
        )
    ]
