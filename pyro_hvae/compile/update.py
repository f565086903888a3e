"""Adam as a function of tensors, with the state of torch's own optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["AdamState", "adam_update", "clip", "supports"]


def supports(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the update can be a part of the graph: torch's Adam or AdamW, without the options that few use."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and all(
        not group.get("amsgrad") and not group.get("differentiable") and isinstance(group["lr"], (int, float))
        for group in optimizer.param_groups
    )


class AdamState:
    """The tensors of an Adam optimiser, shared with a graph that changes them in place.

    A graph wants one step count, where torch keeps one for each parameter.  While the graph runs, all parameters
    share one tensor; before anyone else looks (an eager ``step()``, ``state_dict()``) each gets its own again.

    What depends on the count and the rate alone is computed here, once a step, and not in the graph, whose kernels
    would raise beta to the power t once for every few numbers.

    Args:
        optimizer: Adam or AdamW.
        parameters: those that the graph moves.
        steps: how many steps one call of the graph makes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], steps: int = 1) -> None:
        self.optimizer = optimizer
        self.steps = steps
        self.parameters = list(parameters)
        self.groups = []
        places = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        for parameter in self.parameters:
            self.groups.append(optimizer.param_groups[places[id(parameter)]])
        self.generation = 0
        self.shared = False
        self.count: Tensor = torch.zeros(())
        self.factors: Tensor = torch.zeros(())
        self._made = 0.0
        self._on_host: Tensor = torch.zeros(())
        optimizer.register_step_pre_hook(lambda *_: self.release())
        optimizer.register_state_dict_post_hook(_separate_counts)
        optimizer.register_load_state_dict_post_hook(lambda *_: self._reloaded())

    def _reloaded(self) -> None:
        self.shared = False

    def acquire(self) -> int:
        """Make the state one for a graph; a number that changes with the tensors."""
        if not self.shared:
            self._share()
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether it has moved
        return self.generation

    def advance(self) -> None:
        """Set what the next call's steps need of count and rate, which the call is expected to follow."""
        values = self._on_host.numpy()
        for index, group in enumerate(self.optimizer.param_groups):
            beta1, beta2 = group["betas"]
            rate = float(group["lr"])
            for ahead in range(self.steps):
                made = self._made + ahead + 1.0
                values[ahead, index] = rate / (1.0 - beta1**made), (1.0 - beta2**made) ** -0.5, rate
        self._made += self.steps
        if self.factors is not self._on_host:
            self.factors.copy_(self._on_host)

    @torch.no_grad()
    def _share(self) -> None:
        device = self.parameters[0].device
        state = self.optimizer.state
        counts = [float(state[p]["step"]) for p in self.parameters if state[p]]
        if counts and (len(counts) < len(self.parameters) or len(set(counts)) > 1):
            raise ValueError(
                "the optimizer has made different numbers of steps for different parameters, and one graph can't "
                "go on from there"
            )
        self._made = counts[0] if counts else 0.0
        self.count = torch.tensor(self._made, dtype=torch.float32, device=device)
        shape = (self.steps, len(self.optimizer.param_groups), 3)
        self._on_host = torch.zeros(shape, dtype=torch.float64)
        self.factors = self._on_host if device.type == "cpu" else self._on_host.to(device, torch.float32)
        for parameter in self.parameters:
            own = state[parameter]
            if not own:
                own["step"] = self.count
                own["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                own["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            own["step"] = self.count
        self.shared = True
        self.generation += 1

    def release(self) -> None:
        """Give each parameter a step count of its own."""
        if self.shared:
            for parameter in self.parameters:
                self.optimizer.state[parameter]["step"] = self.count.clone()
            self.shared = False

    @property
    def tensors(self) -> list[Tensor]:
        """What a graph takes: first moments, second moments, count, factors."""
        state = [self.optimizer.state[parameter] for parameter in self.parameters]
        return [*(own["exp_avg"] for own in state), *(own["exp_avg_sq"] for own in state), self.count, self.factors]


def _separate_counts(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        key: {**own, "step": own["step"].clone()} if isinstance(own.get("step"), Tensor) else own
        for key, own in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def clip(gradients: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    """Gradients cut to a global norm, as ``torch.nn.utils.clip_grad_norm_`` does."""
    norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [gradient * factor for gradient in gradients]


def adam_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    factors: Tensor,
    groups: Sequence[dict[str, Any]],
    group_of: Sequence[int],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    r"""One step of Adam, without changing anything in place.

    .. math:: m' = \beta_1 m + (1-\beta_1) g,\quad v' = \beta_2 v + (1-\beta_2) g^2,\quad
              \theta' = \theta - \frac{\eta}{1-\beta_1^t}\,\frac{m'}{\sqrt{v'}/\sqrt{1-\beta_2^t}+\epsilon}

    Args:
        factors: for each parameter group, :math:`\eta/(1-\beta_1^t)`, :math:`1/\sqrt{1-\beta_2^t}` and
            :math:`\eta`, shape (groups, 3).

    Returns:
        New parameters, first moments, second moments.

    Reference:
        Adam: A Method for Stochastic Optimization (Kingma and Ba, 2015); Decoupled Weight Decay Regularization
        (Loshchilov and Hutter, 2019).
    """
    new: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for theta, gradient, m, v, index in zip(parameters, gradients, first, second, group_of, strict=True):
        group = groups[index]
        beta1, beta2 = group["betas"]
        size, inverse, rate = (factors[index, place].to(theta.dtype) for place in range(3))
        decay, gradient = group["weight_decay"], -gradient if group["maximize"] else gradient
        if decay and group.get("decoupled_weight_decay"):
            theta = theta * (1.0 - rate * decay)
        elif decay:
            gradient = gradient + decay * theta
        m = m + (gradient - m) * (1.0 - beta1)
        v = v * beta2 + gradient * gradient * (1.0 - beta2)
        theta = theta - size * (m / (v.sqrt() * inverse + group["eps"]))
        for part, value in zip(new, (theta, m, v), strict=True):
            part.append(value)
    return new
