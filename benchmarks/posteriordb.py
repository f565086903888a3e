"""Guides of strangers' posteriors against reference draws: errors, bounds of these errors, and verdicts.

    python benchmarks/posteriordb.py FOLDER [--only NAME ...] [--steps 2000] [--fits FITS]
                                     [--out docs/results/posteriordb.csv]

FOLDER holds one JSON file a posterior, with data and the reference's means and standard deviations (posteriordb,
Magnusson et al., 2025).  Each model is fitted by a mean-field, a full-rank and a flow guide, and by one that
``amortize`` makes of the model, where its priors can be drawn from (six of the eleven).  A posterior is right
where all means are within 0.1 reference standard deviations and all standard deviations within 15 %; a verdict agrees
where ``diagnose`` finds nothing doubtful or wrong for a right one, or something for a wrong one.  It has 4000 draws,
and 64,000 where it says that these do not tell.  Predictive checks, which judge the model, do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide, AutoIAFNormal, AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroModule
from strangers import MODELS
from tables import show, write

import pyro_hvae as ph
from pyro_hvae.diagnostics import LEVELS

MEANS, SDS, FAR = 0.1, math.log(1.15), 0.5
FLAT = ("garch", "hmm", "kilpisjarvi", "low_dim", "nes")
"""Models with flat priors, which ``amortize`` refuses, since it draws from the prior."""

UNROLLED = ("arma-arma11", "garch-garch11", "hmm_example-hmm_example")
"""Models with a loop over time, which train for half of the steps."""

Model = Callable[[], None]


def starts(name: str, data: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Values of sites with improper priors, and of others that need a start."""
    if name.startswith("garch"):
        values: dict[str, Any] = {"mu": 5.0, "alpha0": 1.0, "alpha1": 0.5, "share": 0.5}
    elif name.startswith("hmm"):
        values = {"low": 3.0, "gap": 6.0, "theta1": [0.5, 0.5], "theta2": [0.5, 0.5]}
    elif name.startswith("kilpisjarvi"):
        values = {"alpha": data["pmualpha"], "beta": 0.0, "sigma": 1.0}
    elif name.startswith("low_dim"):
        values = {"low": -1.0, "gap": 2.0, "sigma": [1.0, 1.0], "theta": 0.5}
    elif name.startswith("nes"):
        values = {"beta": [0.0] * 9, "sigma": 2.0}
    else:
        return {}
    return {site: torch.tensor(value).to(torch.get_default_dtype()) for site, value in values.items()}


