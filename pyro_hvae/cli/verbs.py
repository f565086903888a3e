"""Verbs of the command line: each is a function, and its arguments are flags."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hvae.bounds import IWELBO, LayerwiseELBO
from pyro_hvae.bounds.base import Objective
from pyro_hvae.cli.specs import Redrawn, absolute, full_name, load_data, make_pair, thresholded, with_frame
from pyro_hvae.diagnostics import diagnose as examine
from pyro_hvae.diagnostics import to_datatree
from pyro_hvae.problem import Problem
from pyro_hvae.problem.structure import sample_sites
from pyro_hvae.training import ConsoleLog, load
from pyro_hvae.training import fit as train
from pyro_hvae.training.feed import as_batch
from pyro_hvae.training.files import inside, write_atomically
from pyro_hvae.training.objective import accepts
from pyro_hvae.training.step import adam
from pyro_hvae.training.trust import UntrustedError

__all__ = ["demo", "diagnose", "evaluate", "fit", "sample"]

_COMMAND = "command.json"


def demo(out: str = "runs/demo", seconds: float = 40.0, seed: int = 0, progress: bool = True) -> None:
    """Train three models of handwritten digits for the same time and compare them.

    Args:
        out: folder for weights, histories, draws and pictures; an earlier demonstration there is replaced.
        seconds: of training for each model.
        seed: of weights, noise and order of the data.
        progress: show a bar.
    """
    from pyro_hvae.demo import demo as run

    run(out, seconds=seconds, seed=seed, progress=progress)


def fit(
    run_dir: str,
    data: str,
    pair: str | None = None,
    pair_args: dict[str, Any] | None = None,
    model: str | dict[str, Any] | None = None,
    guide: str | dict[str, Any] | None = None,
    bound: Objective | None = None,
    lr: float | None = None,
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = 100,
    binarize: float | str | None = None,
    held_out: str | None = None,
    seed: int = 0,
    resume: bool = False,
    checkpoint_every: int | None = None,
    log_every: int = 100,
    terms_every: int = 500,
    clip_norm: float | None = None,
    ema: float | None = None,
    compile: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
    trust: bool = False,
) -> None:
    """Train a model and a guide; write weights, history and checkpoints to a run directory.

    Args:
        run_dir: folder of the run.
        data: digits, idx:FOLDER (MNIST's format), a file .npy, .npz, .pt, .csv or .parquet (numbers, a row a datum;
            for pair table_vae any columns, with words and missing entries), or an object or function as file.py:name.
        pair: vae, hvae, ladder_vae, table_vae (of the columns of the data file), or a function that returns
            (model, guide), as package.module.function or file.py:function.
        pair_args: its arguments.
        model: the model alone, as file.py:name or class_path with init_args; with guide, instead of pair.
        guide: the guide, likewise; $model stands for the model. amortize makes one from the model and the data.
        bound: what is maximised; LayerwiseELBO by default.
        lr: learning rate, 1e-3 by default.
        optimizer: a class of torch.optim and its arguments; Adam at rate 1e-3 by default.
        epochs: passes over the data, a resumed run's first part included; this or steps.
        steps: optimiser steps, likewise.
        batch_size: data a step; null for all.
        binarize: grey values in [0, 1] to 0 and 1: a threshold, or random for a new draw at every use.
        held_out: validation data, of the same kind; digits and idx have their own.
        seed: of weights, noise and order of the data.
        resume: continue from the last checkpoint of run_dir.
        checkpoint_every: steps from checkpoint to checkpoint.
        log_every: steps from record to record.
        terms_every: steps between records that hold the terms of the bound too.
        clip_norm: largest norm of the gradient.
        ema: decay of a moving average of the parameters.
        compile: make one graph of each step.
        tensorboard: log there too.
        progress: show a bar; where standard error is no terminal, a line for each record.
        trust: call what the YAML file names, whatever it is.
    """
    torch.manual_seed(seed)
    pair = None if pair is None else full_name(pair)
    pair_args = with_frame(pair, pair_args, data)
    spec = {"pair": pair, "pair_args": pair_args, "model": model, "guide": guide}
    recipe: dict[str, Any] = {key: absolute(value) for key, value in spec.items() if value is not None}
    if guide == "amortize":
        recipe["example"] = absolute(data)
    programs = make_pair(**recipe)
    training_data, validation = _load_split(data, held_out, binarize, model=programs[0])
    bar = progress and sys.stderr.isatty()
    log = [ConsoleLog()] if progress and not bar else []
    command = {"data": absolute(data), "held_out": absolute(held_out), "binarize": binarize}
    result = train(
        *programs,
        training_data,
        bound=LayerwiseELBO() if bound is None else bound,
        optimizer=_optimizer(optimizer, lr),
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        transform=Redrawn() if binarize == "random" else None,
        validation=validation,
        seed=seed,
        resume=resume,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        terms_every=terms_every,
        clip_norm=clip_norm,
        ema=ema,
        compile=compile,
        tensorboard=tensorboard,
        progress=bar,
        run_dir=run_dir,
        factory=("pyro_hvae.cli.specs:make_pair", recipe),
        callbacks=[_Command(Path(run_dir), command), *log],
    )
    last = next((record["loss"] for record in reversed(result.history) if record.get("loss") is not None), math.nan)
    stopped = "" if result.stopped is None else f"; stopped: {result.stopped}"
    print(f"{run_dir}: {result.steps} steps, loss {last:.4f} nats a datum{stopped}")


class _Command:
    """Callback that writes what the other verbs need, when a run starts: they can use a run that was interrupted."""

    def __init__(self, run_dir: Path, command: dict[str, Any]) -> None:
        self.path, self.content = run_dir / _COMMAND, command

    def on_start(self, run: Any) -> None:
        write_atomically(self.path, (json.dumps(self.content, indent=2) + "\n").encode())


def _optimizer(optimizer: Any, lr: float | None) -> Any:
    if lr is None:
        return optimizer
    if optimizer is not None:
        raise ValueError("give the rate either by --lr, or by --optimizer.lr with --optimizer.")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be a positive number, got {lr}.")
    return partial(adam, lr=lr)


def evaluate(
    run_dir: str,
    data: str | None = None,
    num_particles: int = 1000,
    chunk_size: int = 10,
    force: bool = False,
    **selection: Any,
) -> None:
    """Report the bounds on held-out data and the terms of the layers; writes evaluation.json.

    Args:
        run_dir: a run directory that fit wrote.
        data: as in fit; by default what the run held out, or else what it was trained on.
        num_particles: draws of the importance-weighted bound.
        chunk_size: draws at once; memory grows with it.
        force: replace an earlier evaluation.json.
        **selection: which, ema, seed and trust of :func:`_load_pair`.
    """
    (path,) = _outputs(force, Path(run_dir) / "evaluation.json")
    model, guide = _load_pair(run_dir, **selection)
    args, kwargs, which_data = _recorded(run_dir, data, selection.get("trust", False), model)
    problem = Problem(model, guide)(*args, **kwargs)
    weighted = IWELBO(num_particles, chunk_size=chunk_size).terms(problem)
    terms = LayerwiseELBO(num_particles=min(num_particles, chunk_size)).terms(problem)
    rates = [term for name, term in weighted.items() if name.startswith("rate_")]
    elbo = (weighted["reconstruction"] - sum(rates)).flatten()
    many, bound = weighted["bound"].dim() > 0, weighted["bound"].flatten()
    result: dict[str, Any] = {"data": which_data, "num_data": len(bound), "num_particles": num_particles}
    result["elbo"], result["elbo_stderr"] = _mean(elbo)
    result["iwelbo"], result["iwelbo_stderr"] = _mean(bound)
    result["terms"] = {name: float(value.mean()) for name, value in terms.items()}
    unit = "nats a datum" if many else "nats"
    print(f"{which_data}: {len(bound)} data" if many else f"{which_data}: all data as one")
    print(f"ELBO               {result['elbo']:12.4f} +- {result['elbo_stderr']:.4f} {unit}")
    print(f"IWELBO, K = {num_particles:<6} {result['iwelbo']:12.4f} +- {result['iwelbo_stderr']:.4f} {unit}")
    for name, value in result["terms"].items():
        print(f"  {name:<16} {value:12.4f}")
    write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())


def sample(
    run_dir: str,
    out: str | None = None,
    size: int = 64,
    image_shape: tuple[int, int] | None = None,
    force: bool = False,
    **selection: Any,
) -> None:
    """Draw from the model, every site, into a .npz file; images also into a .png.

    A program with an argument ``size`` draws that many data. If it was trained with a context, contexts are those of
    the data, in their order and from the start again. Any other program runs on the data of the run with its
    observations drawn, and gives as many data as those.

    Args:
        run_dir: a run directory that fit wrote.
        out: the .npz file; samples.npz in the run directory by default.
        size: how many data.
        image_shape: height and width; also draws a picture of the first 100 draws, beside data of the run.
        force: replace earlier files.
        **selection: which, ema, seed and trust of :func:`_load_pair`.
    """
    import numpy as np

    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}.")
    path = Path(out) if out is not None else Path(run_dir) / "samples.npz"
    picture = path.with_suffix(".png")
    _outputs(force, path, *([picture] if image_shape is not None else []))
    model, _ = _load_pair(run_dir, **selection)
    trust = selection.get("trust", False)
    args: tuple = ()
    if accepts(model, "size"):
        program, kwargs = model, _sizes(model, run_dir, size, trust)
    else:
        args, kwargs, _ = _recorded(run_dir, None, trust, model)
        program = poutine.uncondition(model)
    with torch.no_grad():
        trace = poutine.trace(program).get_trace(*args, **kwargs)
    drawn = {site["name"]: site["value"].cpu().numpy() for site in sample_sites(trace)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:  # np.savez would add a suffix
        np.savez(file, **drawn)
    print(f"{path}: " + ", ".join(f"{name} {value.shape}" for name, value in drawn.items()))
    if image_shape is not None:
        from pyro_hvae.plots import samples

        images, data = list(drawn.values())[-1][:100], _images_of(run_dir, image_shape, trust, model)
        samples(images, image_shape, data=data, title=f"{run_dir}: {len(images)} draws").savefig(picture, dpi=150)
        print(picture)


def diagnose(
    run_dir: str,
    data: str | None = None,
    num_draws: int = 500,
    max_data: int = 100,
    force: bool = False,
    **selection: Any,
) -> None:
    """Report the reliability of the posterior; writes draws to posterior.nc and the report to report.json.

    Args:
        run_dir: a run directory that fit wrote.
        data: as in fit; by default what the run held out, or else what it was trained on.
        num_draws: draws of the guide.
        max_data: number of data, the first ones.
        force: replace earlier files.
        **selection: which, ema, seed and trust of :func:`_load_pair`.
    """
    if num_draws < 1 or max_data < 1:
        raise ValueError(f"num_draws and max_data must be at least 1, got {num_draws} and {max_data}.")
    path, written = _outputs(force, Path(run_dir) / "posterior.nc", Path(run_dir) / "report.json")
    model, guide = _load_pair(run_dir, **selection)
    args, kwargs, which_data = _recorded(run_dir, data, selection.get("trust", False), model)
    first = partial(_rows, count=max_data, total=_size(args, kwargs))
    args, kwargs = tuple(first(value) for value in args), {name: first(value) for name, value in kwargs.items()}
    tree = to_datatree(model, guide, *args, num_draws=num_draws, **kwargs)
    tree.to_netcdf(path, engine="h5netcdf")
    print(f"{which_data}: {num_draws} draws in {path}")
    report = examine(model, guide, *args, num_draws=max(num_draws, 100), **kwargs)
    write_atomically(written, report.to_json().encode())
    print(report)


def _outputs(force: bool, *paths: Path) -> tuple[Path, ...]:
    """Return the paths of outputs, which do not exist; with ``force`` earlier files are removed."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(f"{path} is a folder: name a file.")
        if path.is_symlink() or path.exists():
            if not force:
                raise FileExistsError(f"{path} exists: pass --force to replace it.")
            path.unlink()
    return paths


