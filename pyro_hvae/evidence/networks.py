"""Networks that correct the momenta of annealing chains, from the state, both scores and the momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_hvae.evidence.path import Path, State

__all__ = ["MomentumNetwork"]

_LARGEST = 3.0
"""Bound of corrections of log standard deviations."""


class MomentumNetwork(nn.Module):
    """Corrections of the momenta of all coordinates of a datum, one network for all steps and data.

    It sees coordinates in the base's mean and standard deviation, both scores and the momentum by ``asinh``, which
    bounds what steep tails do, and which step it is.  It starts at zero.

    Args:
        path: gives the sites and draws of the base.
        num_steps: T.
        outputs: for each coordinate: 1 (a shift), or 2 (and a change of the log standard deviation).
        hidden: widths of the hidden layers.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, path: Path, num_steps: int, outputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        draws = path.start()
        vector = torch.cat([path.vector(draws[name], name) for name in path.transforms], -1)
        dims, width = tuple(range(vector.dim() - 1)), vector.shape[-1]
        self.num_steps, self.outputs = num_steps, outputs
        self.register_buffer("centre", vector.mean(dims))
        self.register_buffer("spread", vector.std(dims).clamp(min=1e-6))
        widths = [4 * width + num_steps, *hidden]
        layers = [part for left, right in pairwise(widths) for part in (nn.Linear(left, right), nn.SiLU())]
        last = nn.Linear(widths[-1], outputs * width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*layers, last).to(vector)

    def forward(
        self, path: Path, state: State, scores: Sequence[State], momentum: State, step: int, *, held: bool = False
    ) -> list[State]:
        """Return corrections by site, one for each output.

        Args:
            scores: of base and joint, in standard coordinates.
            momentum: empty where there is none.
            held: give no gradient to the network's parameters.
        """
        names = list(path.transforms)
        parts = [(torch.cat([path.vector(state[n], n) for n in names], -1) - self.centre) / self.spread]
        for values in (*scores, momentum):
            known = [path.vector(values[n], n) for n in names] if values else [torch.zeros_like(parts[0])]
            parts.append(torch.cat(known, -1).asinh())
        which = torch.zeros(self.num_steps, dtype=parts[0].dtype, device=parts[0].device)
        which[step] = 1.0
        parts.append(which.expand(*parts[0].shape[:-1], -1))
        found = self._call(torch.cat(parts, -1), held)
        sizes = [math.prod(path.shared_shape(name)) for name in names]
        result = []
        for part in found.chunk(self.outputs, -1):
            split = zip(names, part.split(sizes, -1), strict=True)
            result.append({name: path.unvector(value, name) for name, value in split})
        if self.outputs == 2:
            result[1] = {name: _LARGEST * (value / _LARGEST).tanh() for name, value in result[1].items()}
        return result

    def _call(self, inputs: Tensor, held: bool) -> Tensor:
        if not held:
            return self.net(inputs)
        parameters = {name: p.detach() for name, p in self.net.named_parameters()}
        found: Tensor = torch.func.functional_call(self.net, parameters, (inputs,))
        return found
