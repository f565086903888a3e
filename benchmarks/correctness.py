"""Where an estimator of Pyro is off: its value, ours, and the truth, on programs whose answer is known.

    python benchmarks/correctness.py [--short] [--csv FILE]

Each row is an average over repeated evaluations with its standard error. ``tests/bounds/test_pyro_pitfalls.py`` asserts
the same cases, and some that are no numbers (an error, a stale attribute).
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.importance import psis_diagnostic
from tables import show, write
from torch import nn

import pyro_hvae as ph

Row = dict[str, object]
VECTORISED = {"vectorize_particles": True, "max_plate_nesting": 1}


def shown(values: list[float] | torch.Tensor, digits: int = 2) -> str:
    values = torch.as_tensor(values, dtype=torch.float64)
    return f"{values.mean():.{digits}f} ± {values.std() / len(values) ** 0.5:.{digits}f}"


def linear(weight: float, scale: float) -> nn.Module:
    return ph.LinearGaussian(1, 1, weight=torch.tensor([[weight]]), bias=False, scale=scale)


def bottom_up(repeats: int) -> Row:
    """z_1's parent in the model was drawn from z_1 in the guide: no divergence of conditionals is the term."""
    model = ph.TopDown(z2=ph.StandardNormal(1), z1=linear(0.9, 0.5), x=linear(1.2, 0.7))
    guide = ph.BottomUp(z1=linear(0.6, 0.45), z2=linear(0.7, 0.6))
    x = model(size=200).detach()
    found = {}
    for name, bound in {
        "Pyro": TraceMeanField_ELBO(num_particles=100, **VECTORISED),
        "this library": ph.LayerwiseELBO(100),
        "truth": Trace_ELBO(num_particles=1000, **VECTORISED),
    }.items():
        found[name] = shown([-float(bound.loss(model, guide, x)) / 200 for _ in range(repeats)], 3)
    return {"case": "ELBO of a bottom-up guide, TraceMeanField_ELBO / LayerwiseELBO, nats a datum", **found}


def scaled(repeats: int) -> Row:
    """Under poutine.scale of the guide alone."""
    x = torch.tensor([0.4, -1.2, 0.9])

    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("data", 3), pyro.poutine.scale(scale=0.3):
            pyro.sample("z", dist.Normal(0.4 * x, 0.8))

    loc, s, half_log = 0.4 * x, 0.8, 0.5 * math.log(2 * math.pi)
    cross = -0.5 * (s**2 + loc**2) - half_log
    likelihood = -0.5 * ((x - loc) ** 2 + s**2) - half_log
    truth = (cross + likelihood + 0.3 * (0.5 + half_log + math.log(s))).sum()
    theirs, ours = TraceMeanField_ELBO(num_particles=500, **VECTORISED), ph.LayerwiseELBO(500)
    return {
        "case": "objective under a scale of the guide alone, TraceMeanField_ELBO / LayerwiseELBO",
        "Pyro": shown([-float(theirs.loss(model, guide)) for _ in range(repeats)]),
        "this library": shown([-float(ours.loss(model, guide)) for _ in range(repeats)]),
        "truth": f"{truth:.2f}",
    }


def minibatches(repeats: int) -> list[Row]:
    """Forty data in batches of two: N/B = 20 belongs outside of the logarithm."""
    x = 2**0.5 * torch.randn(40)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(1.0))
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(loc, 1.3).expand([len(x)]))

    evidence = dist.Normal(0.0, 2**0.5).log_prob(x).sum()
    values: Row = {"case": "bound on log p of 40 data from minibatches of 2, RenyiELBO(0) / IWELBO, K = 10"}
    slopes: Row = {"case": "its gradient in the guide's location (the truth: with all data in one batch)"}
    pyro.clear_param_store()
    for name, bound in {
        "Pyro": RenyiELBO(alpha=0, num_particles=10, **VECTORISED),
        "this library": ph.IWELBO(10),
    }.items():
        found, gradients = [], []
        for _ in range(repeats):
            total, loc = 0.0, pyro.param("loc", torch.tensor(1.0))
            loc.grad = None
            for part in x[torch.randperm(40)].split(2):
                total -= float(bound.loss_and_grads(model, guide, part)) / 20
            found.append(total)
            gradients.append(float(loc.grad) / 20)
        values[name], slopes[name] = shown(found, 1), shown(gradients, 1)
    whole = []
    for _ in range(repeats):
        pyro.param("loc").grad = None
        ph.IWELBO(10).loss_and_grads(model, guide, x)
        whole.append(float(pyro.param("loc").grad))
    values["truth"], slopes["truth"] = f"at most {evidence:.1f}", shown(whole, 1)
    return [values, slopes]


