"""The same VAE and IWAE in pythae and here: milliseconds a training step, and whether the reported values are right.

    python benchmarks/pythae_vae.py [--short] [--csv FILE]

pythae is no dependency of this project: install it in an environment of its own, beside this package. Its default
networks for 28 x 28 images, 784-512-16 and 16-512-784 with ReLU, are used on both sides with the same weights; batch
100, one fused Adam. Candidates take turns; medians of the processor time of one thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
from tables import show, write
from torch import Tensor, nn

import pyro_hvae as ph
from pyro_hvae.training.compile import compile_step

BATCH, PARTICLES = 100, 10


class Encoder(nn.Module):
    """pythae's encoder as a kernel."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, parent: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        found = self.net(parent)
        return dist.Normal(found.embedding, (0.5 * found.log_covariance).exp()).to_event(1)


class Decoder(nn.Module):
    """pythae's decoder as a kernel; its sigmoid is kept."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, parent: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        means = self.net(parent.flatten(0, -2)).reconstruction.reshape(*parent.shape[:-1], -1)
        return dist.Bernoulli(probs=means).to_event(1)


def ours(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Model and guide with the networks of a model of pythae."""
    latents = model.latent_dim
    top = ph.TopDown(z=ph.StandardNormal(latents), x=Decoder(model.decoder))
    return top, ph.BottomUp(z=Encoder(model.encoder))


def built(particles: int) -> nn.Module:
    options = {"input_dim": (1, 28, 28), "latent_dim": 16, "reconstruction_loss": "bce"}
    torch.manual_seed(0)
    return VAE(VAEConfig(**options)) if particles == 1 else IWAE(IWAEConfig(**options, number_samples=particles))


def step_of(loss: Callable[[], Tensor], parameters: list[Tensor]) -> Callable[[], object]:
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def speed(particles: int, x: Tensor, rounds: int, compiled: bool) -> dict[str, object]:
    theirs = built(particles)
    batch = {"data": x.reshape(-1, 1, 28, 28)}
    bound = ph.LayerwiseELBO() if particles == 1 else ph.IWELBO(particles)
    objective = bound(*ours(built(particles)))
    objective(x)
    steps = {
        "pythae": step_of(lambda: theirs(batch).loss, list(theirs.parameters())),
        "this library": step_of(lambda: objective(x) / BATCH, list(objective.parameters())),
    }
    if compiled:
        # the ready-made pair of the same widths, from logits: what one would write here
        model, guide = ph.vae(784, 16, hidden=(512,), activation="relu")
        own = bound(model, guide)
        own(x)
        graph = compile_step(own, torch.optim.Adam(own.parameters(), lr=1e-3, fused=True), x)
        steps["compiled"] = lambda: graph(x)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(1e3 * (time.process_time() - start))
    found = {name: f"{statistics.median(taken[rounds // 5 :]):.2f}" for name, taken in times.items()}
    what = "VAE" if particles == 1 else f"IWAE, K = {particles}"
    return {"what": f"{what}: CPU ms a step", "compiled": "–", "truth": "–"} | found


def values(x: Tensor, repeats: int) -> list[dict[str, object]]:
    """Reported against true, in nats an image, after some training."""
    model = built(PARTICLES)
    step = step_of(lambda: model({"data": x.reshape(-1, 1, 28, 28)}).loss, list(model.parameters()))
    for _ in range(repeats):
        step()
    pair = ours(model)
    with torch.no_grad():
        reported = torch.stack([-model({"data": x.reshape(-1, 1, 28, 28)}).loss for _ in range(repeats)]).mean()
    bound = torch.stack([ph.IWELBO(PARTICLES).per_datum(*pair, x).mean() for _ in range(repeats)]).mean()
    tight = ph.IWELBO(5000, chunk_size=100).per_datum(*pair, x[:20]).mean()
    with torch.no_grad():
        theirs = model.get_nll(x[:20].reshape(-1, 1, 28, 28), n_samples=5000)
    one = torch.stack([ph.IWELBO(1).per_datum(*pair, x[:20]).mean() for _ in range(50)]).mean()
    with torch.no_grad():
        asked_one = torch.tensor([model.get_nll(x[:20].reshape(-1, 1, 28, 28), n_samples=1) for _ in range(5)]).mean()
    # by hand: log of the average weight
    with torch.no_grad():
        q = pair[1].z(x)
        z = q.sample((PARTICLES * repeats,))
        log_w = pair[0].x(z).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z)
        groups = log_w.reshape(repeats, PARTICLES, -1)
        truth = (groups.logsumexp(1) - math.log(PARTICLES)).mean()
    row = {"compiled": "–"}
    return [
        row | {"what": f"the bound of {PARTICLES} draws, as the IWAE reports it, nats", "pythae": f"{reported:.2f}",
               "this library": f"{bound:.2f}", "truth": f"{truth:.2f}"},
        row | {"what": "log p(x) by 5000 draws, nats", "pythae": f"{theirs:.2f}", "this library": f"{tight:.2f}",
               "truth": "–"},
        row | {"what": "the same when asked for 1 draw (the ELBO)", "pythae": f"{asked_one:.2f}",
               "this library": f"{one:.2f}", "truth": f"{log_w[:, :20].mean():.2f}"},
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, nothing compiled")
    parser.add_argument("--csv", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # strokes: images whose pixels hang together, so that there is something to learn
    prototypes = (torch.rand(10, 784) < 0.2).float()
    x = (prototypes[torch.randint(10, (BATCH,))] - (torch.rand(BATCH, 784) < 0.05).float()).abs()
    rounds = 20 if options.short else 60
    order = ("what", "pythae", "this library", "compiled", "truth")
    rows = [speed(particles, x, rounds, not options.short) for particles in (1, PARTICLES)]
    rows += values(x, 20 if options.short else 60)
    rows = [{name: row[name] for name in order} for row in rows]
    print(show(rows))
    write(options.csv, rows)


if __name__ == "__main__":
    main()