def guides(model: Model, values: Mapping[str, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    options = {"init_loc_fn": init_to_value(values=dict(values))} if values else {}
    return {
        "mean-field": lambda: AutoNormal(model, init_scale=0.05, **options),
        "full-rank": lambda: AutoMultivariateNormal(model, init_scale=0.05, **options),
        "flow": lambda: AutoIAFNormal(InitMessenger(init_to_value(values=dict(values)))(model), num_transforms=2),
        "amortised": lambda: ph.amortize(model),
    }


class Program(PyroModule):
    """A model without parameters as a module, for the objective."""

    def __init__(self, program: Model) -> None:
        super().__init__()
        self.program = program

    def forward(self) -> None:
        self.program()


def train(model: Program, guide: Any, steps: int, rate: float) -> None:
    guide()  # makes its parameters
    objective = ph.TraceELBO(16)(model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / steps))
    # A guide of networks starts at the prior, where a recursion may explode; gradients of the others are as they are.
    clip_norm = None if isinstance(guide, AutoGuide) else 10.0
    step = ph.compile_step(objective, optimizer, (), backend="eager", clip_norm=clip_norm)
    for _ in range(steps):
        step()
        schedule.step()


def fitted(name: str, kind: str, found: Mapping[str, Any], steps: int, fits: Path | None) -> tuple[Any, Any, float]:
    """Return model, guide and the seconds of its training; from the folder of fits where it is there."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Program(MODELS[name](found["data"]))
    guide = guides(model, starts(name, found["data"]))[kind]()
    path = None if fits is None else fits / f"{name}-{kind}.pt"
    if path is not None and path.exists():
        kept = torch.load(path)
        guide()
        guide.load_state_dict(kept["guide"])
        return model, guide, kept["seconds"]
    start = time.perf_counter()
    for rate in (0.03, 0.003):  # the second where a covariance can't be factorised at what the first arrives at
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = guides(model, starts(name, found["data"]))[kind]()
        try:
            train(model, guide, steps // 2 if name in UNROLLED else steps, rate)
            break
        except torch.linalg.LinAlgError:
            if rate < 0.03:
                raise
    seconds = time.perf_counter() - start
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"guide": guide.state_dict(), "seconds": seconds}, path)
    return model, guide, seconds


def errors(tree: Any, reference: Mapping[str, Mapping[str, float]]) -> tuple[float, float, float]:
    """Return the largest errors of means (reference sds, and sds of the guide) and of log sds."""
    shift, own, ratio = 0.0, 0.0, 0.0
    for label, known in reference.items():
        site, index = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", label).groups()
        draws = tree["posterior"][site].values
        draws = draws if index is None else draws[..., int(index) - 1]
        away = abs(float(draws.mean()) - known["mean"])
        if not math.isfinite(away):  # the guide diverged
            return math.inf, math.inf, math.inf
        shift, own = max(shift, away / known["sd"]), max(own, away / float(draws.std()))
        ratio = max(ratio, abs(math.log(float(draws.std()) / known["sd"])))
    return shift, own, ratio


def judged_report(model: Program, guide: Any) -> Any:
    """Return the report of 4000 draws; of 64,000 where it asks for more of them."""
    for num_draws in (4000, 64_000):
        try:
            report = ph.diagnose(model, guide, num_draws=num_draws, error={"budget": 20_000})
        except torch.linalg.LinAlgError:  # annealing went where the model's covariance can't be factorised
            report = ph.diagnose(model, guide, num_draws=num_draws)
        if not any("do not tell" in finding.meaning for finding in report.findings):
            break
    return report


def row(name: str, kind: str, found: Mapping[str, Any], steps: int, fits: Path | None) -> dict[str, Any]:
    model, guide, trained = fitted(name, kind, found, steps, fits)
    tree = ph.to_datatree(model, guide, num_draws=10_000, groups=["posterior"])
    shift, own, ratio = errors(tree, found["reference"])
    start = time.perf_counter()
    report = judged_report(model, guide)
    judged = time.perf_counter() - start
    judged_by = [f for f in report.findings if "Posterior Predictive" not in f.source]
    worst = min(judged_by, key=lambda finding: LEVELS.index(finding.level))
    verdict = worst.level
    accurate = shift < MEANS and ratio < SDS
    error = report.numbers.get("error")
    bound = float(error.moment.mean_shift) if error else math.inf
    return {
        "posterior": name.split("-")[-1],
        "guide": kind,
        "means off (sd)": f"{shift:.2f}",
        "sds off (log)": f"{ratio:.2f}",
        "right": "yes" if accurate else "no",
        "k-hat": f"{float(report.numbers['khat']['joint']):.2f}" if "khat" in report.numbers else "",
        "KL at most": f"{float(error.kl):.2g}" if error else "inf",
        "means off at most (guide's sd)": f"{bound:.2g}",
        "bound holds": "yes" if own <= bound else "no",
        "verdict": verdict,
        "because": worst.what,
        "agrees": "yes" if (verdict in ("note", "good")) == accurate else "no",
        "far": "yes" if max(shift, ratio / SDS * MEANS) > FAR else "no",
        "seconds to train": f"{trained:.0f}",
        "to judge": f"{judged:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--guides", nargs="*", default=["mean-field", "full-rank", "flow", "amortised"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--fits", type=Path, help="folder in which fits are kept, to be judged again without training")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    rows = []
    for name in options.only:
        found = json.loads((options.folder / f"{name}.json").read_text())
        for kind in options.guides:
            if kind == "amortised" and name.startswith(FLAT):
                continue
            rows.append(row(name, kind, found, options.steps, options.fits))
            print(" | ".join(str(value) for value in rows[-1].values()), flush=True)
            write(options.out, [{key: value for key, value in one.items() if key != "because"} for one in rows])
    agree = sum(one["agrees"] == "yes" for one in rows)
    print(show(rows))
    print(f"{sum(one['bound holds'] == 'yes' for one in rows)} of {len(rows)} bounds hold")
    print(f"{agree} of {len(rows)} verdicts agree with the reference")


if __name__ == "__main__":
    main()
