r"""Train a pair of Pyro programs: :func:`fit`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyro_hvae.arguments import check_count
from pyro_hvae.bounds.base import Objective
from pyro_hvae.notebook import html_table
from pyro_hvae.problem.reading import read_data
from pyro_hvae.training import checkpoint
from pyro_hvae.training.arguments import (
    arguments_differ,
    check_batch,
    check_bound,
    check_counts,
    check_data_size,
    check_functions,
    check_switches,
    dtypes_differ,
)
from pyro_hvae.training.averages import Averages
from pyro_hvae.training.batches import check_data, require_scale
from pyro_hvae.training.callbacks import ProgressBar, TensorBoard
from pyro_hvae.training.compile import CompiledStep
from pyro_hvae.training.directory import RunDirectory
from pyro_hvae.training.distributed import Ranks, seed_rank
from pyro_hvae.training.feed import Batch, Feed, NoFeed, as_batch, feed
from pyro_hvae.training.files import as_directory
from pyro_hvae.training.history import History, shown
from pyro_hvae.training.loop import Run
from pyro_hvae.training.objective import PairObjective
from pyro_hvae.training.plan import Data, Records, Steps
from pyro_hvae.training.prepare import Move, held_out, move_programs
from pyro_hvae.training.rebuild import factory_record
from pyro_hvae.training.settings import describe, describe_feed, describe_optimizer, describe_schedule
from pyro_hvae.training.step import Autocast, CompiledBatches, EagerStep, make_optimizer

__all__ = ["Result", "fit", "fit_restarts"]


@dataclass(frozen=True, repr=False)
class Result:
    """Result of :func:`fit`.  It prints the numbers of the run, not the programs.

    Attributes:
        model, guide: the trained programs.
        history: see :class:`~pyro_hvae.training.History`.
        steps: optimiser steps made in all, those before a resume included.
        stopped: the reason of an early end (a callback's reason, ``"SIGINT"``), or None.
        averages: the moving averages of the parameters, or None; ``with result.averages.applied(): ...`` uses them.
        run_dir: folder of the run, or None.
    """

    model: Any
    guide: Any
    history: History
    steps: int
    stopped: str | None
    averages: Averages | None
    run_dir: Path | None

    def __str__(self) -> str:
        return "\n".join(["fit", *(f"  {name}: {value}" for name, value in self._facts().items())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table("Fit", self._facts())

    def _facts(self) -> dict[str, str]:
        facts = {"steps": str(self.steps)}
        for key, name in (("loss", "last loss"), ("validation_loss", "last held-out loss")):
            recorded = [(record["step"], record[key]) for record in self.history if record.get(key) is not None]
            if recorded:
                facts[name] = f"{shown(recorded[-1][1])} nats a datum, at step {recorded[-1][0]}"
        facts["stopped early"] = self.stopped or "no"
        if self.run_dir is not None:
            facts["folder"] = str(self.run_dir)
        return facts


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    bound: Any,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    lr: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = 100,
    data_size: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    transform: Callable[..., Any] | None = None,
    seed: int | None = None,
    validation: Any = None,
    validate_every: int | None = None,
    restore_best: bool = False,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    precision: str | None = None,
    device: torch.device | str | None = None,
    compile: bool | Mapping[str, Any] = False,
    run_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    resume: bool | str = False,
    factory: Any = None,
    log_every: int = 100,
    terms_every: int = 500,
    check_every: int | None = 100,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    tensorboard: bool = False,
    fabric: Any = None,
) -> Result:
    r"""Train model and guide together.

    Minimises the loss of ``bound`` divided by the number of data (nats a datum, where a datum is a row of ``data``; the
    minimum is the same, and learning rates do not depend on N) by one optimiser over every parameter of both programs,
    those in Pyro's parameter store included.  Observations are checked before the first step (NaN, support): on all of
    the data where these are tensors in memory which a site observes unchanged, else on the first batch.  The state of
    an objective (the step of a warm-up) is reset, unless a run is resumed.  Other threads may evaluate the programs
    meanwhile, or fit others; two fits of the same programs at once are not supported.

    Args:
        model, guide: Pyro programs, called with each batch.  A model with latents of the whole data set (outside of
            the plate of a batch) must scale a batch to N data: let it take ``data_size``, or pass ``batch_size=None``.
        data: a tensor or array (N, ...), a tuple of them (the programs' positional arguments), a mapping (their
            keyword arguments), a ``Dataset``, a ``DataLoader``, or any iterable of batches; a DataFrame for a pair
            that reads tables (:func:`~pyro_hvae.models.table_vae`).  ``()`` for programs without arguments, which hold
            their data: an epoch is then one step.
        bound: a bound or objective of this library, or an ELBO of Pyro with a ``differentiable_loss``.
        optimizer: a function from parameters to a torch optimiser, or such an optimiser; one fused Adam with
            rate 1e-3 by default.
        lr: learning rate, of the default optimiser or of a function that takes ``lr``.
        epochs, steps: length of training, a resumed run's first part included; pass one of them.
        batch_size: rows a batch, over all processes; None for all data at once, in their order.
        data_size: N, if it is not the number of rows of ``data``.  It is passed to a model that takes the keyword, and
            to a guide that takes it or any keyword (AutoGuides do).
        shuffle: a new order each epoch, where there are batches.
        drop_last: leave out a smaller last batch.
        transform: of each batch, when it is used: random binarisation, scaling.  Called with the batch's tensors
            (keywords for a mapping), returns a batch.
        seed: of the order of the data; drawn from torch's generator by default.  The noise of the programs comes
            from torch's generator: call ``torch.manual_seed`` before building the programs.
        validation: held-out data, like ``data``, or the fraction of ``data`` that is held out (0.2: rows at random, or
            the last rows if there is no shuffling); minus the bound on it is recorded as ``validation_loss`` (for CUBO
            and EUBO the estimate: smaller is better for each), always under the same noise, and on the averages if
            there are any.
        validate_every: steps between validations; by default an epoch, or once at the end of a shorter run.
        restore_best: leave the programs with the weights (or averages) of the best validation; checkpoints keep the
            last ones.
        schedule: a function from the optimiser to a scheduler of ``torch.optim.lr_scheduler``, stepped once a step
            (``ReduceLROnPlateau``: once a validation).
        clip_norm: largest global norm of the gradients.
        accumulate: batches whose gradients are averaged for one step.
        ema: decay of a moving average of the parameters.
        device: where to train; programs that are modules are moved there. Batches are moved to the device and, after
            one warning, to the dtype of the parameters.
        precision: ``"bf16"`` runs the programs under autocast.
        compile: True compiles the step into one graph (see :func:`pyro_hvae.compile_step`); a mapping gives its
            options.
        run_dir: directory for config, history and checkpoints.
        checkpoint_every: steps between checkpoints; by default after an epoch, if 1000 steps passed, and at the end.
        keep: number of checkpoints that are kept, besides the best.
        resume: continue from the last whole checkpoint of ``run_dir``, bit for bit, if there is one.  What shapes the
            result (data, bound, optimiser, schedule, seed, ...) is compared with what the run was started with;
            ``"anyway"`` warns of differences, and goes on with the settings of this call.
        factory: how to build the programs again for :func:`load`: ``("package.module:function", arguments)``, with
            the function returning (model, guide).  Programs of :mod:`pyro_hvae.models` have it.
        log_every: steps between records of loss and rate.
        terms_every: steps between records that also hold the bound's terms, which cost one more run of the programs.
        check_every: steps between checks for NaN and infinities; None for no checks.
        callbacks: see :class:`~pyro_hvae.training.Callback`.
        progress: show a bar.
        tensorboard: log there too, under ``run_dir/tensorboard``.
        fabric: a ``lightning_fabric.Fabric`` for many devices or machines, launched.

    Returns:
        A :class:`Result`; the programs are changed in place, and left in training mode.  SIGINT ends training after
        the present step, saves, and returns; SIGTERM saves and raises ``SystemExit``.  A signal to one of several
        processes ends all of them after the same step.

    Raises:
        ValueError: for arguments or programs that do not fit each other; for batches that are smaller than the data
            and a latent outside of their plate that is not scaled to N; for observations that the likelihood can't
            take.
        FileExistsError: if ``run_dir`` holds a run and ``resume`` is False.
        RuntimeError: if another run is training in ``run_dir``.
        LostProcessError: if another process of the run has failed, has ended, or does not answer; the last step is
            saved.
        CheckpointError: if no checkpoint to resume from is whole, or it is of another architecture, or the run was
            started with other settings; nothing is changed then.
        NonFiniteError: when the loss becomes NaN or infinite: with step and sites; the parameters are restored to
            the last good state.
        OSError: if a checkpoint cannot be written; the last one is kept.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_hvae.bounds import TraceELBO
        >>> _ = torch.manual_seed(0)
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> x = 3.0 + torch.randn(50)
        >>> result = fit(model, AutoNormal(model), x, bound=TraceELBO(), steps=300, batch_size=None, progress=False,
        ...              optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05))
        >>> abs(float(result.guide.median()["mean"]) - float(x.mean())) < 0.2
        True
    """
    check_bound(bound)
    check_counts(
        epochs=epochs, steps=steps, seed=seed, batch_size=batch_size, data_size=data_size, accumulate=accumulate,
        keep=keep, log_every=log_every, terms_every=terms_every, check_every=check_every,
        validate_every=validate_every, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    check_switches(
        compile, shuffle=shuffle, drop_last=drop_last, resume=resume == "anyway" or resume, progress=progress,
        tensorboard=tensorboard, restore_best=restore_best,
    )  # fmt: skip
    check_functions(transform, callbacks)
    ranks = Ranks(fabric)
    directory = None if run_dir is None else as_directory(run_dir)
    if tensorboard and directory is None:
        raise ValueError("tensorboard=True writes under run_dir: pass run_dir")
    settings: dict[str, Any] = {"bound": describe(bound)}  # its first use may set attributes
    with ranks, RunDirectory(directory, resume, ranks) as place:
        if seed is None:
            seed = _seed(place)
        data, validation = read_data(model, data), read_data(model, validation)
        whole = feed(data, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed)
        whole, rest = held_out(whole, validation, batch_size)
        if restore_best and rest is None:
            raise ValueError("restore_best=True takes the weights of the best validation: pass validation=")
        batches = whole if ranks.world_size == 1 else whole.shard(ranks.rank, ranks.world_size)
        move_programs(ranks.device(device), model, guide)
        change = Move(_transform(transform), model, guide)
        unchanged = transform is None

        check_data_size(data_size, whole)
        example = _example(batches, change)
        if not isinstance(whole, NoFeed):
            check_batch(example)
        size = data_size if data_size is not None else whole.data_size
        try:
            objective = PairObjective(bound, model, guide, *example, size)
        except (RuntimeError, ValueError, TypeError) as error:
            if what := arguments_differ(model, guide, example) or dtypes_differ(model, guide, example):
                raise TypeError(what) from error
            raise
        require_scale(objective, example, batches, size)
        check_data(objective, example, whole, None if unchanged and not change.moves else change)
        if place.source is None and isinstance(bound, Objective):
            bound.restart()
        objective.train()
        own_optimizer = make_optimizer(optimizer, objective, lr)
        settings["optimizer"] = describe_optimizer(own_optimizer)
        cast = objective if precision is None else Autocast(objective, precision)
        wrapped, stepped = ranks.setup(cast, own_optimizer)
        if ranks.world_size > 1 and place.source is None:
            seed_rank(seed, ranks.rank)
        eager = EagerStep(wrapped, stepped, clip_norm=clip_norm, fabric=fabric)
        step: Any = eager
        if compile is not False:
            if fabric is not None:
                raise ValueError(
                    "compile= and fabric= can't be used together: the gradients of a compiled step are not synced"
                )
            options = dict(compile) if isinstance(compile, Mapping) else {}
            step = CompiledBatches(CompiledStep(cast, own_optimizer, clip_norm=clip_norm, **options))
        averages = None if ema is None else Averages(objective, ema)
        own_schedule = None if schedule is None else _schedule(schedule, own_optimizer)
        if directory is not None:
            settings |= {
                "schedule": describe_schedule(own_schedule), "data": describe_feed(whole), "data_size": size,
                "batch_size": getattr(whole, "batch_size", batch_size), "shuffle": shuffle, "drop_last": drop_last,
                "transform": describe(transform), "seed": seed, "validation": describe_feed(rest),
                "validate_every": validate_every, "clip_norm": clip_norm, "accumulate": accumulate, "ema": ema,
                "precision": precision, "compile": describe(compile),
            }  # fmt: skip
            place.compare(settings)

        own_callbacks = list(callbacks)
        if tensorboard and ranks.first:
            own_callbacks.append(TensorBoard(directory / "tensorboard"))  # type: ignore[operator]
        if progress and ranks.first:
            total = steps
            if epochs is not None and whole.batches is not None:
                total = epochs * -(-whole.batches // accumulate)
            own_callbacks.append(ProgressBar(total))

        run = Run(
            objective,
            Data(batches, change, seed, accumulate, rest, validate_every),
            Steps(step, eager, own_optimizer, own_schedule, averages, check_every),
            Records(place.history(), directory, checkpoint_every, keep, log_every, terms_every, place.run),
            own_callbacks,
            ranks,
        )
        run.keeps_best = restore_best
        if place.source is not None:
            run.restore(place.source, place.changed)
            place.set_damaged_aside()
        config = {
            "factory": factory_record(factory, model, guide), "bound": repr(bound),
            "optimizer": type(own_optimizer).__name__, "batch_size": batch_size, "data_size": size, "seed": seed,
            "ema": ema, "store": objective.store_records,
        }  # fmt: skip
        place.begin(config, settings)
        run.train(steps, epochs)
        if restore_best:
            run.restore_best()
        return Result(model, guide, run.history, run.step, run.stopped, averages, directory)


def fit_restarts(
    build: Callable[[], tuple[Any, Any]], data: Any, *, restarts: int, seed: int = 0, **options: Any
) -> list[Result]:
    """Train several independently initialised pairs, one after another, as chains for R-hat.

    Args:
        build: makes a fresh (model, guide); torch's generator is seeded before each call.
        data: as for :func:`fit`.
        restarts: number of pairs, at least 1.
        seed: run r is seeded with ``seed + r``.
        options: of :func:`fit`; ``run_dir`` becomes ``run_dir/restart-<r>``.

    Returns:
        The results, in order.  The generators are restored afterwards.
    """
    check_count("restarts", restarts)
    check_count("seed", seed, 0)
    run_dir = options.pop("run_dir", None)
    results = []
    for number in range(restarts):
        with torch.random.fork_rng():
            torch.manual_seed(seed + number)
            model, guide = build()
            where = None if run_dir is None else Path(run_dir) / f"restart-{number}"
            results.append(fit(model, guide, data, run_dir=where, **options))
    return results


def _schedule(schedule: Callable[..., Any], optimizer: torch.optim.Optimizer) -> Any:
    made = schedule(optimizer) if callable(schedule) else schedule
    if not (hasattr(made, "step") and hasattr(made, "state_dict")):
        raise TypeError(
            "schedule must be a function from the optimiser to a scheduler of torch.optim.lr_scheduler, got "
            f"{schedule!r}, which gives {type(made).__name__}"
        )
    return made


def _seed(place: RunDirectory) -> int:
    """Return the seed of the run that is continued, or a new one."""
    if place.source is not None:
        return int(checkpoint.read_state(place.source)["seed"])
    return int(torch.randint(2**31, ()))


def _transform(transform: Callable[..., Any] | None) -> Callable[[tuple, dict[str, Any]], Batch]:
    if transform is None:
        return lambda args, kwargs: (args, kwargs)

    def change(args: tuple, kwargs: dict[str, Any]) -> Batch:
        batch = transform(*args, **kwargs)
        if batch is None:
            raise TypeError("transform= returned None: it takes a batch's tensors and must return the changed batch")
        return as_batch(batch)

    return change


def _example(whole: Feed, change: Callable[[tuple, dict[str, Any]], Batch]) -> Batch:
    args, kwargs = whole.example()
    with torch.random.fork_rng():
        return change(args, kwargs)