def _sizes(model: Any, run_dir: str, size: int, trust: bool) -> dict[str, Any]:
    """Return the keywords by which a model draws ``size`` data: a context of the run's data, if it had one."""
    if not accepts(model, "context") or not (Path(run_dir) / _COMMAND).exists():
        return {"size": size}
    try:
        args, kwargs, _ = _recorded(run_dir, None, trust, model)
    except UntrustedError:
        return {"size": size}
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    context = {**dict(zip(inspect.signature(forward).parameters, args)), **kwargs}.get("context")
    if context is None:
        return {"size": size}
    return {"context": context[torch.arange(size) % len(context)]}


def _load_pair(
    run_dir: str, which: str = "last", ema: bool = False, seed: int = 0, trust: bool = False
) -> tuple[Any, Any]:
    """Load the pair of a run, and seed its draws.

    Args:
        run_dir: a run directory that fit wrote.
        which: last, best, or the name of a checkpoint.
        ema: take the moving averages of the parameters.
        seed: of the draws.
        trust: call the functions that the run directory names, whatever they are.
    """
    torch.manual_seed(seed)
    return load(run_dir, which=which, ema=ema, trust=trust)


def _load_split(
    data: str, held_out: str | None, binarize: float | str | None, source: Any = None, model: Any = None
) -> tuple[Any, Any]:
    """Load training data and held-out data, binarised by a threshold if there is one."""
    if isinstance(binarize, str) and binarize != "random":
        raise ValueError(f"binarize is a threshold in [0, 1], or random; got {binarize!r}.")
    split = load_data(data, source=source, model=model)
    if held_out is not None:
        split = split[0], load_data(held_out, source=source, model=model)[0]
    if binarize is None or binarize == "random":
        return split
    first, second = (None if part is None else thresholded(part, float(binarize)) for part in split)
    return first, second


