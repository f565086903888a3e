"""Training by several processes at once: data in parallel, on one machine here, on many by the same lines.

    python examples/distributed.py [--short] [--out DIR] [--processes 2]

Every process sees its share of each batch and the gradients are averaged, so that any number of processes makes the
same steps, but for the noise. Writes distributed.png. Needs the extra 'distributed' (lightning-fabric).
"""

import argparse
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning_fabric import Fabric

import pyro_hvae as ph
from pyro_hvae.data import binarize, digits


def train(fabric, epochs):
    """One run; what is returned is the same in every process."""
    torch.manual_seed(0)  # all processes build the same programs, each then draws noise of its own
    data = digits()
    model, guide = ph.hvae(64, (12, 4), hidden=(128,))
    start = time.perf_counter()
    result = ph.fit(
        model,
        guide,
        data.train,
        bound=ph.IWELBO(num_particles=5),
        epochs=epochs,
        batch_size=100,  # over all processes, among which it must divide
        drop_last=True,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
        transform=binarize,
        fabric=fabric,
        seed=0,
        log_every=15,
        progress=False,
    )
    seconds = time.perf_counter() - start
    held_out = binarize(data.test, threshold=0.5)
    torch.manual_seed(1)
    score = ph.IWELBO(200).per_datum(model, guide, held_out).mean().item()
    weights = torch.cat([p.detach().flatten() for p in (*model.parameters(), *guide.parameters())])
    spread = 0.0 if fabric.world_size == 1 else float((fabric.all_gather(weights) - weights).abs().max())
    history = [(record["step"], record["loss"]) for record in result.history if "loss" in record]
    return {"held-out nats": score, "spread": spread, "seconds": seconds, "history": history}


if __name__ == "__main__":  # processes import this file anew
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning_fabric")

    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    print("processes   held-out nats an image   weights of two processes differ by   seconds")
    for processes in (1, options.processes):
        fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp_spawn" if processes > 1 else "auto")
        found = fabric.launch(train, 2 if options.short else 40)
        print(
            f"{processes:9d} {found['held-out nats']:24.2f} {found['spread']:36.1g} {found['seconds']:9.1f}", flush=True
        )
        axis.plot(*zip(*found["history"]), label=f"{processes} process" + "es" * (processes > 1))
    axis.set(xlabel="step", ylabel="loss, nats an image")
    axis.legend(frameon=False)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "distributed.png", dpi=150)
