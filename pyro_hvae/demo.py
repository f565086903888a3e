r"""Demonstration of ``pyro-hvae demo``: three models of handwritten digits, trained for the same time.

The data are scikit-learn's digits, 8 x 8, cut to black and white at half the grey range. A Markovian hierarchical VAE,
a ladder VAE with the same generative model, and a VAE with one layer are trained for the same number of seconds, and
compared on held-out images by

- the evidence lower bound and its terms, one a layer (nats);
- the importance-weighted bound with K = 1000 draws, :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k | x)`, in nats and in
  bits per dimension, nats / (64 log 2), the tightest bound on log p(x) of these;
- active units per layer, :math:`\mathrm{Var}_x\, E_q[u | x] > 0.01`;
- the log-likelihood of independent Bernoulli pixels with the training set's frequencies, a baseline.

All three are trained on the layerwise bound, its divergences weighted by a factor that grows to one in the first half
of the time. The ladder's terms are true divergences, so it also gets free bits that decrease to zero: without them
its upper layers collapse. The report has the unweighted bound.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hvae import models, plots
from pyro_hvae.bounds import IWELBO, LayerwiseELBO, Regularised
from pyro_hvae.chains import decode, encode, reconstruct
from pyro_hvae.data import binarize, digits
from pyro_hvae.diagnostics import to_datatree
from pyro_hvae.diagnostics.layers import active_units
from pyro_hvae.problem import Problem
from pyro_hvae.training import fit

__all__ = ["Clock", "bernoulli_baseline", "demo", "evaluate"]

_LATENTS = (32, 16, 8)
_HIDDEN = (128,)
_SHAPE = (8, 8)


class Clock:
    """Callback that ends a run after some seconds, with a cosine schedule of the learning rate.

    Seconds are processor time, so other work of the machine does not change the comparison.

    Args:
        seconds: of training, > 0.
        rate: learning rate at the start.
        label: of the progress bar; ``None`` for no bar.

    Raises:
        ValueError: for ``seconds <= 0``.
    """

    def __init__(self, seconds: float, rate: float, label: str | None = None) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds must be positive, got {seconds}.")
        self.seconds, self.rate, self.label = seconds, rate, label
        self._start: float | None = None
        self._bar: Any = None

    @property
    def fraction(self) -> float:
        """Fraction of the time that has passed, in [0, 1]."""
        return 0.0 if self._start is None else min((time.process_time() - self._start) / self.seconds, 1.0)

    def kl_weight(self, step: int) -> float:
        """Return the weight of the divergences: the square of a line from 0 to 1 over the first half of the time."""
        return min(1.0, self.fraction / 0.5) ** 2

    def free_bits(self, step: int) -> float:
        """Return the free bits of a layer: from 1 nat to 0 over the first three fifths of the time."""
        return max(0.0, 1.0 - self.fraction / 0.6)

    def __repr__(self) -> str:
        return f"Clock(seconds={self.seconds:g}, rate={self.rate:g})"

    def on_start(self, run: Any) -> None:
        self._start = time.process_time()
        if self.label is not None:
            form = "{desc:<12} {percentage:3.0f}% |{bar:30}| {postfix}"
            self._bar = tqdm(total=self.seconds, desc=self.label, bar_format=form)

    def on_step(self, run: Any, loss: Any) -> None:
        fraction = self.fraction
        for group in run.optimizer.param_groups:
            group["lr"] = self.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction)))
        if fraction >= 1.0:
            run.stop("the time is over")

    def on_record(self, run: Any, record: dict[str, Any]) -> None:
        if self._bar is not None and record.get("loss") is not None:
            self._bar.n = self.fraction * self.seconds
            fields = [f"step {run.step}", f"loss {record['loss']:.2f}"]
            fields += [f"{name} {value:.2f}" for name, value in record.items() if name.startswith(("kl_", "rate_"))]
            self._bar.set_postfix_str(", ".join(fields))

    def on_end(self, run: Any) -> None:
        if self._bar is not None:
            self._bar.n = self.seconds
            self._bar.close()


def bernoulli_baseline(train: Tensor, test: Tensor) -> Tensor:
    """Return the log-likelihood of images under independent pixels with the training set's frequencies.

    Args:
        train: black-and-white images (N, D).
        test: the same (M, D).

    Returns:
        (M,), in nats. Frequencies are estimated with one success and one failure added, so none is 0 or 1.

    Example:
        >>> bernoulli_baseline(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0]])).exp()
        tensor([0.5000])
    """
    frequency = (train.sum(0) + 1) / (len(train) + 2)
    return (test * frequency.log() + (1 - test) * torch.log1p(-frequency)).sum(-1)


def evaluate(model: Any, guide: Any, x: Tensor, *, num_particles: int = 1000, chunk_size: int = 100) -> dict[str, Any]:
    """Evaluate one pair on data x (N, D), for the report.

    Returns:
        ``elbo``, ``log_likelihood`` (the importance-weighted bound with ``num_particles`` draws) and ``stderr`` of its
        mean over the data, in nats; ``bits_per_dim``; ``terms`` by name in nats; ``active`` units by site.
    """
    problem = Problem(model, guide)(x)
    terms = {name: float(value.mean()) for name, value in LayerwiseELBO(num_particles=50).terms(problem).items()}
    weighted = IWELBO(num_particles, chunk_size=chunk_size).terms(problem)
    bound, mean = weighted["bound"], float(weighted["bound"].mean())
    return {
        "elbo": float(elbo_of(weighted).mean()),
        "log_likelihood": mean,
        "stderr": float(bound.std() / math.sqrt(len(x))),
        "bits_per_dim": -mean / (x[0].numel() * math.log(2)),
        "terms": terms,
        "active": active_units(model, guide, x),
    }


def elbo_of(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the evidence lower bound from the terms of an importance-weighted bound: that of the same draws."""
    return terms["reconstruction"] - sum(term for name, term in terms.items() if name.startswith("rate_"))


