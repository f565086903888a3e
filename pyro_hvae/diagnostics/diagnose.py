"""Diagnose a posterior in words, from a tree of draws or from programs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer.mcmc.api import AbstractMCMC

from pyro_hvae.arguments import check_count
from pyro_hvae.diagnostics import checks
from pyro_hvae.diagnostics import findings as word
from pyro_hvae.diagnostics.calibration import calibrate
from pyro_hvae.diagnostics.conditioned import conditioned_findings, conditioned_numbers
from pyro_hvae.diagnostics.datatree import collect
from pyro_hvae.diagnostics.information import layers
from pyro_hvae.diagnostics.khat import LayerWeights, khats_of_tree, khats_of_weights
from pyro_hvae.diagnostics.loo import loo
from pyro_hvae.diagnostics.moments import compare_moments
from pyro_hvae.diagnostics.posterior_error import posterior_error
from pyro_hvae.diagnostics.predictive import predictive_check
from pyro_hvae.diagnostics.report import LEVELS, Finding, Report
from pyro_hvae.diagnostics.sources import Source, problems_of, sources_of
from pyro_hvae.diagnostics.weights import resample
from pyro_hvae.evidence import Conditioned, evidence_sandwich
from pyro_hvae.problem import Problem
from pyro_hvae.problem.isolation import evaluating
from pyro_hvae.weights import effective_sample_size

__all__ = ["diagnose"]

_GROUP_BYTES = 2**28
"""Largest memory in which draws of latents, or replicates of data, are kept."""

Numbers = dict[str, Any]


@evaluating()
def diagnose(
    model: Any,
    guide: Any = None,
    *args: Any,
    num_draws: int = 1000,
    calibration: bool = False,
    evidence: bool | Mapping[str, Any] = False,
    error: bool | Mapping[str, Any] = False,
    **kwargs: Any,
) -> Report:
    r"""Report the reliability of a posterior: of its draws, and of its weighted draws.

    From one set of draws: NaN and infinite densities; k-hat of the weights of all data and of each datum, and their
    effective sample size (the draws once weighted); means and standard deviations against those of the weighted draws
    (the draws); predictive checks; leave-one-out cross-validation, of global latents; R-hat across chains.
    Programs are run again for the k-hat of each layer, for collapsed layers and, on request, for calibration over
    simulated data and a bracket of the evidence.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.  A list of guides trained independently is
            compared by R-hat, and the first is diagnosed; ``model`` may then be a list too.  Or a bound
            :class:`~pyro_hvae.problem.Problem`; or a tree of :func:`~pyro_hvae.diagnostics.to_datatree`, also one
            opened from a file; its groups decide which checks run.  Or the result of
            :func:`~pyro_hvae.condition`, whose particles are judged.
        num_draws: S >= 100 draws of the guide; a tree has its own.
        calibration: also simulate data and test the ranks; for amortised guides.
        evidence: also bracket log p(x) by :func:`pyro_hvae.evidence_sandwich`, from the guide, or from the prior where
            the guide has auxiliary variables; a mapping has its options, such as ``{"num_chains": 8, "betas": 50}``.
        error: also bound the error of the posterior with a stated probability, by :func:`posterior_error`; a mapping
            has its options.

    Returns:
        :class:`~pyro_hvae.diagnostics.Report`, findings ordered from the worst.

    Raises:
        ValueError: for ``num_draws < 100``, an empty list of guides, another number of models, a sampler instead
            of a guide, programs that do not match, a minibatch whose plate does not enclose all sites,
            or a tree where programs are needed.

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> _ = torch.manual_seed(0)
        >>> report = diagnose(model, guide(scale=0.3), torch.randn(50))
        >>> report.worst, report.findings[0].what.split(":")[:2]
        ('wrong', ['the draws once weighted', ' k-hat of each datum'])
    """
    numbers: Numbers = {}
    if isinstance(model, Conditioned):
        if guide is not None or args or kwargs or calibration or evidence or error:
            raise TypeError("a conditioned diffusion has its draws already; call diagnose with it alone")
        return _report(conditioned_findings(model), conditioned_numbers(model))
    if _is_tree(model):
        if guide is not None or args or kwargs:
            raise TypeError("a tree has its draws already; call diagnose with the tree alone")
        if calibration or evidence or error:
            raise ValueError(
                "calibration, evidence and error draw from the programs, which a tree does not hold: pass model, guide "
                "and data instead of the tree"
            )
        return _report(_of_tree(model, numbers), numbers)
    check_count("num_draws", num_draws)
    if num_draws < 100:
        raise ValueError(f"num_draws must be at least 100 for k-hat, got {num_draws}")
    problems = _problems(model, guide, args, kwargs)
    first = problems[0]
    with torch.no_grad():
        tree, findings = _drawn(problems, num_draws)
    if findings:
        return _report(findings, numbers)
    findings = _of_tree(tree, numbers, first)
    if "elbo" in numbers:  # the draws have weights
        findings += _layers(first, numbers)
        if calibration:
            ranks = calibrate(first)
            numbers["calibration"] = ranks.failures()
            findings += checks.calibration_findings(ranks)
        if evidence:
            findings.append(_bracket(first, numbers, evidence if isinstance(evidence, Mapping) else {}))
        if error:
            numbers["error"] = posterior_error(first, **(error if isinstance(error, Mapping) else {}))
            findings.append(word.error_finding(numbers["error"]))
    return _report(findings, numbers)


def _report(findings: Sequence[Finding], numbers: Numbers) -> Report:
    return Report(tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level))), numbers)


def _is_tree(value: Any) -> bool:
    return hasattr(value, "children") and hasattr(value, "to_dataset")


def _problems(model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[Problem]:
    if isinstance(guide, AbstractMCMC):
        raise ValueError(
            "guide is a sampler, whose draws have no weights: call diagnose(to_datatree(model, sampler, ...)), which "
            "computes R-hat and predictive checks"
        )
    if isinstance(guide, Sequence) and not guide:
        raise ValueError("guide is an empty list; give a guide, or some that were trained independently")
    count = len(guide) if isinstance(guide, Sequence) else 1
    if isinstance(model, Sequence) and len(model) != count and guide is not None:
        raise ValueError(f"{len(model)} models and {count} guide(s): give one guide for each model")
    return problems_of(model, guide, args, kwargs)


def _drawn(problems: list[Problem], num_draws: int) -> tuple[Any, list[Finding]]:
    """Return one tree of the draws of all problems; or findings, where densities do not allow draws.

    Of many data with latents of their own the log-weights are kept, not the densities of sites; where these weights are
    not finite, few draws say which site is broken.
    """
    sources = sources_of(problems, num_draws, None)
    densities, kept = ["sample_stats", "log_likelihood", "log_prior"], _kept_groups(sources)
    many = bool(problems[0].structure.common) and "posterior_predictive" not in kept
    try:
        tree = collect(sources, [*(["sample_stats"] if many else densities), *kept], totals_only=many)
    except (ValueError, RuntimeError):
        findings = word.finite_findings(_chain(collect(sources, densities)))
        if not findings:
            raise
        return None, findings
    findings = word.finite_findings(_chain(tree)) if many else []
    if not findings:
        return tree, []
    few = _chain(collect(sources_of(problems, 100, None), densities))
    return None, word.finite_findings(few) or findings


def _kept_groups(sources: Sequence[Source]) -> list[str]:
    """Return the groups of draws that fit into memory."""
    first = sources[0]
    kept = []
    of_posterior = ("latent", "enumerated", "deterministic")
    for group, roles in (("posterior", of_posterior), ("posterior_predictive", ("observed",))):
        entries = sum(int(np.prod(first.sites[name].shape)) for name in first.sites.role(*roles))
        if 8 * entries * first.num_draws * len(sources) <= _GROUP_BYTES:
            kept.append(group)
    return [*kept, "observed_data"] if "posterior_predictive" in kept else kept


def _chain(tree: Any) -> Any:
    """Return the first chain of a tree."""
    import xarray as xr

    groups = {name: node.to_dataset() for name, node in tree.children.items()}
    first = {name: data.isel(chain=slice(1)) if "chain" in data.dims else data for name, data in groups.items()}
    chain = xr.DataTree.from_dict(first)
    chain.attrs = dict(tree.attrs)
    return chain


def _of_tree(tree: Any, numbers: Numbers, problem: Problem | None = None) -> list[Finding]:
    """Diagnose the draws of a tree; with a ``problem``, also k-hats of layers."""
    weighed = "log_weight" in tree.children.get("sample_stats", {})
    first = _chain(tree) if weighed else tree
    findings = word.finite_findings(first)
    if findings:
        return findings
    if tree.attrs.get("points"):
        return [word.point_finding(str(tree.attrs["points"]).split(", "))]
    findings = _weights(first, numbers, problem) if weighed else [_without_weights(tree)]
    findings += _divergences(tree) + _predictive(first, numbers) + _left_out(first, numbers)
    return findings + _chains(tree, numbers)


def _without_weights(tree: Any) -> Finding:
    draws = tree.attrs.get("draws", "unknown")
    meanings = {
        "mcmc": "draws of a sampler are the posterior's where its chains agree",
        "resampled": "draws that were taken by weight are as good as the weights were",
    }
    if draws not in meanings:
        raise ValueError(
            f"the tree has no sample_stats/log_weight, the weights of draws of kind {draws}: let to_datatree "
            "make the group sample_stats"
        )
    meaning = meanings[draws]
    khat = f", k-hat {tree.attrs['khat']:.2f}" if "khat" in tree.attrs else ""
    return Finding("note", f"no weights: the draws are of kind {draws}{khat}", meaning)


def _weights(tree: Any, numbers: Numbers, problem: Problem | None) -> list[Finding]:
    """Diagnose the weighted draws, and the draws without weights."""
    stats = tree["sample_stats"]
    log_weight = torch.as_tensor(stats["log_weight"].transpose("chain", "draw", ...).values)[0]
    scale = tree.attrs.get("plate_scale", 1.0)
    if log_weight.dim() == 1 and scale != 1.0:
        if problem is not None:
            problem.structure.require_whole("k-hat")
        what = f"a minibatch that stands for {scale:g} times as many data, with latents that all data share"
        return [Finding("note", what, "weights of such latents need all data", "pass the whole data")]
    if problem is not None and problem.structure.drawn:
        hats = khats_of_weights(LayerWeights(problem, len(log_weight)), log_weight)
    else:
        hats = khats_of_tree(tree)
    ess = effective_sample_size(log_weight).double()
    numbers["khat"] = hats.to_dataset()
    numbers["elbo"], numbers["ess"] = float(log_weight.mean()), ess
    findings = word.khat_findings(hats) + word.ess_findings(ess.numpy(), len(log_weight))
    if "posterior" in tree.children:
        moments = compare_moments(tree)
        numbers["draws"] = {name: vars(one) for name, one in moments.items()}
        findings += word.draws_findings(moments, len(log_weight))
    elif problem is not None:
        what = "the draws: not compared with the weighted draws"
        findings.append(Finding("note", what, "there are too many to keep", "fewer data or draws in the call"))
    return findings


def _divergences(tree: Any) -> list[Finding]:
    stats = tree.children.get("sample_stats", {})
    count = int(stats["diverging"].sum()) if "diverging" in stats else 0
    if not count:
        return []
    return [
        Finding(
            "doubtful",
            f"{count} of {stats['diverging'].size} transitions of the sampler diverged",
            "it could not follow the posterior where its curvature is high",
            "a smaller step (target_accept_prob), or a non-centred parameterisation",
        )
    ]


def _predictive(tree: Any, numbers: Numbers) -> list[Finding]:
    if not {"posterior_predictive", "observed_data"} <= set(tree.children):
        return []
    replicates = tree["posterior_predictive"]
    names = [str(name) for name in tree["observed_data"].data_vars if name in replicates.data_vars]
    names = [name for name in names if tree["observed_data"][name].size > 1]
    count, weighted = replicates.sizes["chain"] * replicates.sizes["draw"], tree.attrs.get("draws") != "guide"
    if "khat" in numbers and bool((_khats_of_draws(numbers["khat"]) <= numbers["khat"].attrs["good_k"]).all()):
        tree, count, weighted = _weighted_replicates(tree), int(numbers["ess"].min()), True
    tables = {name: predictive_check(tree, var_name=name) for name in names}
    numbers["predictive"] = {name: table["p_value"].to_dict() for name, table in tables.items()}
    return checks.predictive_findings(tables, count, weighted)


def _khats_of_draws(khats: Any) -> Any:
    """Return k-hats of whole draws: of each datum if the data share no latent."""
    return khats["per_datum"] if "per_datum" in khats and not khats.attrs["conditioned_on"] else khats["joint"]


def _weighted_replicates(tree: Any) -> Any:
    """Return the replicates, resampled by weight."""
    import xarray as xr

    kept = ("sample_stats", "log_likelihood", "posterior_predictive", "observed_data")
    part = xr.DataTree.from_dict({name: tree[name].to_dataset() for name in kept if name in tree.children})
    part.attrs = dict(tree.attrs)
    return resample(part)


def _left_out(tree: Any, numbers: Numbers) -> list[Finding]:
    """Run leave-one-out cross-validation, where latents are shared by the data."""
    stats, likelihood = tree.children.get("sample_stats"), tree.children.get("log_likelihood")
    if stats is None or likelihood is None or len(likelihood.data_vars) != 1:
        return []
    (values,) = likelihood.data_vars.values()
    if tree.attrs.get("plate_scale", 1.0) != 1.0 or values.ndim < 3 or bool((values.std(("chain", "draw")) == 0).all()):
        return []
    if "log_weight" in stats and (stats["log_weight"].ndim > 2 or "log_q" not in stats):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about k-hats, which the finding counts
        result = loo(tree)
    above = int((result.pareto_k > result.good_k).sum())
    numbers["loo"] = {"elpd": float(result.elpd), "se": float(result.se), "above": above}
    hats = numbers.get("khat")
    poor = hats is not None and bool((_khats_of_draws(hats) > hats.attrs["good_k"]).any())
    return [checks.loo_finding(result, above, poor)]


def _chains(tree: Any, numbers: Numbers) -> list[Finding]:
    """Compare chains by R-hat; chains of different models, whose latents differ in meaning, by their bounds alone."""
    sizes = tree["posterior"].sizes if "posterior" in tree.children else tree.children.get("sample_stats", tree).sizes
    if sizes.get("chain", 1) < 2:
        return []
    findings = []
    stats = tree.children.get("sample_stats", {})
    if "log_weight" in stats:
        weights = stats["log_weight"]
        unit = "nats a datum" if weights.ndim > 2 else "nats"
        elbos = weights.mean([dim for dim in weights.dims if dim != "chain"]).values
        numbers["elbos"] = elbos.tolist()
        findings.append(
            Finding(
                "note",
                f"{len(elbos)} restarts: ELBO from {elbos.min():.3f} to {elbos.max():.3f} {unit}",
                f"runs differ by {elbos.max() - elbos.min():.3f} {unit}",
            )
        )
    if tree.attrs.get("models", 1) > 1 or "posterior" not in tree.children:
        return findings
    import arviz_stats

    rhat = arviz_stats.rhat(tree["posterior"].to_dataset())
    numbers["rhat"] = {str(name): float(array.max()) for name, array in rhat.data_vars.items()}
    return findings + word.rhat_findings(numbers["rhat"], "chains" if tree.attrs.get("draws") == "mcmc" else "restarts")


def _layers(problem: Problem, numbers: Numbers) -> list[Finding]:
    structure = problem.structure
    sites, common = structure.sites, set(structure.common)
    local = [name for name in structure.latent if common and common <= set(sites[name].plates)]
    if not local or any(sites[name].guide_distribution == "Delta" for name in local):
        return []
    if all(plate.size < 2 for plate in common):  # a single datum
        return []
    try:
        numbers["layers"] = layers(problem)
    except NotImplementedError:  # a distribution without a density at another's draws
        return []
    except ValueError as error:
        if isinstance(error.__cause__, NotImplementedError):  # an improper prior
            return []
        raise
    return checks.layer_findings(numbers["layers"])


def _bracket(problem: Problem, numbers: Numbers, options: Mapping[str, Any]) -> Finding:
    structure = problem.structure
    computed = {name for name in structure.latent if structure.sites[name].guide_distribution == "Delta"}
    # Annealing can't start from a guide with auxiliary variables that are not the latents in other coordinates.
    base = "prior" if structure.auxiliary and computed != set(structure.latent) else None
    bracket = evidence_sandwich(problem, **{"base": base, **options})
    numbers["evidence"] = {"lower": bracket.lower, "upper": bracket.upper}
    return word.bracket_finding(bracket, numbers["elbo"], "nats a datum" if structure.common else "nats")
