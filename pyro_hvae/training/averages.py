r"""An exponential moving average of the parameters, :math:`\bar\theta \leftarrow d\,\bar\theta + (1-d)\,\theta`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pyro_hvae.arguments import check_number

__all__ = ["Averages"]


class Averages:
    """Running averages of a module's parameters, by torch's own rule.

    Args:
        module: whose parameters are averaged.
        decay: d in [0, 1).

    Raises:
        ValueError: for a decay outside of [0, 1).

    Example:
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(layer.weight)
        >>> averages = Averages(layer, decay=0.75)
        >>> _ = torch.nn.init.ones_(layer.weight)
        >>> averages.update()
        >>> averages.parameters["weight"].item()
        0.25
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        check_number("ema, the decay of a moving average,", decay, 0.0, 1.0, ends="[)")
        self.decay = decay
        self._own = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._own.items()}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages by the present parameters."""
        self._average(list(self.parameters.values()), [p.detach() for p in self._own.values()], None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters by the averages inside of the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._own.items():
            value = parameter.detach().clone()
            parameter.copy_(self.parameters[name])
            self.parameters[name].copy_(value)

    def state_dict(self) -> dict[str, object]:
        return {"decay": self.decay, "parameters": self.parameters}

    @torch.no_grad()
    def restart(self) -> None:
        """Start the averages at the present parameters."""
        for name, parameter in self._own.items():
            self.parameters[name].copy_(parameter)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, average in self.parameters.items():
            average.copy_(state["parameters"][name])
