"""One step of training, eagerly: losses, gradients, clipping, the optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hvae.arguments import check_number
from pyro_hvae.problem.isolation import RUNNING
from pyro_hvae.training.compile import CompiledStep
from pyro_hvae.training.compile.update import missing_parameters
from pyro_hvae.training.feed import Batch

__all__ = ["Autocast", "CompiledBatches", "EagerStep", "adam", "make_optimizer"]


class EagerStep:
    """An eager step: losses, gradients, clipping, the optimiser's update.

    Args:
        objective: a module whose call gives the loss of a batch.
        optimizer: over its parameters.
        clip_norm: the largest global norm of the gradients, or None.
        fabric: a Fabric for the backward pass, or None.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        fabric: Any = None,
    ) -> None:
        if clip_norm is not None:
            check_number("clip_norm", clip_norm, 0.0, ends="()")
        self.objective = objective
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.fabric = fabric
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def gradients(self, batches: Sequence[Batch]) -> Tensor:
        """Set the gradients to the mean over ``batches``; return the mean loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        total = None
        for index, (args, kwargs) in enumerate(batches):
            loss = self.objective(*args, **kwargs)
            if not loss.requires_grad:
                raise ValueError(
                    "the loss depends on no parameter that is trained, so there is nothing to train: parameters may "
                    "have requires_grad=False, and CUBO and EUBO hold those of the model"
                )
            if len(batches) > 1:
                loss = loss / len(batches)
            self._backward(loss, last=index == len(batches) - 1)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def apply(self) -> None:
        """Clip the gradients, and update the parameters."""
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        with RUNNING:
            self.optimizer.step()

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        loss = self.gradients(batches)
        self.apply()
        return loss

    def _backward(self, loss: Tensor, last: bool) -> None:
        if self.fabric is None:
            loss.backward()
        else:
            with self.fabric.no_backward_sync(self.objective, enabled=not last):
                self.fabric.backward(loss)


class CompiledBatches:
    """A compiled step, called as an eager one, with the batches of one optimiser step."""

    def __init__(self, compiled: CompiledStep) -> None:
        self.compiled = compiled

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        with RUNNING:
            if len(batches) == 1:
                ((args, kwargs),) = batches
                return self.compiled(*args, **kwargs)
            return self.compiled.apply(self.compiled.backward(batches))


class Autocast(nn.Module):
    """An objective whose programs run under autocast; parameters and optimiser keep their dtype."""

    def __init__(self, objective: nn.Module, precision: str) -> None:
        super().__init__()
        if precision != "bf16":
            raise ValueError(
                f"precision must be None or 'bf16', got {precision!r}; for others (float16 with loss scaling, float8) "
                "pass fabric=Fabric(precision=...)"
            )
        self.objective = objective
        self.device_type = next(objective.parameters()).device.type

    @property
    def bound(self) -> Any:
        return self.objective.bound

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(self.device_type, dtype=torch.bfloat16):
            return self.objective(*args, **kwargs)


def adam(parameters: Any, lr: float = 1e-3, **options: Any) -> torch.optim.Adam:
    """Return one fused Adam over all parameters, the default of ``fit``."""
    return torch.optim.Adam(parameters, lr=lr, fused=True, **options)


def make_optimizer(
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None,
    objective: nn.Module,
    lr: float | None = None,
) -> torch.optim.Optimizer:
    """Return the optimiser of every parameter of the objective that requires a gradient.

    Raises:
        TypeError: for an object that is no torch optimiser and makes none (Pyro's wrappers, for instance).
        ValueError: if an optimiser lacks some of these parameters, or can't be given the rate.
    """
    if lr is not None:
        check_number("lr", lr, 0.0, ends="()")
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if optimizer is None:
        return adam(parameters) if lr is None else adam(parameters, lr=lr)
    if lr is not None and isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"lr={lr} can't be given to an optimizer that is made already: make it with this rate")
    made: Any = optimizer
    if not isinstance(made, torch.optim.Optimizer):
        if not callable(made) or type(made).__module__.startswith("pyro.optim"):
            raise TypeError(_no_optimizer(made))
        made = _called(made, parameters, lr)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(_no_optimizer(made))
    if isinstance(made, torch.optim.LBFGS):
        raise TypeError(
            "torch.optim.LBFGS evaluates the loss several times a step, which fit() does not do: use Adam or SGD, or "
            "call LBFGS.step(closure) with objective = bound(model, guide) yourself"
        )
    lost = missing_parameters(made, objective)
    if lost:
        raise ValueError(
            f"the optimizer does not hold {len(lost)} parameter(s) of the pair, among them {lost[:4]}; pass a function "
            "of the parameters (such as functools.partial(torch.optim.Adam, lr=1e-3)) and fit() gives it all of them"
        )
    return made


def _called(make: Any, parameters: list[Any], lr: float | None) -> Any:
    if lr is None:
        return make(parameters)
    try:
        inspect.signature(make).bind(parameters, lr=lr)
    except TypeError as error:
        raise ValueError(f"lr={lr} is passed to optimizer=, which does not take it ({error}): set it there") from error
    return make(parameters, lr=lr)


def _no_optimizer(value: Any) -> str:
    return (
        f"optimizer must be a torch.optim.Optimizer, or a function from parameters to one (such as "
        f"functools.partial(torch.optim.Adam, lr=1e-3)), got {type(value).__name__}; Pyro's optimisers make one for "
        "each parameter, and belong to pyro.infer.SVI"
    )