def _recorded(run_dir: str, data: str | None, trust: bool, model: Any) -> tuple[tuple, dict[str, Any], str]:
    """Load the arguments of the programs, from ``data`` or the data of the run; return them with their name."""
    path = inside(Path(run_dir), Path(run_dir) / _COMMAND)
    try:
        command = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}).") from error
    if not isinstance(command, dict) or not isinstance(command.get("binarize"), (str, float, int, type(None))):
        raise ValueError(f"{path} was not written by `pyro-hvae fit`.")
    if data is None and "data" not in command:
        raise ValueError(f"{run_dir} was not written by `pyro-hvae fit` and names no data: give --data.")
    name = command["data"] if data is None else data
    held_out = command.get("held_out") if data is None else None
    source = path if data is None and not trust else None
    training_data, validation = _load_split(name, held_out, command.get("binarize"), source, model)
    label = f"{name}, held out" if validation is not None else name
    args, kwargs = as_batch(training_data if validation is None else validation)
    if command.get("binarize") == "random":
        args, kwargs = as_batch(Redrawn()(*args, **kwargs))
    return args, kwargs, label


def _images_of(run_dir: str, shape: tuple[int, int], trust: bool, model: Any) -> Tensor | None:
    """Return the images that a run names as its data, or None where they can't be read or have another shape."""
    try:
        args, kwargs, _ = _recorded(run_dir, None, trust, model)
    except (OSError, ValueError):
        return None
    x = args[0] if args else kwargs.get("x")
    return x if isinstance(x, Tensor) and x.dim() > 1 and x[0].numel() == shape[0] * shape[1] else None


def _size(args: tuple, kwargs: dict[str, Any]) -> int:
    return next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), 0)


def _rows(value: Any, *, count: int, total: int) -> Any:
    return value[:count] if isinstance(value, Tensor) and value.dim() and len(value) == total else value


def _mean(values: Tensor) -> tuple[float, float]:
    """Return the mean and its standard error over the data; the error is 0 for one value."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
