"""Annealing whose path is learned against annealing that a pilot tunes, at as many density evaluations.

    python benchmarks/learned_annealing.py [--posteriors FOLDER] [--only NAME ...] [--evaluations 12] [--steps 600]
                                           [--hidden 32] [--chains 2000] [--rounds 3] [--short] [--csv FILE]

The width is that of the bracket: the mean log-weight of reverse chains from posterior draws, less that of forward
chains, nats.  Both start from the same mean-field guide, trained by its ELBO and then held; each chain has the same
number of leapfrog evaluations of the gradients of guide and model (training and pilots not counted; learned chains have
one more at their start, tuned ones a density at each temperature).  Tuned annealing has one,
three or five leapfrog steps a move, and of these the best is shown.  The two take turns, ``--rounds`` times; medians.

FOLDER has posteriordb's files as for ``posteriordb.py``; the posterior's draws are then those of long annealing (200
temperatures of five leapfrog steps, resampled).  ``digits`` is a VAE of scikit-learn's handwritten digits, and its data
images that are simulated from it, whose latents are exact draws; nats an image.

References: Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse, Ghahramani and Adams, 2015);
MCMC Variational Inference via Uncorrected Hamiltonian Annealing (Geffner and Domke, 2021).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from posteriordb import fitted
from strangers import MODELS
from tables import show, write
from torch import Tensor

import pyro_hvae as ph
from pyro_hvae.data import digits
from pyro_hvae.evidence import AnnealedBound, anneal

HERE = Path(__file__).resolve().parent
POSTERIORS = ["eight_schools-eight_schools_noncentered", "arK-arK", "nes2000-nes"]


class Case:
    """A pair with its data and exact posterior draws, ``(chains, ...)`` or one for each datum."""

    def __init__(self, model: Any, guide: Any, args: tuple, draws: dict[str, Tensor], chains: int) -> None:
        self.model, self.guide, self.args, self.draws, self.chains = model, guide, args, draws, chains

    @property
    def pair(self) -> tuple:
        return self.model, self.guide, *self.args


def stranger(name: str, folder: Path, chains: int, steps: int) -> Case:
    """Return a posterior of posteriordb, with the mean-field guide."""
    found = json.loads((folder / f"{name}.json").read_text())
    model, guide, _ = fitted(name, "mean-field", found, steps, None)
    torch.manual_seed(0)
    long = anneal(model, guide, num_chains=chains, betas=200, num_leapfrog=5)
    index = torch.multinomial(long.log_weights.softmax(0), chains, replacement=True)
    return Case(model, guide, (), {name: value[index] for name, value in long.values.items()}, chains)


def autoencoder(epochs: int, images: int) -> Case:
    """Return a VAE of digits, with images that are simulated from it."""
    torch.manual_seed(0)
    data = (digits().train > 0.5).to(torch.get_default_dtype())
    model, guide = ph.vae(64, 8, hidden=(64,))
    ph.fit(model, guide, data, bound=ph.LayerwiseELBO(), epochs=epochs, batch_size=100, seed=0, progress=False,
           optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3))  # fmt: skip
    simulated = ph.Problem(model, guide)(data[:images]).simulate()
    x = simulated.problem.args[0]
    return Case(model, guide, (x,), dict(simulated.values), 1)


def tuned(case: Case, leapfrog: int, evaluations: int) -> float:
    """Return the width of tuned annealing."""
    betas = max(1, round(evaluations / (leapfrog + 1)))
    forward = anneal(*case.pair, num_chains=case.chains, betas=betas, num_leapfrog=leapfrog)
    reverse = anneal(*case.pair, num_chains=case.chains, moves=forward.moves, reverse_from=case.draws)
    return float(reverse.log_weights.mean() - forward.log_weights.mean())


def learned(case: Case, bound: AnnealedBound) -> float:
    """Return the width of the learned chains."""
    with torch.no_grad():
        problem = ph.Problem(case.model, case.guide)(*case.args)
        forward = bound._forward(problem, case.chains)[0]
        reverse = -bound._reverse(problem, case.chains, case.draws)
    return float(reverse.mean() - forward.mean())


def train(case: Case, evaluations: int, steps: int, hidden: tuple[int, ...]) -> tuple[AnnealedBound, float]:
    """Train the path alone, and return it with the seconds that this took."""
    particles = 64 if not case.args else 1
    bound = AnnealedBound(evaluations, particles, hidden=hidden).prepare(*case.pair)
    for parameter in [*case.guide.parameters(), *case.model.parameters()]:
        parameter.requires_grad_(False)
    start = time.process_time()
    objective = bound(case.model, case.guide)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = ph.compile_step(objective, optimizer, case.args, backend="eager")
    for _ in range(steps):
        step(*case.args)
        schedule.step()
    return bound, time.process_time() - start


def row(name: str, case: Case, options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(1)
    bound, seconds = train(case, options.evaluations, options.steps, tuple(options.hidden))
    widths: dict[Any, list[float]] = {1: [], 3: [], 5: [], "learned": []}
    for _ in range(options.rounds):  # in turns
        for leapfrog in (1, 3, 5):
            widths[leapfrog].append(tuned(case, leapfrog, options.evaluations))
        widths["learned"].append(learned(case, bound))
    middle = {key: statistics.median(values) for key, values in widths.items()}
    best = min((1, 3, 5), key=middle.__getitem__)
    return {
        "posterior": name,
        "evaluations": options.evaluations,
        "width, tuned": f"{middle[best]:.3f}",
        "leapfrog steps": best,
        "width, learned": f"{middle['learned']:.3f}",
        "times narrower": f"{middle[best] / middle['learned']:.1f}",
        "steps of training": options.steps,
        "seconds": f"{seconds:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posteriors", type=Path, default=HERE.parent.parent / "shared" / "data" / "posteriordb")
    parser.add_argument("--only", nargs="*", default=[*POSTERIORS, "digits"], choices=[*MODELS, "digits"])
    parser.add_argument("--evaluations", type=int, default=12)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--hidden", type=int, nargs="*", default=[32])
    parser.add_argument("--chains", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="few steps and chains")
    parser.add_argument("--csv", default=None)
    options = parser.parse_args()
    if options.short:
        options.steps, options.chains, options.rounds = 3, 50, 1
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows = []
    for name in options.only:
        if name == "digits":
            case = autoencoder(2 if options.short else 100, 100 if options.short else 500)
        else:
            case = stranger(name, options.posteriors, options.chains, 20 if options.short else 2000)
        rows.append(row(name.split("-")[-1], case, options))
        print("  ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
        write(options.csv, rows)
    print("\n" + show(rows))


if __name__ == "__main__":
    main()