def demo(
    out: str | Path = "runs/demo",
    *,
    seconds: float = 40.0,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train three models, compare them, plot, and write the results to a folder.

    The folder gets a run directory for each model (``pyro_hvae.load`` reads it), ``results.json``, ``posterior.nc``
    with draws of the HVAE's guide, and pictures of training, layers, reconstructions and samples. An
    earlier demonstration in the same folder is replaced.

    Args:
        out: the folder.
        seconds: of processor time to train each of the three models.
        seed: of weights, noise and order of the data; the number of steps made in the time varies all the same.
        progress: show a bar.
        say: called with each line of the report.

    Returns:
        The content of ``results.json``: ``baseline`` in nats, and for each model the result of :func:`evaluate` with
        ``steps`` and ``training_seconds`` by the wall clock.

    Raises:
        ImportError: without scikit-learn.
        ValueError: for ``seconds <= 0``.
    """
    out = Path(out)
    images = digits()
    train, test = (binarize(part, threshold=0.5) for part in (images.train, images.test))
    baseline = bernoulli_baseline(train, test)
    width = train.shape[1]
    pairs: dict[str, Callable[[], Any]] = {
        "hvae": lambda: models.hvae(width, _LATENTS, hidden=_HIDDEN),
        "ladder_vae": lambda: models.ladder_vae(width, _LATENTS, hidden=_HIDDEN),
        "vae": lambda: models.vae(width, _LATENTS[0], hidden=_HIDDEN),
    }
    say(f"{len(train)} handwritten digits to train on, {len(test)} held out; 8 x 8 pixels, black and white")
    say(f"three models, {seconds:g} s of training each; latents from the data upwards: {_LATENTS}")

    trained: dict[str, Any] = {}
    results: dict[str, Any] = {"baseline": float(baseline.mean()), "seconds": seconds, "seed": seed, "models": {}}
    for name, build in pairs.items():
        _remove_run(out / name)
        torch.manual_seed(seed)
        model, guide = build()
        clock = Clock(seconds, rate=2e-3, label=name if progress else None)
        started = time.perf_counter()
        with _one_thread():
            result = fit(
                model,
                guide,
                train,
                bound=Regularised(
                    LayerwiseELBO(),
                    kl_weight=clock.kl_weight,
                    free_bits=clock.free_bits if name == "ladder_vae" else 0.0,
                ),
                optimizer=partial(torch.optim.Adam, lr=clock.rate, fused=True),
                steps=10**7,
                batch_size=100,
                seed=seed,
                validation=test,
                validate_every=200,
                log_every=100,
                terms_every=200,
                run_dir=out / name,
                callbacks=[clock],
                progress=False,
            )
        taken = time.perf_counter() - started
        model.eval()
        guide.eval()
        torch.manual_seed(seed)
        outcome = {"steps": result.steps, "training_seconds": taken, **evaluate(model, guide, test)}
        trained[name], results["models"][name] = (model, guide, result.history), outcome

    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for line in report(results):
        say(line)
    model, guide, history = trained["hvae"]
    for line in _posterior(model, guide, test, out / "posterior.nc"):
        say(line)
    pictures = _draw(model, guide, history, results["models"]["hvae"], test, out)
    say(f"\nwritten to {out}: {', '.join(pairs)} (weights, history), results.json, posterior.nc, {', '.join(pictures)}")
    return results


def report(results: dict[str, Any]) -> list[str]:
    """Return the lines of the comparison."""
    outcomes, baseline = results["models"], results["baseline"]
    names = {"hvae": "HVAE", "ladder_vae": "ladder VAE", "vae": "one layer"}
    lines = ["", "held-out images, nats each" + "".join(f"{names[name]:>14}" for name in outcomes) + f"{'pixels':>12}"]

    def row(label: str, values: list[str], last: str = "") -> None:
        lines.append(f"{label:<26}" + "".join(f"{value:>14}" for value in values) + f"{last:>12}")

    row("optimiser steps", [f"{f['steps']}" for f in outcomes.values()])
    row("ELBO", [f"{f['elbo']:.2f}" for f in outcomes.values()])
    row("IWELBO, K = 1000", [f"{f['log_likelihood']:.2f}" for f in outcomes.values()], f"{baseline:.2f}")
    row("  standard error", [f"{f['stderr']:.2f}" for f in outcomes.values()])
    row(
        "  in bits per pixel",
        [f"{f['bits_per_dim']:.3f}" for f in outcomes.values()],
        f"{-baseline / 64 / math.log(2):.3f}",
    )
    row("  above the pixels", [f"{f['log_likelihood'] - baseline:.2f}" for f in outcomes.values()])
    row("reconstruction", [f"{f['terms']['reconstruction']:.2f}" for f in outcomes.values()])
    for layer in sorted({site for f in outcomes.values() for site in f["active"]}):
        cells = []
        for f in outcomes.values():
            term = next((name for name in f["terms"] if name.split("_", 1)[-1] == layer), None)
            cells.append("" if term is None else f"{term.split('_')[0]} {f['terms'][term]:.2f}")
        row(f"layer {layer}", cells)
        row("  active units", [f"{f['active'].get(layer, '')}" for f in outcomes.values()])
    lines.append("")
    for name, f in outcomes.items():
        collapsed = [site for site, count in f["active"].items() if count == 0]
        if collapsed:
            lines.append(f"{names[name]}: {', '.join(sorted(collapsed))} collapsed onto the prior (no active unit).")
    gain = outcomes["hvae"]["log_likelihood"] - baseline
    verdict = "" if gain >= 5 else ", less than the 5 that this demonstration expects: train for longer"
    lines.append(f"The HVAE is {gain:.2f} nats an image above independent pixels{verdict}.")
    if sum(count > 0 for count in outcomes["ladder_vae"]["active"].values()) < 2:
        lines.append("The ladder VAE has active units in fewer than two layers; it should have them in two or more.")
    return lines


def _posterior(model: Any, guide: Any, test: Tensor, path: Path) -> list[str]:
    """Write draws for the first held-out images; return ArviZ's summary of the top layer for the first."""
    import arviz_stats

    x = test[:20]
    tree = to_datatree(model, guide, x, num_draws=500)
    tree.to_netcdf(path, engine="h5netcdf")
    top = f"z{len(_LATENTS)}"
    posterior = tree["posterior"].to_dataset()
    plate = next(dim for dim in posterior[top].dims if dim not in ("chain", "draw"))
    summary = arviz_stats.summary(posterior[[top]].isel({plate: 0}), kind="stats")
    return ["", f"ArviZ on q({top} | first held-out image), 500 draws:", str(summary)]


def _draw(model: Any, guide: Any, history: Any, outcome: dict[str, Any], test: Tensor, out: Path) -> list[str]:
    """Plot the HVAE; return the names of the files."""
    rows, titles = depths(model, guide, test[:12])
    name = f"HVAE with {len(_LATENTS)} layers"
    figures = {
        "training.png": plots.training_curves(history, title=f"{name}: training"),
        "layers.png": plots.layer_kl(
            outcome["terms"], units=outcome["active"], title=f"{name}: terms of the layers, held-out images"
        ),
        "reconstructions.png": plots.reconstructions(
            test,
            reconstruct(model, guide, test, num_draws=50),
            _SHAPE,
            title=f"{name}: held-out images and their reconstructions, "
            f"log p(x) >= {outcome['log_likelihood']:.2f} nats ({outcome['bits_per_dim']:.3f} bits/dim)",
        ),
        "samples.png": plots.samples(
            decode(model, {}, size=100).mean,
            _SHAPE,
            data=test[:100],
            title=f"{name}: held-out images, and means of p(x | z1) for z drawn from the prior",
        ),
        "depths.png": plots.samples(
            rows, _SHAPE, titles=titles, title=f"{name}: held-out images, decoded with the layers from one upwards kept"
        ),
    }
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=150)
    return list(figures)


def depths(model: Any, guide: Any, x: Tensor) -> tuple[list[Tensor], list[str]]:
    """Decode images with the layers from some depth upwards kept and the others drawn from the prior.

    Returns:
        Rows of images (the data; those with z_1 kept, z_2 kept, ...; draws from the prior), and their titles. Images
        are the means of p(x | z_1).
    """
    latents = encode(guide, x)
    rows, titles = [x], ["data"]
    for site in reversed(model.latents):
        rows.append(decode(model, {site: latents[site]}).mean)
        titles.append(f"{site} kept")
    rows.append(decode(model, {}, size=len(x)).mean)
    titles.append("prior")
    return rows, titles


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one core: networks this small are no faster on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _remove_run(run_dir: Path) -> None:
    """Remove the run directory of an earlier demonstration, and nothing else."""
    if (run_dir / "config.json").exists():
        shutil.rmtree(run_dir)
