r"""A pair as a module of Lightning, for its ``Trainer``: loggers, callbacks, many machines, sharded parameters.

The module minimises what :func:`~pyro_hvae.training.fit` minimises: the objective's loss divided by the number of data
(nats a datum).  From the same seed and the same batches both make the same steps.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.bounds.base import Objective
from pyro_hvae.problem.isolation import RUNNING
from pyro_hvae.training.arguments import arguments_differ, check_batch, check_bound, dtypes_differ
from pyro_hvae.training.batches import require_scale
from pyro_hvae.training.checkpoint import generators, restore_generators
from pyro_hvae.training.distributed import seed_rank
from pyro_hvae.training.evaluate import evaluate_batch, evaluating
from pyro_hvae.training.feed import Batch, Feed, IterableFeed, as_batch, rows_of
from pyro_hvae.training.nonfinite import NonFiniteError, non_finite_sites
from pyro_hvae.training.objective import PairObjective
from pyro_hvae.training.rebuild import factory_record
from pyro_hvae.training.step import make_optimizer

__all__ = ["PairModule"]

INSTALL = "PairModule needs Lightning: pip install 'pyro-hvae[distributed]'"


def _base() -> Any:
    """Return Lightning's module class, of the package that is imported already if there is one; None without one."""
    packages = ["lightning.pytorch", "pytorch_lightning"]
    if "lightning.pytorch" not in sys.modules and "pytorch_lightning" in sys.modules:
        packages.reverse()
    for package in packages:
        try:
            return importlib.import_module(package).LightningModule
        except ImportError:
            continue
    return None


