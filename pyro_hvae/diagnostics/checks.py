"""Findings of checks beside the weights: replicates, data left out, layers, calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_hvae.diagnostics.calibration import Calibration
from pyro_hvae.diagnostics.information import COLLAPSED_INFORMATION
from pyro_hvae.diagnostics.report import Finding

__all__ = ["calibration_findings", "layer_findings", "loo_finding", "predictive_findings"]

_UNITS = "Importance Weighted Autoencoders, Burda et al., 2016"
_SBC = "Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Talts et al., 2018"
_PPC = "Posterior Predictive Assessment of Model Fitness via Realized Discrepancies, Gelman et al., 1996"
_LOO = "Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation, Vehtari et al., 2017"
_PPC_LEVEL = 0.01


def predictive_findings(checks: Mapping[str, Any], num_draws: int, weighted: bool) -> list[Finding]:
    """Report test quantities in which replicates differ from the data.

    Args:
        checks: tables of :func:`~pyro_hvae.diagnostics.predictive_check` by observed site.
        num_draws: number of independent replicates.
        weighted: whether replicates are those of the weighted draws.
    """
    total = sum(len(table) for table in checks.values())
    odd = []
    for name, table in checks.items():
        for quantity, p_value in table["p_value"].items():
            share = (num_draws * p_value + 0.5) / (num_draws + 1)  # an estimate of 0 is no probability of 0
            if 2 * min(share, 1 - share) < _PPC_LEVEL / total:
                odd.append(f"{quantity} of {name} (p = {p_value:.3f})")
    if not total:
        return []
    if not odd:
        return [Finding("good", "predictive checks: replicates look like the data in all quantities", "", "", _PPC)]
    return [
        Finding(
            "doubtful",
            f"predictive checks: replicates differ from the data in {', '.join(odd)}",
            "the model with its posterior does not make such data"
            if weighted
            else "the model at these draws does not make such data; weights can't tell whether the draws are to blame",
            "look at the likelihood of that site: its spread, tails, zeros; predictive_check takes other quantities",
            _PPC,
        )
    ]


def loo_finding(result: Any, above: int, poor_weights: bool) -> Finding:
    """Report leave-one-out cross-validation.

    Args:
        result: of :func:`~pyro_hvae.diagnostics.loo`.
        above: number of data with k-hat above the limit.
        poor_weights: whether the weights of the whole posterior have a k-hat above the limit.
    """
    what = f"leave-one-out: elpd {float(result.elpd):.1f} nats, standard error {float(result.se):.1f}"
    if not above:
        return Finding("note", what, "the log-density of each datum given the others, summed; its k-hats are good")
    what += f"; k-hat above {result.good_k:.2f} for {above} of {result.n_data_points} data"
    if poor_weights:
        return Finding(
            "note",
            what,
            "the weights of the posterior are bad already, so those of the posterior without a datum are, and elpd is "
            "not to be trusted",
            "first a better guide, as above",
            _LOO,
        )
    return Finding(
        "note",
        what,
        "without such a datum the posterior is another one, which these draws hardly reach: elpd is too high as a rule",
        "look at these data (plot_khat of loo(tree)): outliers ask for a likelihood with longer tails; else more draws "
        "(num_draws), or train without some data and predict these (held_out)",
        _LOO,
    )


def layer_findings(table: Any) -> list[Finding]:
    """Report collapsed layers, few active units, and information at its limit."""
    findings = []
    collapsed = [str(name) for name in table.layer.values[table.collapsed.values]]
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
    rows = zip(
        table.layer.values, table.active_units.values, table.units.values, table.collapsed.values, strict=True
    )
    mostly = [f"{name} ({int(few)} of {int(units)})" for name, few, units, gone in rows if not gone and few < units / 2]
    if mostly:
        findings.append(
            Finding("note", f"few active units: {', '.join(mostly)}", "the other units repeat the prior", "", _UNITS)
        )
    limit = table.attrs["information_limit"]
    full = [str(name) for name in table.layer.values[table.mutual_information.values > 0.95 * limit]]
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


def calibration_findings(calibration: Calibration) -> list[Finding]:
    """Report ranks that are not uniform."""
    failures = calibration.failures()
    if not failures:
        return [Finding("good", "calibration: ranks of simulated truths are uniform", "", "", _SBC)]
    listed = list(failures.items())[:4]
    more = f", and {len(failures) - len(listed)} more" if len(failures) > len(listed) else ""
    return [
        Finding(
            "wrong",
            "calibration: " + "; ".join(f"{name} {words}" for name, words in listed) + more,
            "on data of the model's own making the guide's uncertainty is wrong in these respects",
            "narrow draws: a mass-covering objective (WakePhase, IWELBO) or a richer guide; bias: train longer",
            _SBC,
        )
    ]
