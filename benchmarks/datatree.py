"""A tree of many draws on disk: time, peak memory and size, beside a loop of Pyro's Predictive that keeps all it drew.

    python benchmarks/datatree.py
    python benchmarks/datatree.py --data 1000 --draws 100

A hierarchical VAE of three layers (8, 4 and 2 units) of 64 binary pixels, untrained.  Each row is a process of its own,
so that its peak resident memory is its own; beside it stand processor time, which a busy machine distorts less than the
clock's, and the memory of the same process before it draws anything (torch, Pyro, ArviZ, the data).  Three contents:

- ``tree, as Predictive``: latents and a prediction of each datum at each draw, what Predictive returns;
- ``tree, densities``: latents with log-likelihood, log-prior and log-densities and weights by layer, no predictions;
- ``tree, all groups``.

Measured on one of two cores that many processes shared, torch 2.13, 10,000 data, 1,000 draws; 312 MB of each peak are
taken before the first draw:

=========================  ======  =======  =======
netCDF                     CPU s   peak MB  disk MB
=========================  ======  =======  =======
tree, as Predictive          26.3      411     1145
tree, densities              29.5      419      841
tree, all groups                       477     3130
loop of Predictive          108.7     7637        0
=========================  ======  =======  =======

(The processor time of all groups was not taken; by the clock they took 2.7 times as long as the first row.)
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Predictive

import pyro_hvae as ph

DENSITIES = ["posterior", "sample_stats", "log_likelihood", "log_prior", "observed_data"]
CONTENTS = {
    "tree, as Predictive": ["posterior", "posterior_predictive"],
    "tree, densities": DENSITIES,
    "tree, all groups": None,
}


def pair(size: int) -> tuple[Any, Any, torch.Tensor]:
    """Model, guide and data of the measurement."""
    pyro.set_rng_seed(0)
    model, guide = ph.hvae((64,), (8, 4, 2), hidden=(32,))
    x = torch.bernoulli(torch.full((size, 64), 0.3))
    with torch.no_grad():
        model(x[:2]), guide(x[:2])
    return model, guide, x


def peak() -> float:
    """Largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def by_predictive(model: Any, guide: Any, x: torch.Tensor, num_draws: int) -> None:
    """One draw after another, all kept, as Predictive does unless all draws run at once."""
    latents, predicted = [], []
    for _ in range(num_draws):
        drawn = Predictive(guide, num_samples=1)(x)
        seen = Predictive(model, posterior_samples=drawn, return_sites=["x"])(size=len(x))
        latents.append({name: value[0] for name, value in drawn.items()})
        predicted.append(seen["x"][0])
    {name: torch.stack([part[name] for part in latents]) for name in latents[0]}
    torch.stack(predicted)


def measure(what: str, suffix: str, size: int, num_draws: int, scratch: Path) -> dict[str, Any]:
    """One row, in this process."""
    import arviz_base  # noqa: F401  what a user of either has imported
    import xarray  # noqa: F401

    model, guide, x = pair(size)
    ph.to_datatree(model, guide, x[:2], num_draws=1)
    before, path = peak(), scratch / f"tree{suffix}"
    start, used = time.perf_counter(), time.process_time()
    if what == "loop of Predictive":
        with torch.no_grad():
            by_predictive(model, guide, x, num_draws)
    else:
        ph.to_datatree(model, guide, x, num_draws=num_draws, groups=CONTENTS[what], path=path)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    files = [path] if path.is_file() else list(path.rglob("*"))
    disk = sum(file.stat().st_size for file in files if file.is_file()) / 2**20 if path.exists() else 0.0
    return {"seconds": seconds, "cpu": used, "before": before, "peak": peak(), "disk": disk}


def row(what: str, suffix: str, size: int, num_draws: int) -> dict[str, Any]:
    """One row, in a process of its own."""
    scratch = Path(tempfile.mkdtemp())
    try:
        call = [sys.executable, __file__, "--row", what, "--suffix", suffix, "--scratch", str(scratch)]
        call += ["--data", str(size), "--draws", str(num_draws)]
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--row", help="measure this row in this process, and print it as JSON")
    parser.add_argument("--suffix", default=".nc")
    parser.add_argument("--scratch", type=Path, default=Path())
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row, options.suffix, options.data, options.draws, options.scratch)))
        return
    print(f"{options.data} data, {options.draws} draws, 3 layers; {torch.get_num_threads()} thread(s)")
    print(f"{'':28} {'s':>7} {'CPU s':>7} {'peak MB':>9} {'before':>7} {'disk MB':>9}")
    rows = [(what, suffix) for what in CONTENTS for suffix in (".nc", ".zarr")] + [("loop of Predictive", "")]
    for what, suffix in rows:
        found = row(what, suffix, options.data, options.draws)
        times = f"{found['seconds']:7.1f} {found['cpu']:7.1f}"
        memory = f"{found['peak']:9.0f} {found['before']:7.0f} {found['disk']:9.0f}"
        print(f"{what + ' ' + suffix:28} {times} {memory}", flush=True)


if __name__ == "__main__":
    main()
