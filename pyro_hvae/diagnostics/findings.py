"""One call that asks a guide everything, and says in words what to trust."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer import MCMC

from pyro_hvae.diagnostics.calibration import Calibration, calibrate
from pyro_hvae.diagnostics.datatree import to_datatree
from pyro_hvae.diagnostics.information import COLLAPSED_INFORMATION, layers
from pyro_hvae.diagnostics.khat import KHats, khats
from pyro_hvae.diagnostics.report import LEVELS, Finding, Report
from pyro_hvae.evidence import evidence_sandwich
from pyro_hvae.traces import log_weights, read, structure

__all__ = ["diagnose"]

_KHAT = "Pareto Smoothed Importance Sampling, Vehtari et al., 2024"
_UNITS = "Importance Weighted Autoencoders, Burda et al., 2016"
_RHAT = "Rank-Normalization, Folding, and Localization: An Improved R-hat, Vehtari et al., 2021"
_SBC = "Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Talts et al., 2018"
_RHAT_LIMIT = 1.01
_ESS_SHARE = 0.01


def diagnose(
    model: Any,
    guide: Any,
    *args: Any,
    num_draws: int = 1000,
    calibration: bool = False,
    evidence: bool = False,
    num_chains: int = 16,
    betas: int = 100,
    **kwargs: Any,
) -> Report:
    r"""Say what of a guide's posterior can be trusted.

    Looks at NaN and infinite densities, k-hat of all data, of each datum and each layer, the effective sample size of
    the weights, collapsed layers and, on request, calibration over simulated data and a bracket of the evidence.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.  A list of guides trained independently is
            compared by R-hat, and the first is looked at; ``model`` may then be a list too.
        num_draws: S >= 100 draws of the guide.
        calibration: also simulate data and look at the ranks; for guides that are amortised.
        evidence: also bracket log p(x) by annealing both ways, at the cost of ``num_chains`` chains of ``betas``
            temperatures a datum, from the guide, or from the prior where the guide has auxiliary variables.

    Returns:
        :class:`~pyro_hvae.diagnostics.Report`, findings ordered from the worst.

    Raises:
        ValueError: for ``num_draws < 100``, an empty list of guides, another number of models, a sampler in the
            place of a guide, or programs that do not fit each other.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def narrow(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.3))
        >>> _ = torch.manual_seed(0)
        >>> report = diagnose(model, narrow, torch.randn(50))
        >>> report.worst, report.findings[0].what.split(":")[0]
        ('wrong', 'k-hat of each datum')
    """
    if num_draws < 100:
        raise ValueError(f"num_draws must be at least 100 for k-hat to mean something, got {num_draws}")
    several = isinstance(guide, Sequence)
    if isinstance(guide, MCMC):
        raise ValueError(
            "guide is a sampler, whose draws have no weights to judge them by: look at R-hat and ESS, "
            "arviz_stats.summary(to_datatree(model, sampler, ...))"
        )
    if several and not guide:
        raise ValueError("guide is an empty list; give a guide, or some that were trained independently")
    models = list(model) if isinstance(model, Sequence) else [model] * (len(guide) if several else 1)
    if len(models) != (len(guide) if several else 1):
        raise ValueError(f"{len(models)} models come with {len(guide) if several else 1} guide(s): give one for each")
    first_model, first = models[0], guide[0] if several else guide
    numbers: dict[str, Any] = {}
    findings = _finite(first_model, first, args, kwargs, num_draws, numbers)
    pair = structure(first_model, first, args, kwargs)
    unit = "nats a datum" if pair.common else "nats"
    points = [name for name in pair.latent if pair.sites[name].guide_distribution == "Delta"]
    if not findings and pair.drawn and set(pair.drawn) <= set(points):
        findings = [_estimate(points)]
    elif not findings:
        hats = khats(first_model, first, *args, num_draws=num_draws, **kwargs)
        numbers["khat"] = hats.to_dataset()
        findings += _khat(hats) + _sizes(numbers["ess"], num_draws)
        findings += _layers(first_model, first, args, kwargs, numbers)
        if calibration:
            found = calibrate(first_model, first, *args, **kwargs)
            numbers["calibration"] = found.failures()
            findings += _calibration(found)
        if evidence:
            # A guide with variables of its own, that are not the latents in other coordinates, is no place to start.
            start = None if pair.auxiliary and set(points) != set(pair.latent) else first
            bracket = evidence_sandwich(first_model, start, *args, num_chains=num_chains, betas=betas, **kwargs)
            numbers["evidence"] = {"lower": bracket.lower, "upper": bracket.upper}
            findings.append(_bracket(bracket, numbers["elbo"], unit))
        if several and len(guide) > 1:
            findings += _restarts(models, guide, args, kwargs, num_draws, numbers, unit)
    ordered = sorted(findings, key=lambda finding: LEVELS.index(finding.level))
    return Report(tuple(ordered), numbers)


def _finite(
    model: Any, guide: Any, args: tuple, kwargs: dict[str, Any], num_draws: int, numbers: dict[str, Any]
) -> list[Finding]:
    """Densities that are no numbers, by site; else what the weights say of themselves."""
    with torch.no_grad():
        reading = read(model, guide, args, kwargs, num_particles=16)
        broken = {
            name: int((~torch.isfinite(term)).sum())
            for terms in (reading.log_p, reading.log_q)
            for name, term in terms.items()
            if not bool(torch.isfinite(term).all())
        }
    if broken:
        return [
            Finding(
                "wrong",
                "densities that are no finite number: " + ", ".join(f"{name} ({n})" for name, n in broken.items()),
                "nothing else can be judged: a draw of the guide has probability zero under the model, or a parameter "
                "is NaN",
                "look at the parameters and the support of these sites; a scale may have gone to 0, or the learning "
                "rate may be too high",
            )
        ]
    weights = log_weights(model, guide, *args, num_particles=num_draws, chunk_size=_chunk(reading), **kwargs)
    flat = weights.reshape(num_draws, -1)
    if not bool(torch.isfinite(flat).all()):
        wrong = int((~torch.isfinite(flat)).sum())
        return [
            Finding(
                "wrong",
                f"log-weights that are no finite number: {wrong} of {flat.numel()}",
                "nothing else can be judged: rare draws of the guide have probability zero or no density at all under "
                "the model",
                "look for what the model forbids or can't compute far out in the guide's tails",
            )
        ]
    ess = torch.exp(2 * flat.logsumexp(0) - (2 * flat).logsumexp(0))
    numbers["elbo"] = float(flat.mean(0).mean())
    numbers["ess"] = ess
    return []


def _sizes(ess: Any, num_draws: int) -> list[Finding]:
    few = int((ess < _ESS_SHARE * num_draws).sum())
    if not few:
        return []
    return [
        Finding(
            "doubtful",
            f"effective sample size: {few} of {ess.numel()} data rest on fewer than {_ESS_SHARE:.0%} of "
            f"{num_draws} draws",
            "importance-weighted averages and evidence rest on a handful of draws there",
            "more draws, or a better guide where k-hat is large too",
        )
    ]


def _estimate(names: list[str]) -> Finding:
    return Finding(
        "wrong",
        f"a point estimate: the guide puts all its mass at one value of {', '.join(names)}",
        "it says nothing of uncertainty: its draws are all the same, and no weights can correct them",
        "a guide with a density (AutoNormal, AutoMultivariateNormal, a chain), if more than the point is wanted",
    )


def _chunk(reading: Any) -> int:
    return max(1, 20_000 // max(1, reading.log_weights[0].numel()))


def _khat(found: KHats) -> list[Finding]:
    findings, good = [], found.good
    if found.per_datum is not None:
        flagged = int((found.per_datum > good).sum())
        total = found.per_datum.numel()
        median = float(found.per_datum.median())
        text = f"k-hat of each datum: {flagged} of {total} above {good:.2f}, median {_number(median)}"
        if flagged:
            level = "wrong" if flagged > total / 10 else "doubtful"
            findings.append(
                Finding(
                    level,
                    text,
                    "the guide misses a part of these data's posteriors, and importance weights can't repair it",
                    "a richer guide (full covariance, a flow, a ladder), more training of the guide alone (WakePhase), "
                    "or a refinement for each datum (posterior_gap tells which of the two)",
                    _KHAT,
                )
            )
        else:
            findings.append(Finding("good", text, "importance weights can correct the guide's draws", "", _KHAT))
    else:
        value = float(found.joint)
        text = f"k-hat: {_number(value)} (limit {good:.2f})"
        if value > good:
            findings.append(
                Finding(
                    "wrong" if value > 1 else "doubtful",
                    text,
                    "the guide misses a part of the posterior, and importance weights can't repair it",
                    "a guide that knows of the dependencies (AutoMultivariateNormal, a flow), another parameterisation "
                    "(non-centred), or MCMC",
                    _KHAT,
                )
            )
        else:
            findings.append(Finding("good", text, "importance weights can correct the guide's draws", "", _KHAT))
    bad = [name for name, value in found.per_layer.items() if float((value > good).double().mean()) > 0.1]
    if bad and len(found.per_layer) > 1:
        findings.append(
            Finding(
                "doubtful",
                f"k-hat of layers: {', '.join(bad)} above {good:.2f} for more than a tenth of the data",
                f"what is wrong in a layer shows in it and in those drawn before it: look at {bad[-1]} first",
                f"a richer kernel for {bad[-1]}",
                _KHAT,
            )
        )
    return findings


def _layers(model: Any, guide: Any, args: tuple, kwargs: dict[str, Any], numbers: dict[str, Any]) -> list[Finding]:
    pair = structure(model, guide, args, kwargs)
    local = [name for name in pair.latent if pair.common and set(pair.common) <= set(pair.sites[name].plates)]
    if not local or any(pair.sites[name].guide_distribution == "Delta" for name in local):
        return []
    if math.prod(plate.size for plate in pair.common) < 2:  # nothing to vary over
        return []
    try:
        found = numbers["layers"] = layers(model, guide, *args, **kwargs)
    except NotImplementedError:  # a distribution without a mean or a density at another's draws
        return []
    findings = []
    collapsed = [str(name) for name in found.layer.values[found.collapsed.values]]
    if collapsed:
        findings.append(
            Finding(
                "doubtful",
                f"collapsed layers: {', '.join(collapsed)} (no active unit, information below "
                f"{COLLAPSED_INFORMATION} nats)",
                "the model does without them; their draws are the prior's",
                "free bits or a KL warm-up while training (Regularised), a top-down guide (Ladder), fewer layers",
                _UNITS,
            )
        )
    mostly = [
        f"{name} ({int(active)} of {int(units)})"
        for name, active, units, gone in zip(
            found.layer.values, found.active_units.values, found.units.values, found.collapsed.values, strict=True
        )
        if not gone and active < units / 2
    ]
    if mostly:
        findings.append(
            Finding("note", f"few active units: {', '.join(mostly)}", "the other units repeat the prior", "", _UNITS)
        )
    limit = found.attrs["information_limit"]
    full = [str(name) for name in found.layer.values[found.mutual_information.values > 0.95 * limit]]
    if full:
        findings.append(
            Finding(
                "note",
                f"information of {', '.join(full)} is at its limit log N = {limit:.2f} nats",
                "these data can't tell how much it really is",
                "more data in the call, if the number matters",
            )
        )
    return findings


def _calibration(found: Calibration) -> list[Finding]:
    failures = found.failures()
    if not failures:
        return [Finding("good", "calibration: ranks of simulated truths are uniform", "", "", _SBC)]
    shown = list(failures.items())[:4]
    more = f", and {len(failures) - len(shown)} more" if len(failures) > len(shown) else ""
    return [
        Finding(
            "wrong",
            "calibration: " + "; ".join(f"{name} {words}" for name, words in shown) + more,
            "on data of the model's own making the guide's uncertainty is wrong in these respects",
            "narrow draws: a mass-covering objective (WakePhase, IWELBO) or a richer guide; bias: train longer",
            _SBC,
        )
    ]


def _bracket(bracket: Any, elbo: float, unit: str) -> Finding:
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


def _restarts(
    models: list[Any],
    guides: Sequence[Callable[..., Any]],
    args: tuple,
    kwargs: dict[str, Any],
    num_draws: int,
    numbers: dict[str, Any],
    unit: str,
) -> list[Finding]:
    """R-hat across guides; of amortised models, whose latents have no common meaning, of the data's bound instead."""
    import arviz_stats

    elbos = []
    for model, guide in zip(models, guides, strict=True):
        weights = log_weights(model, guide, *args, num_particles=64, **kwargs)
        elbos.append(float(weights.reshape(64, -1).mean()))
    numbers["elbos"] = elbos
    spread = max(elbos) - min(elbos)
    findings = [
        Finding(
            "note",
            f"{len(guides)} restarts: ELBO from {min(elbos):.3f} to {max(elbos):.3f} {unit}",
            f"runs differ by {spread:.3f} {unit}",
        )
    ]
    if len({id(model) for model in models}) > 1:
        return findings
    tree = to_datatree(models[0], list(guides), *args, num_draws=min(num_draws, 500), groups=["posterior"], **kwargs)
    found = arviz_stats.rhat(tree["posterior"].to_dataset())
    worst = {str(name): float(array.max()) for name, array in found.data_vars.items()}
    numbers["rhat"] = worst
    bad = {name: value for name, value in worst.items() if value > _RHAT_LIMIT}
    if bad:
        findings.append(
            Finding(
                "wrong" if max(bad.values()) > 1.1 else "doubtful",
                "R-hat across restarts: " + ", ".join(f"{name} {value:.2f}" for name, value in sorted(bad.items())),
                "independent runs end at different posteriors",
                "train longer, lower the learning rate at the end, or look for several modes",
                _RHAT,
            )
        )
    else:
        findings.append(Finding("good", f"R-hat across restarts below {_RHAT_LIMIT}", "the runs agree", "", _RHAT))
    return findings


def _number(value: float) -> str:
    return "exact" if value == float("-inf") else f"{value:.2f}"
