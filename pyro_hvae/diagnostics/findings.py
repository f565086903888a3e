"""Findings in words, from numbers about a posterior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pyro_hvae.diagnostics.khat import KHats
from pyro_hvae.diagnostics.moments import RATIO, SHIFT, Moments
from pyro_hvae.diagnostics.posterior_error import PosteriorError
from pyro_hvae.diagnostics.report import Finding

__all__ = [
    "bracket_finding",
    "draws_findings",
    "error_finding",
    "ess_findings",
    "finite_findings",
    "khat_findings",
    "point_finding",
    "rhat_findings",
]

_KHAT = "Pareto Smoothed Importance Sampling, Vehtari et al., 2024"
_RHAT = "Rank-Normalization, Folding, and Localization: An Improved R-hat, Vehtari et al., 2021"
_ERROR = "Validated Variational Inference via Practical Posterior Error Bounds, Huggins et al., 2020"
_RHAT_LIMIT = 1.01
_WEIGHTED = "the draws once weighted"
_KHAT_MEANS = "k-hat says how heavy the tail of the weights p/q is: the larger, the fewer draws carry the average"
_ESS_SHARE = 0.01


def finite_findings(tree: Any) -> list[Finding]:
    """Report densities that are NaN or infinite, by site; else log-weights."""
    broken: dict[str, int] = {}
    for group in ("log_prior", "log_likelihood", "sample_stats"):
        for label, values in (tree[group].data_vars.items() if group in tree.children else ()):
            name = str(label).removeprefix("log_factor_").removeprefix("log_q_")
            if group == "sample_stats" and name == label:  # a total
                continue
            wrong = int((~np.isfinite(values.values)).sum())
            if wrong:
                broken[name] = broken.get(name, 0) + wrong
    if broken:
        return [
            Finding(
                "wrong",
                "densities that are no finite number: " + ", ".join(f"{name} ({n})" for name, n in broken.items()),
                "nothing else can be judged: a draw has probability zero under the model, or a parameter is NaN",
                "look at the parameters and the support of these sites; a scale may have gone to 0, or the learning "
                "rate may be too high",
            )
        ]
    stats = tree.children.get("sample_stats", {})
    totals = [stats[name].values for name in ("log_weight", "lp") if name in stats]
    wrong = sum(int((~np.isfinite(values)).sum()) for values in totals)
    if not wrong:
        return []
    return [
        Finding(
            "wrong",
            f"log-weights or densities that are no finite number: {wrong} of {sum(map(np.size, totals))}",
            "nothing else can be judged: draws have probability zero or no density under the model",
            "look for what the model forbids or can't compute far out in the guide's tails",
        )
    ]


def point_finding(names: Iterable[str]) -> Finding:
    """Report a guide that is a point estimate."""
    return Finding(
        "wrong",
        f"a point estimate: the guide puts all its mass at one value of {', '.join(names)}",
        "it says nothing of uncertainty: its draws are all the same, and no weights can correct them",
        "a guide with a density (AutoNormal, AutoMultivariateNormal, a chain), if more than the point is wanted",
    )


def khat_findings(hats: KHats) -> list[Finding]:
    """Report whether weights can correct the draws: of each datum, of the whole posterior, and by layer.

    Where no latent is shared by the data, the joint k-hat grows with the number of data and is left out.
    """
    findings = []
    if hats.per_datum is not None:
        findings.append(_of_each_datum(hats))
    if hats.per_datum is None or hats.conditioned_on:
        findings.append(_of_all(hats))
    trusted = all(finding.level == "good" for finding in findings)
    return findings + _layers_by_khat(hats, "note" if trusted else "doubtful")


def _of_each_datum(hats: KHats) -> Finding:
    assert hats.per_datum is not None
    flagged, total = int((hats.per_datum > hats.good).sum()), hats.per_datum.numel()
    held = f" given {', '.join(hats.conditioned_on)}" if hats.conditioned_on else ""
    median = hats.number(float(hats.per_datum.median()))
    what = f"{_WEIGHTED}: k-hat of each datum{held}: {flagged} of {total} above {hats.good:.2f}, median {median}"
    if not flagged:
        return Finding("good", what, f"averages of weighted draws can be trusted; {_KHAT_MEANS}", "", _KHAT)
    return Finding(
        "wrong" if flagged > total / 10 else "doubtful",
        what,
        "the guide misses a part of these data's posteriors, and importance weights can't repair it; " + _KHAT_MEANS,
        "a richer guide (full covariance, a flow, a ladder), more training of the guide alone (WakePhase), or a "
        "refinement for each datum (posterior_gap tells which of the two)",
        _KHAT,
    )


def _of_all(hats: KHats) -> Finding:
    value, means = float(hats.joint), "" if hats.conditioned_on else f"; {_KHAT_MEANS}"  # once a report
    what = f"{_WEIGHTED}: k-hat of the whole posterior: {hats.number(value)} (limit {hats.good:.2f})"
    if value <= hats.good:
        return Finding("good", what, f"averages of weighted draws can be trusted{means}", "", _KHAT)
    return Finding(
        "wrong" if value > 1 else "doubtful",
        what,
        f"the guide misses a part of the posterior, and importance weights can't repair it{means}",
        "a guide that knows of the dependencies (AutoMultivariateNormal, a flow), another parameterisation "
        "(non-centred), or MCMC",
        _KHAT,
    )


def _layers_by_khat(hats: KHats, level: str) -> list[Finding]:
    """Report layers whose weights, all others at one draw, are bad: the place of the fault where the whole is bad."""
    bad = [name for name, value in hats.per_layer.items() if float((value > hats.good).double().mean()) > 0.1]
    if not bad or len(hats.per_layer) < 2:
        return []
    local = all(hats.per_layer[name].dim() for name in bad)
    share = " for more than a tenth of the data" if local else ""
    return [
        Finding(
            level,
            f"k-hat of layers: {', '.join(bad)} above {hats.good:.2f}{share}",
            f"what is wrong in a layer shows in it and in those drawn before it: look at {bad[-1]} first",
            f"a richer kernel for {bad[-1]}",
            _KHAT,
        )
    ]


def ess_findings(ess: np.ndarray, num_draws: int) -> list[Finding]:
    """Report weights with a small effective sample size."""
    few = int((ess < _ESS_SHARE * num_draws).sum())
    if not few:
        return []
    who = "the whole posterior rests" if ess.ndim == 0 else f"{few} of {ess.size} data rest"
    return [
        Finding(
            "doubtful",
            f"effective sample size: {who} on fewer than {_ESS_SHARE:.0%} of {num_draws} draws",
            "importance-weighted averages and evidence rest on a handful of draws there",
            "more draws, or a better guide where k-hat is large too",
        )
    ]


def draws_findings(moments: Mapping[str, Moments], num_draws: int) -> list[Finding]:
    """Report whether the draws may be used without weights; ``num_draws`` were compared."""
    if not moments:
        return [
            Finding(
                "note",
                "the draws: not compared with the weighted draws, whose k-hat is above its limit",
                "nothing here vouches for their means and standard deviations",
                "first what the finding about k-hat says",
            )
        ]
    off = {name: one for name, one in moments.items() if one.differs}
    unclear = [one.words(name) for name, one in moments.items() if one.unclear]
    accuracy = f"means within {SHIFT:g} sd and sds within a factor of {RATIO:g} of the weighted draws"
    if unclear and not off:
        return [
            Finding(
                "note",
                f"the draws: {'; '.join(unclear[:4])}",
                f"{num_draws} draws do not tell whether {accuracy}",
                "more draws (num_draws), or draws taken by weight (resample)",
            )
        ]
    if not off:
        return [
            Finding(
                "good",
                f"the draws: {accuracy}",
                "the guide's own means and standard deviations are the posterior's, as far as weights tell",
            )
        ]
    severe = any(one.severe > 0.1 * one.entries for one in off.values())
    words = [one.words(name) for name, one in sorted(off.items(), key=lambda item: -item[1].off / item[1].entries)]
    more = f", and of {len(words) - 4} more sites" if len(words) > 4 else ""
    return [
        Finding(
            "wrong" if severe else "doubtful",
            f"the draws: {'; '.join(words[:4])}{more}",
            "used without weights, the draws have other means or standard deviations than the posterior",
            "weights (smoothed_weights) or draws taken by weight (resample); or more training, or a richer guide",
        )
    ]


def bracket_finding(bracket: Any, elbo: float, unit: str) -> Finding:
    """Report the gap between the evidence and the ELBO."""
    low, high = float(bracket.lower.mean()), float(bracket.upper.mean())
    gap = low - elbo
    kind = "bound" if bracket.upper_is_bound else "estimate"
    return Finding(
        "note",
        f"log p(x) between {low:.3f} and {high:.3f} {unit} ({kind} above); the ELBO is {elbo:.3f}",
        f"the guide loses at least {max(gap, 0.0):.3f} {unit}, KL(q(z|x) || p(z|x))",
        "posterior_gap splits it into what the family and what the network leaves" if gap > 0.5 else "",
        "Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo, Grosse et al., 2015",
    )


def error_finding(error: PosteriorError) -> Finding:
    """Report the bounds of a posterior's error."""
    worst, count = float(error.kl.max()), error.kl.numel()
    where = f", the largest of {count} data" if count > 1 else ""
    assumed = f"assumed: {error.assumptions['kl']}"
    probability = f"with probability {1 - error.delta:g}"
    if worst == float("inf"):
        without = f" for {int(error.kl.isinf().sum())} of {count} data" if error.kl.dim() else ""
        return Finding(
            "note",
            f"KL(q(z|x) || p(z|x)) has no bound {probability}{without}",
            "log p(x) has no upper side there, as for weights without a variance, or the ELBO none below",
            "a larger budget, a wider guide, or posterior_samples of simulated data",
            _ERROR,
        )
    variation, gaussian = float(error.total_variation.max()), error.gaussian
    return Finding(
        "note",
        f"KL(q(z|x) || p(z|x)) at most {worst:.3g} nats {probability}{where}",
        f"total variation at most {variation:.3g}; with Gaussian tails means are off by at most "
        f"{float(gaussian.mean_shift.max()):.3g} sd of the guide, and sds are {float(gaussian.sd_low.min()):.3g} to "
        f"{float(gaussian.sd_high.max()):.3g} times the guide's; {assumed}",
        "",
        _ERROR,
    )


def rhat_findings(rhat: Mapping[str, float], chains: str) -> list[Finding]:
    """Report whether chains agree; ``chains`` is ``"restarts"`` or ``"chains"``."""
    bad = {name: value for name, value in rhat.items() if value > _RHAT_LIMIT}
    if not bad:
        return [Finding("good", f"R-hat across {chains} below {_RHAT_LIMIT}", "the runs agree", "", _RHAT)]
    advice = {
        "restarts": "train longer, lower the learning rate at the end, or look for several modes",
        "chains": "run the sampler longer, or another parameterisation",
    }
    return [
        Finding(
            "wrong" if max(bad.values()) > 1.1 else "doubtful",
            f"R-hat across {chains}: " + ", ".join(f"{name} {value:.2f}" for name, value in sorted(bad.items())),
            "independent runs end at different posteriors",
            advice[chains],
            _RHAT,
        )
    ]
