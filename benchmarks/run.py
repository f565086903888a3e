"""Every table of ``docs/comparison.md``: run the benchmarks one after the other, and keep their rows as CSV.

    python benchmarks/run.py [--short] [--only NAME ...] [--mnist DIR] [--out docs/results]

Each table is a command that can be given by itself; it is printed before it runs. The machine, the date, versions and
commands go to ``machine.csv``. With ``--short`` (minutes; into ``runs/benchmarks``) few steps are made of each: it
shows that the commands work, and its figures mean little. A benchmark whose peer or data are not here is left out,
and named: pythae wants an environment of its own, MNIST a folder with its four IDX files.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

from tables import read, show, write

HERE = Path(__file__).resolve().parent
VERSIONS = ("torch", "pyro-ppl", "pyro-hvae", "numpyro", "jax", "pythae", "arviz-stats")
STEP = "step.py --cases vae hvae2 iwae5 hvae5 --only floor pyro module hand compiled numpyro scan"
AIS = "ais.py --train 20 --betas 10 --rounds 1"
COMMANDS = {  # name: (command, command of the short mode, what it can't do without); {mnist} is the folder of --mnist
    "correctness": ("correctness.py", "correctness.py --short", None),
    "step": (STEP, "step.py --cases vae --rounds 1 --steps 10 --only floor pyro module hand", None),
    "heldout": ("heldout.py --seconds 60 --jobs 2", "heldout.py --short", "sklearn"),
    "mnist": ("heldout.py --data idx:{mnist} --seconds 300 --jobs 2", "heldout.py --data idx:{mnist} --short", "mnist"),
    "evidence": ("heldout.py --evidence --seconds 6", "heldout.py --evidence --short", "sklearn"),
    "ais": (AIS, "ais.py --train 2 --betas 5 --rounds 1 --images 16", "sklearn"),
    "pythae": ("pythae_vae.py", "pythae_vae.py --short", "pythae"),
}


def processor() -> str:
    """The name that the system gives its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine(command: str) -> dict[str, object]:
    """Where and when a table was made."""
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS if version(name) != "not installed")
    return {
        "command": f"python benchmarks/{command}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": f"{processor()}, {os.cpu_count()} cores; load at the end {os.getloadavg()[0]:.1f}",
        "versions": f"Python {platform.python_version()}, {versions}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps of each, into runs/benchmarks")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--mnist", type=Path, default=None, help="folder of MNIST's IDX files")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    out = options.out or Path("runs/benchmarks" if options.short else "docs/results")
    record = out / "machine.csv"
    rows = {row["table"]: row for row in read(record)} if record.exists() else {}
    for name in options.only:
        long, short, needed = COMMANDS[name]
        command = short if options.short else long
        if needed == "mnist":
            if options.mnist is None:
                print(f"\n{name}: left out, no folder was given by --mnist")
                continue
            command = command.format(mnist=options.mnist)
        elif needed is not None and util.find_spec(needed) is None:
            print(f"\n{name}: left out, {needed} is not installed")
            continue
        print(f"\n$ python benchmarks/{command}", flush=True)
        script, *arguments = command.split()
        subprocess.run([sys.executable, str(HERE / script), *arguments, "--csv", str(out / f"{name}.csv")], check=True)
        rows[name] = {"table": name} | machine((short if options.short else long).format(mnist="FOLDER"))
        write(record, list(rows.values()))
    print("\n" + show(list(rows.values())))


if __name__ == "__main__":
    main()
