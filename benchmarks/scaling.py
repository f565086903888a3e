"""What each verb costs as data and draws grow: processor time and memory, each point in a process of its own.

    python benchmarks/scaling.py [--verbs NAME ...] [--data 100 1000 10000 100000] [--draws 100 1000 10000]
                                 [--short] [--out docs/results] [--figures docs/figures]

A variational auto-encoder of 16 binary pixels and two latents, untrained; one thread.  Data grow at 100 draws, draws
grow at 100 data, and the last point of each verb is 10^5 data with 1000 draws.  ``anneal`` has one chain of five
temperatures in the place of a hundred draws, and not the last point.  ``to_datatree`` writes its default groups to disk
where data times draws are above 10^6.  The memory is the peak of resident memory over what the process had when it had
made the pair, the data and one small call.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import show, write

Call = Callable[[Any, Any, Any, int, Path], object]
CORNER = 100_000, 1000


def log_evidence(model: Any, guide: Any, x: Any, draws: int, _: Path) -> object:
    import pyro_hvae as ph

    return ph.log_evidence(model, guide, x, num_samples=draws)


def anneal(model: Any, guide: Any, x: Any, draws: int, _: Path) -> object:
    from pyro_hvae.evidence import anneal

    return anneal(model, guide, x, num_chains=max(1, draws // 100), betas=5, num_leapfrog=3)


def to_datatree(model: Any, guide: Any, x: Any, draws: int, scratch: Path) -> object:
    import pyro_hvae as ph

    path = scratch / "tree.nc" if len(x) * draws > 10**6 else None
    return ph.to_datatree(model, guide, x, num_draws=draws, path=path)


def khats(model: Any, guide: Any, x: Any, draws: int, _: Path) -> object:
    from pyro_hvae.diagnostics import khats

    return khats(model, guide, x, num_draws=draws)


def diagnose(model: Any, guide: Any, x: Any, draws: int, _: Path) -> object:
    import pyro_hvae as ph

    return ph.diagnose(model, guide, x, num_draws=draws)


def calibrate(model: Any, guide: Any, x: Any, draws: int, _: Path) -> object:
    from pyro_hvae.diagnostics import calibrate

    return calibrate(model, guide, x, num_draws=draws)


VERBS: dict[str, Call] = {
    "log_evidence": log_evidence, "anneal": anneal, "to_datatree": to_datatree, "khats": khats,
    "diagnose": diagnose, "calibrate": calibrate,
}  # fmt: skip


def resident() -> float:
    """Largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(verb: str, data: int, draws: int) -> dict[str, float]:
    """One point, in this process."""
    import torch

    import pyro_hvae as ph

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, guide = ph.vae(16, 2, hidden=(16,))
    x = torch.bernoulli(torch.full((data, 16), 0.3))
    with tempfile.TemporaryDirectory() as scratch:
        VERBS[verb](model, guide, x[:50], 100, Path(scratch))
        before, start = resident(), time.process_time()
        VERBS[verb](model, guide, x, draws, Path(scratch))
        seconds = time.process_time() - start
    return {"seconds": seconds, "megabytes": resident() - before, "before": before}


def point(verb: str, data: int, draws: int) -> dict[str, Any]:
    """One point, in a process of its own."""
    call = [sys.executable, __file__, "--point", verb, str(data), str(draws)]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{verb} of {data} data and {draws} draws: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "verb": verb, "data": data, "draws": draws, "seconds": f"{found['seconds']:.2f}",
        "MB": f"{found['megabytes']:.0f}", "MB before": f"{found['before']:.0f}",
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (grows, fixed, where) in enumerate((("data", "draws", 100), ("draws", "data", 100))):
        for verb in dict.fromkeys(row["verb"] for row in rows):
            own = sorted((r for r in rows if r["verb"] == verb and r[fixed] == where), key=lambda r: r[grows])
            for line, unit in enumerate(("seconds", "MB")):
                values = [max(float(r[unit]), 0.01 if unit == "seconds" else 1.0) for r in own]
                axes[line][column].loglog([r[grows] for r in own], values, "o-", label=verb, markersize=4)
        sizes = sorted({r[grows] for r in rows if r[fixed] == where})
        for line, at_last in enumerate((3.0, 300.0)):
            linear = [at_last * size / sizes[-1] for size in sizes]
            axes[line][column].loglog(sizes, linear, ":", color="0.5", label="linear")
        axes[1][column].set_xlabel(f"{grows}, with {where} {fixed}")
    axes[0][0].set_ylabel("processor seconds")
    axes[1][0].set_ylabel("memory above the start, MB")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle("Cost of a call as data and draws grow")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the exponent of the time from the last two sizes of each verb, in data and in draws."""
    found = {}
    for verb in dict.fromkeys(row["verb"] for row in rows):
        for grows, fixed in (("data", "draws"), ("draws", "data")):
            own = sorted((r for r in rows if r["verb"] == verb and r[fixed] == 100), key=lambda r: r[grows])
            if len(own) > 1:
                ratio = float(own[-1]["seconds"]) / max(float(own[-2]["seconds"]), 0.01)
                found[f"{verb}, {grows}"] = math.log(ratio) / math.log(own[-1][grows] / own[-2][grows])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbs", nargs="+", choices=list(VERBS), default=list(VERBS))
    parser.add_argument("--data", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--draws", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--short", action="store_true", help="small sizes, without the last point")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        verb, data, draws = options.point
        print(json.dumps(measure(verb, int(data), int(draws))))
        return
    if options.short:
        options.data, options.draws = [100, 1000], [100, 1000]
    rows = []
    for verb in options.verbs:
        places = dict.fromkeys([(n, 100) for n in options.data] + [(100, n) for n in options.draws])
        for data, draws in [*places, *([] if options.short or verb == "anneal" else [CORNER])]:
            rows.append(point(verb, data, draws))
            print("  ".join(str(value) for value in rows[-1].values()), flush=True)
            write(options.out / "scaling.csv", rows)
    draw(rows, options.figures / "scaling.png")
    print("\n" + show(rows) + "\n\nexponents of the time:")
    for name, slope in slopes(rows).items():
        print(f"  {name}: {slope:.2f}")


if __name__ == "__main__":
    main()
