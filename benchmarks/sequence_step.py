"""A training step of a deep Markov model: this package beside Pyro's SVI on a program with two sites a time step.

    python benchmarks/sequence_step.py [--steps 60] [--batch 20] [--repeats 15]

Both have the sizes of Pyro's tutorial: latent 100, emission 100, transition 200, a recurrent network of 600 that runs
backwards.  The program for SVI samples ``z_t`` and ``x_t`` in a loop over time inside of a plate, with masks for ragged
sequences, as the tutorial does, and is trained by ``Trace_ELBO`` and Pyro's ``ClippedAdam``; this package's pair by one
fused Adam with clipping.  Each runs in a process of its own, in turns; medians in milliseconds of processor time.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_hvae as ph
from pyro_hvae.models import deep_markov

KEYS, LATENT, EMISSION, GATE, FEATURES = 88, 100, 100, 200, 600


class Looped(nn.Module):
    """A deep Markov model and its guide with two sites a time step."""

    def __init__(self) -> None:
        super().__init__()
        model, guide = deep_markov(KEYS, LATENT, hidden=EMISSION, gate=GATE, features=FEATURES)
        self.transition, self.emission = model.kernels["transition"].net, model.kernels["emission"].net
        self.combiner, self.rnn = guide.kernels["transition"].net, guide.rnn
        self.start, self.guide_start = nn.Parameter(torch.zeros(LATENT)), nn.Parameter(torch.zeros(LATENT))

    def gaussian(self, parameters: Tensor) -> dist.Normal:
        loc, raw = parameters.chunk(2, -1)
        return dist.Normal(loc, nn.functional.softplus(raw) + 1e-3)

    def model(self, x: Tensor, valid: Tensor) -> None:
        pyro.module("looped", self)
        z = self.start.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                with poutine.mask(mask=valid[:, t]):
                    z = pyro.sample(f"z_{t}", self.gaussian(self.transition(z)).to_event(1))
                    pyro.sample(f"x_{t}", dist.Bernoulli(logits=self.emission(z)).to_event(1), obs=x[:, t])

    def guide(self, x: Tensor, valid: Tensor) -> None:
        pyro.module("looped", self)
        features = self.rnn(x.flip(1))[0].flip(1)
        z = self.guide_start.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                with poutine.mask(mask=valid[:, t]):
                    z = pyro.sample(f"z_{t}", self.gaussian(self.combiner(z, features[:, t])).to_event(1))


def svi(x: Tensor, lengths: Tensor) -> Callable[[], object]:
    looped = Looped()
    valid = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-4, "betas": (0.96, 0.999), "clip_norm": 10.0})
    steps = SVI(looped.model, looped.guide, optimizer, Trace_ELBO())
    return lambda: steps.step(x, valid)


def package(x: Tensor, lengths: Tensor) -> Callable[[], object]:
    model, guide = deep_markov(KEYS, LATENT, hidden=EMISSION, gate=GATE, features=FEATURES)
    loss = ph.TraceELBO()(model, guide)
    parameters = list(loss.parameters())
    optimizer = torch.optim.Adam(parameters, lr=3e-4, betas=(0.96, 0.999), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(x, lengths=lengths).backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()

    return step


CANDIDATES = {"pyro": svi, "pyro_hvae": package}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="length of the longest sequence")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each candidate, in turns")
    parser.add_argument("--only", choices=list(CANDIDATES), help="measure one in this process")
    options = parser.parse_args()
    if options.only is None:
        found: dict[str, list[float]] = {name: [] for name in CANDIDATES}
        for _ in range(options.rounds):
            for name in CANDIDATES:
                run = [sys.executable, __file__, "--only", name, "--steps", options.steps, "--batch", options.batch]
                run += ["--repeats", options.repeats]
                out = subprocess.run([str(part) for part in run], capture_output=True, text=True, check=True).stdout
                found[name].append(float(out))
        medians = {name: statistics.median(values) for name, values in found.items()}
        for name, value in medians.items():
            print(f"{name:10s} {value:8.1f} ms a step  (each process: {', '.join(f'{v:.1f}' for v in found[name])})")
        print(f"ratio {medians['pyro_hvae'] / medians['pyro']:.2f}")
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.enable_validation(False)
    x = (torch.rand(options.batch, options.steps, KEYS) < 0.05).float()
    lengths = torch.randint(options.steps // 2, options.steps + 1, (options.batch,))
    step = CANDIDATES[options.only](x, lengths)
    for _ in range(3):
        step()
    times = []
    for _ in range(options.repeats):
        start = time.process_time()
        step()
        times.append(1e3 * (time.process_time() - start))
    print(statistics.median(times))


if __name__ == "__main__":
    main()
