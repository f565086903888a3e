"""Apply gradients: torch's fused Adam on a list of gradients, and clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FusedAdam", "clip", "is_adam", "missing_parameters"]


def missing_parameters(optimizer: torch.optim.Optimizer, objective: nn.Module) -> list[str]:
    """Return the names of the objective's trainable parameters that an optimiser does not hold."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in objective.named_parameters() if p.requires_grad and id(p) not in held]


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimiser is torch's Adam or AdamW itself, not a subclass."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)


@dataclass
class _Part:
    """Parameters of one group, device and dtype, for one call of the kernel."""

    group: dict[str, Any]
    kernel: Callable[..., Any]
    places: list[int]
    parameters: list[Tensor]
    states: list[dict[str, Any]]
    counts: Tensor = field(default_factory=lambda: torch.zeros(0))  # the step counts of all parameters
    one: Tensor = field(default_factory=lambda: torch.ones(()))  # a tensor, since a number would be converted
    views: list[Tensor] = field(default_factory=list)  # the elements of counts, which are the optimiser's step counts


class FusedAdam:
    """Update parameters by gradients with torch's fused Adam.

    The moments and step counts are those of the optimiser, and every hyper-parameter is read at each call, so eager
    steps, ``state_dict()``, ``load_state_dict()`` and schedulers of any hyper-parameter work as usual.
    Calling the kernel directly saves most of the Python code of ``optimizer.step()``.  The step counts of all
    parameters become elements of one tensor, so that one addition advances them all.

    Args:
        optimizer: Adam or AdamW of torch.
        parameters: those that the gradients belong to.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = list(parameters)
        self._parts: list[_Part] = []
        self._groups: Any = None
        self.reset()

    def applies(self) -> bool:
        """Return whether the kernel has the effect of ``optimizer.step()`` at present."""
        optimizer = self.optimizer
        if not self._fits or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return False
        return all(self._supports(group) for group in optimizer.param_groups)

    def _supports(self, group: dict[str, Any]) -> bool:
        """Whether the kernel supports all options of a parameter group."""
        if group.get("amsgrad") or group.get("differentiable") or isinstance(group["lr"], Tensor):
            return False
        # The kernel needs step counts on the device; torch's unfused Adam keeps them on the host.
        return self._on_host or bool(group.get("fused") or group.get("capturable"))

    def reset(self) -> None:
        """Read the layout of the parameters again, and the optimiser's state at the next step."""
        self._state: Any = None
        self._fits = is_adam(self.optimizer) and all(map(_dense, self.parameters))
        self._on_host = all(parameter.device.type == "cpu" for parameter in self.parameters)

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Make one step."""
        optimizer = self.optimizer
        if self._state is not optimizer.state or self._groups is not optimizer.param_groups or self._replaced():
            self._prepare()
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers check whether a step has been made
        for part in self._parts:
            group, states = part.group, part.states
            beta1, beta2 = group["betas"]
            part.counts.add_(part.one)
            part.kernel(
                part.parameters,
                [gradients[place] for place in part.places],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                part.views,
                lr=group["lr"],
                beta1=float(beta1),
                beta2=float(beta2),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
            )

    def _replaced(self) -> bool:
        """Whether the optimiser's state has been emptied, or has other step counts."""
        if not self.optimizer.state:
            return True
        return not all(
            state.get("step") is view
            for part in self._parts
            for state, view in zip(part.states, part.views, strict=True)
        )

    def _prepare(self) -> None:
        optimizer = self.optimizer
        self._state, self._groups = optimizer.state, optimizer.param_groups
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        parts: dict[tuple, _Part] = {}
        decoupled = type(optimizer) is torch.optim.AdamW
        for place, parameter in enumerate(self.parameters):
            group, state = group_of[id(parameter)], optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _aligned(state[name], parameter, name)
            kernel = torch._fused_adamw_ if group.get("decoupled_weight_decay", decoupled) else torch._fused_adam_
            key = id(group), parameter.device, parameter.dtype
            part = parts.setdefault(key, _Part(group, kernel, [], [], []))
            part.places.append(place)
            part.parameters.append(parameter)
            part.states.append(state)
        self._parts = list(parts.values())
        for part in self._parts:
            part.counts = torch.stack([state["step"].float() for state in part.states])
            part.one = torch.ones_like(part.counts[0])
            part.views = list(part.counts.unbind())
            for state, view in zip(part.states, part.views, strict=True):
                state["step"] = view


def _aligned(moment: Tensor, parameter: Tensor, name: str) -> Tensor:
    """Give a moment the memory layout of its parameter; the kernel does not check the layouts."""
    if moment.shape != parameter.shape:
        raise ValueError(
            f"the optimizer holds {name} of shape {tuple(moment.shape)} for a parameter of shape "
            f"{tuple(parameter.shape)}: its state is that of another model"
        )
    if moment.stride() == parameter.stride() and moment.dtype == parameter.dtype:
        return moment
    return torch.zeros_like(parameter, memory_format=torch.preserve_format).copy_(moment)


def _dense(parameter: Tensor) -> bool:
    """Whether the memory of a parameter is dense, as the kernel needs it."""
    same = torch.empty_like(parameter, memory_format=torch.preserve_format, device="meta").stride()
    return parameter.is_floating_point() and parameter.stride() == same


def clip(gradients: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    """Clip gradients to a global norm, as ``torch.nn.utils.clip_grad_norm_`` does, without changing them in place."""
    device = gradients[0].device
    norms = [norm.to(device) for norm in torch._foreach_norm(list(gradients))]
    factor = (max_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    if all(gradient.device == device for gradient in gradients):
        return list(torch._foreach_mul(list(gradients), factor))
    return [gradient * factor.to(gradient.device) for gradient in gradients]