class _Missing:
    """Takes the place of Lightning's class where it is not installed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ImportError(INSTALL)


class PairModule(_base() or _Missing):  # type: ignore[misc]
    """Model, guide and objective as a ``LightningModule``.

    Records ``loss`` at each step, and in validation ``validation_loss`` with ``validation_<term>``, under the same
    noise each time (for ``trainer.test``: ``test_loss``, ``test_<term>``), all in nats a datum: names for
    ``ModelCheckpoint(monitor="validation_loss")``, early stopping and loggers.  A checkpoint of the ``Trainer`` holds
    the parameters of both programs, those in Pyro's parameter store included, the buffers of the objective (the step
    of a warm-up) and the state of the generators.  On one process, a run that is resumed at the end of an epoch makes
    the same steps as one without interruption; on several, the noise after a resume is another.

    Lightning draws from torch's generator when a ``DataLoader`` starts an epoch, and ``fit`` does not: for the steps
    of ``fit``, give the loader a generator of its own, or pass :class:`pyro_hvae.data.Batches`.

    Args:
        model, guide: Pyro programs, called with each batch: a tensor (B, ...), a tuple of tensors (positional
            arguments) or a mapping (keyword arguments).
        objective: a bound or objective of this library, or an ELBO of Pyro with a ``differentiable_loss``.
        example: one batch, for programs that make their parameters at the first call (AutoGuides).  Without it the
            first batch of the Trainer's data is taken; ``load_from_checkpoint`` needs it, and so do such programs
            under a launcher that spawns processes (``ddp_spawn``).
        data_size: N, passed to a model that takes it; by default the size of the Trainer's data set.
        optimizer: a function from parameters to a torch optimiser, or to a mapping for Lightning's
            ``configure_optimizers`` (``{"optimizer": ..., "lr_scheduler": ...}``); one fused Adam with rate 1e-3 by
            default.

    Attributes:
        model, guide: the programs.
        pair: the loss as a module, None before the first batch is known.

    Raises:
        ImportError: where Lightning is not installed.
        TypeError: for an objective without a loss; for a batch that the programs do not take.
        ValueError: for programs that do not fit each other; for batches that are smaller than the data, and a latent
            outside of their plate that is not scaled to N; for observations that the likelihood can't take; under
            ``torch.compile``, which can't trace Pyro's handlers.
        NonFiniteError: when the loss becomes NaN or infinite; looked for every ``log_every_n_steps`` steps.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> import pyro_hvae as ph
        >>> from pyro_hvae.data import Batches
        >>> _ = torch.manual_seed(0)
        >>> module = PairModule(*ph.vae(6, 2, hidden=(8,)), ph.TraceELBO())
        >>> x = torch.rand(64, 6).round()
        >>> trainer = Trainer(max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        ...                   enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module, Batches(x, batch_size=16), Batches(x[:32], batch_size=16, shuffle=False))
        >>> trainer.global_step, sorted(trainer.callback_metrics)[:2]
        (8, ['loss', 'validation_loss'])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        objective: Any,
        *,
        example: Any = None,
        data_size: int | None = None,
        optimizer: Any = None,
    ) -> None:
        super().__init__()
        check_bound(objective)
        if isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__} that is made already; it must be made of the parameters on "
                "their device: pass a function, as functools.partial(torch.optim.Adam, lr=1e-3)"
            )
        self._parts = (objective, model, guide)  # registered as children of the pair
        self._data_size, self._make_optimizer = data_size, optimizer
        self.pair: PairObjective | None = None
        self.save_hyperparameters(
            {"bound": repr(objective), "data_size": data_size, "factory": factory_record(None, model, guide)}
        )
        self._noise: Any = None
        self._restored: dict[str, Any] | None = None
        self._sum: Tensor | None = None
        self._checked = 0
        if isinstance(objective, Objective):
            objective.restart()
        if example is not None:
            self._build(as_batch(example), data_size)

    @property
    def model(self) -> Any:
        return self._parts[1]

    @property
    def guide(self) -> Any:
        return self._parts[2]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch, 0-dim, in nats a datum."""
        if self.pair is None:
            raise ValueError("the pair has seen no batch: pass PairModule(..., example=batch), or train it first")
        return self.pair(*args, **kwargs)

    def _build(self, example: Batch, data_size: int | None) -> None:
        objective, model, guide = self._parts
        check_batch(example)
        try:
            self.pair = PairObjective(objective, model, guide, *example, data_size)
        except (RuntimeError, ValueError, TypeError) as error:
            if what := arguments_differ(model, guide, example) or dtypes_differ(model, guide, example):
                raise TypeError(what) from error
            raise

    # -- Lightning's hooks

    def setup(self, stage: str) -> None:
        """Build the pair where no example was given; check the scale of the batches."""
        if getattr(self, "_compiler_ctx", None) is not None:
            raise ValueError(
                "torch.compile(module) can't trace Pyro's handlers: pass the module itself to the Trainer, or use "
                "fit(compile=True), which compiles the step"
            )
        if self.pair is not None and stage != "fit":
            return
        feed = self._feed(stage)
        example = feed.example()
        size = feed.data_size if self._data_size is None else self._data_size
        self._build(example, size)
        if stage == "fit":
            assert self.pair is not None
            require_scale(self.pair, example, feed, size)

    def _feed(self, stage: str) -> Feed:
        """Return the Trainer's data, before it adds samplers; it has not asked for them yet."""
        loops = {
            "fit": "fit_loop",
            "validate": "validate_loop",
            "test": "test_loop",
            "predict": "predict_loop",
        }
        source = getattr(getattr(self.trainer, loops[stage]), "_data_source", None)
        if source is None:
            raise ValueError("this version of Lightning does not show its data: pass PairModule(..., example=batch)")
        loader = source.dataloader()
        if isinstance(loader, (list, tuple)) and loader and all(isinstance(part, Iterable) for part in loader):
            loader = loader[0]
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws when it is asked for an iterator
            feed = IterableFeed(loader)
        if feed.once:
            raise ValueError(
                "the data is a one-shot iterator, and its first batch would be lost: pass an object that can be "
                "iterated again, such as a DataLoader"
            )
        return feed

    def configure_optimizers(self) -> Any:
        """Return one optimiser of every parameter of the pair, and its schedule if there is one."""
        assert self.pair is not None
        if self._make_optimizer is None:
            return make_optimizer(None, self.pair)
        made = self._make_optimizer([p for p in self.pair.parameters() if p.requires_grad])
        inside = made.get("optimizer") if isinstance(made, dict) else made
        make_optimizer(inside, self.pair)  # refuses what is no optimiser of all parameters
        return made

    def on_fit_start(self) -> None:
        """Restore the generators of a checkpoint; seed several processes differently."""
        self._sum, self._checked = None, self.global_step
        if self.trainer.world_size > 1:
            seed_rank(torch.initial_seed(), self.global_rank, self._step_restored())
        elif self._restored is not None and self._restored["world_size"] == 1:
            restore_generators(self._restored["generators"])
        self._restored = None

    def _step_restored(self) -> int:
        return 0 if self._restored is None else int(self._restored["step"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch in nats a datum, and record it."""
        args, kwargs = as_batch(batch)
        loss = self(*args, **kwargs)
        found = loss.detach()
        self._sum = found if self._sum is None else self._sum + found
        self.log("loss", found, batch_size=rows_of(args, kwargs))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make a step, and count it in the objective."""
        super().optimizer_step(*args, **kwargs)
        assert self.pair is not None
        with RUNNING:
            self.pair.advance()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop where the loss is NaN or infinite."""
        every = self.trainer.log_every_n_steps or 50
        if self._sum is None or self.global_step < self._checked + every:
            return
        bad = not math.isfinite(float(self._sum))
        if self.trainer.strategy.reduce_boolean_decision(bad, all=False):
            assert self.pair is not None
            args, kwargs = as_batch(batch)
            sites = non_finite_sites(self.pair, args, kwargs)
            raise NonFiniteError(
                f"the loss became NaN or infinite between steps {self._checked + 1} and {self.global_step}; not finite "
                f"now: {'; '.join(sites[:6]) or 'no site of the last batch'}. Go on from an earlier checkpoint, with a "
                "smaller rate or Trainer(gradient_clip_val=...)",
                None,
                sites,
            )
        self._sum, self._checked = None, self.global_step

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Record loss and terms of a batch of held-out data."""
        self._evaluate("validation", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Record loss and terms of a batch of test data."""
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    def _evaluate(self, which: str, batch: Any, index: int, loader: int) -> None:
        assert self.pair is not None
        loaders = self.trainer.val_dataloaders if which == "validation" else self.trainer.test_dataloaders
        # The Trainer evaluates in inference mode, where no graph of dependencies can be recorded.
        seed = None if index else self.global_rank
        with torch.inference_mode(False), evaluating(self.pair, seed=seed):
            args, kwargs = _usable(as_batch(batch))
            if index:
                restore_generators(self._noise)
            size = _size(loaders, loader)
            if self.pair.data_size is not None and size is not None:
                kwargs = {**kwargs, "data_size": size}
            loss, terms = evaluate_batch(self.pair, args, kwargs)
            self._noise = generators()
        values = {f"{which}_{name}": value for name, value in {"loss": loss, **terms}.items()}
        self.log_dict(values, batch_size=rows_of(args, kwargs), sync_dist=self.trainer.world_size > 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of this process's generators."""
        checkpoint["pyro_hvae"] = {
            "generators": generators(),
            "step": self.global_step,
            "world_size": self.trainer.world_size,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the generators until training starts."""
        if self.pair is None:
            raise ValueError(
                "the pair has seen no batch, so that it may lack parameters of the checkpoint: pass "
                "load_from_checkpoint(path, model=..., guide=..., objective=..., example=batch)"
            )
        self._restored = checkpoint.get("pyro_hvae")


def _usable(batch: Batch) -> Batch:
    """Copy tensors that were made in inference mode, which autograd refuses."""
    args, kwargs = batch
    return tuple(map(_normal, args)), {name: _normal(value) for name, value in kwargs.items()}


def _normal(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _size(loaders: Any, index: int) -> int | None:
    """Return the number of data of a loader, None if unknown."""
    loader = loaders[index] if isinstance(loaders, (list, tuple)) else loaders
    return IterableFeed(loader).data_size if isinstance(loader, Iterable) else None