def global_latent(repeats: int) -> Row:
    """One latent outside of the plate turns Pyro's weights per datum into one weight of the whole batch."""
    x = torch.randn(30)

    def model() -> None:
        pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 30):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 30):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.3).expand([30]))

    theirs, ours = RenyiELBO(alpha=0, num_particles=50, **VECTORISED), ph.IWELBO(50, share_globals=True)
    return {
        "case": "log p with a global latent, RenyiELBO(0) / IWELBO(share_globals=True), K = 50",
        "Pyro": shown([-float(theirs.loss(model, guide)) for _ in range(repeats)]),
        "this library": shown([-float(ours.loss(model, guide)) for _ in range(repeats)]),
        "truth": f"{dist.Normal(0.0, 2**0.5).log_prob(x).sum():.2f}",
    }


def wake(repeats: int) -> Row:
    """Total variance of the wake-phase gradient of 100 data, weights of the whole batch against weights per datum."""
    model = ph.TopDown(z=ph.StandardNormal(1), x=linear(1.0, 1.0))
    x = model(size=100).detach()
    runs: dict[str, str] = {}
    for name in ("Pyro", "this library"):
        guide = ph.BottomUp(z=ph.LinearGaussian(1, 1, weight=torch.tensor([[0.3]]), bias=False, scale=0.9))
        found = []
        for _ in range(max(10, repeats)):
            pyro.clear_param_store()
            for p in guide.parameters():
                p.grad = None
            if name == "Pyro":
                bound: object = ReweightedWakeSleep(num_particles=20, insomnia=1.0, **VECTORISED)
            else:
                bound = ph.WakePhase(20)
            bound.loss_and_grads(model, guide, x)
            found.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
        runs[name] = f"{torch.stack(found).var(0).sum():.3g}"
    return {
        "case": "variance of the wake-phase gradient, ReweightedWakeSleep / WakePhase, K = 20",
        **runs,
        "truth": "–",
    }


def landing(repeats: int) -> Row:
    """At the exact posterior the path derivative has no variance."""
    model = ph.TopDown(z=ph.StandardNormal(1), x=linear(1.0, 1.0))
    guide = ph.BottomUp(z=linear(0.5, 0.5**0.5))
    x, found = model(size=100).detach(), {}
    for name, bound in {"Pyro": Trace_ELBO(), "this library": ph.TraceELBO(gradient="stl")}.items():
        runs = []
        for _ in range(max(10, repeats)):
            loss = bound.differentiable_loss(model, guide, x)
            runs.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(guide.parameters()))]))
        found[name] = f"{torch.stack(runs).var(0).sum():.2g}"
    return {"case": "gradient variance at the exact posterior, Trace_ELBO / TraceELBO('stl')", **found, "truth": "0"}


def khat(repeats: int) -> Row:
    """The same guide for each of 1, 10, 100, 1000 data: its quality does not change."""
    theirs, ours, nesting = [], [], {"max_plate_nesting": 1}
    for size in (1, 10, 100, 1000):
        x = torch.ones(size)

        def model(x: torch.Tensor = x) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x: torch.Tensor = x) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.5 * x, 0.8))

        theirs.append(psis_diagnostic(model, guide, num_particles=1000, max_simultaneous_particles=1000, **nesting))
        ours.append(float(ph.log_evidence(model, guide, num_samples=1000).khat.median()))
    return {
        "case": "k-hat of one guide on 1, 10, 100, 1000 data, psis_diagnostic / log_evidence (median)",
        "Pyro": ", ".join(f"{k:.2f}" for k in theirs),
        "this library": ", ".join(f"{k:.2f}" for k in ours),
        "truth": "the same for all",
    }


class Net(pyro.nn.PyroModule):
    """A raw child named ``net``, in the model and in the guide alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Linear(width, 1)


class Decoder(Net):
    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Encoder(Net):
    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))


def untrained(repeats: int) -> Row:
    """How far the decoder's weight moves in 5 steps of SVI when both programs call their network the same."""
    x, found = torch.randn(50, 1), {}
    for name, bound in {"Pyro": Trace_ELBO(), "this library": ph.TraceELBO()}.items():
        pyro.clear_param_store()
        model, guide = Decoder(1), Encoder(1)
        before = model.net.weight.detach().clone()
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), bound)
        try:
            for _ in range(5):
                svi.step(x)
            found[name] = f"{float((model.net.weight - before).abs().max()):.3f}"
        except ValueError:
            found[name] = "an error that names it"
    return {
        "case": "movement of a weight whose name two programs share, Trace_ELBO / TraceELBO",
        **found,
        "truth": "trained",
    }


CASES: list[Callable[[int], Row | list[Row]]] = [
    bottom_up, scaled, minibatches, global_latent, wake, landing, khat, untrained,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few repeats")
    parser.add_argument("--csv", default=None)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    rows: list[Row] = []
    for case in CASES:
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        found = case(5 if options.short else 40)
        rows += found if isinstance(found, list) else [found]
    print(show(rows))
    write(options.csv, rows)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
