r"""Networks from inputs along plates to the parameters of a latent.

A latent in plates P is shown, element by element, the inputs whose plates are among P.  Inputs in further plates E
are pooled over E: inputs with the same E are joined and embedded, and of the embeddings :math:`e` (with the inputs
themselves and their squares) the mean and the sum over the elements that are not masked are shown, with their number,
and the log of the variance of the inputs among these elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_hvae.problem import Plate

__all__ = ["Encoder", "Shown", "groups_of", "perceptron"]

SQUARES_UP_TO = 32
"""Inputs of at most so many columns are pooled as they are and squared, besides their embedding."""
SMALLEST_VARIANCE = 1e-4
"""Added to variances within groups, in units of the variance of all."""


class Shown(NamedTuple):
    """An input of one call: columns (*batch, c), and which elements count (None for all)."""

    columns: Tensor
    mask: Tensor | None


def perceptron(width: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Return a network that keeps all leading dims."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.SiLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def groups_of(plates: Mapping[str, tuple[Plate, ...]], own: tuple[Plate, ...]) -> dict[tuple[Plate, ...], list[str]]:
    """Group the inputs of a latent by the plates over which they are pooled; ``()`` for those that are not.

    An input in some of the pooled plates of a group is in the group too, beside the inputs in all of them.
    """
    present = set(own)
    extra = {name: tuple(p for p in stack if p.dim is not None and p not in present) for name, stack in plates.items()}
    groups: dict[tuple[Plate, ...], list[str]] = {}
    for beyond in dict.fromkeys(extra.values()):
        if beyond:
            groups[beyond] = [name for name, more in extra.items() if more and set(more) <= set(beyond)]
        else:
            groups[beyond] = [name for name, more in extra.items() if not more]
    return groups


class Encoder(nn.Module):
    """Network from inputs to the outputs of a latent.

    Args:
        groups: names of inputs by pooled plates.
        widths: columns of each input.
        outputs: number of outputs of an element.
        hidden: widths of hidden layers; none for a linear map of the inputs, or of their means and sums.
        batch: sizes along the plates of a latent whose elements have biases of their own.
    """

    def __init__(
        self,
        groups: Mapping[tuple[Plate, ...], Sequence[str]],
        widths: Mapping[str, int],
        outputs: int,
        hidden: Sequence[int],
        batch: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.groups = [(pooled, tuple(names)) for pooled, names in groups.items()]
        self.embed, width, pooled_widths = nn.ModuleList(), 0, []
        for pooled, names in self.groups:
            columns = sum(widths[name] for name in names)
            if not pooled:
                width += columns
                continue
            plain = columns if columns <= SQUARES_UP_TO or not hidden else 0
            pooled_widths.append(columns)
            self.embed.append(perceptron(columns, hidden[:-1] or hidden, hidden[-1]) if hidden else nn.Identity())
            width += 2 + ((5 * plain + 2 * hidden[-1]) if hidden else 2 * plain)
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(len(pooled_widths)))
        self.width, self.hidden = width, tuple(hidden)
        self.bias = nn.Parameter(torch.zeros(*batch, outputs))
        self.skip = nn.Linear(width, outputs, bias=False) if width else None
        self.body = perceptron(width, hidden, outputs) if width and hidden else None
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)
        if self.body is not None:
            last = self.body[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def features(self, shown: Mapping[str, Shown]) -> Tensor | None:
        """Return the inputs side by side, pooled where they have further plates: (*batch, width)."""
        parts: list[Tensor] = []
        embeddings = iter(zip(self.embed, self.counts, strict=True))
        for pooled, names in self.groups:
            joined = _join([shown[name].columns for name in names])
            if not pooled:
                parts.append(joined)
                continue
            embed, count = next(embeddings)
            masks = [shown[name].mask for name in names]
            parts.append(self._pool(joined, masks, pooled, embed, count))
        return _join(parts) if parts else None

    def _pool(
        self,
        joined: Tensor,
        masks: Sequence[Tensor | None],
        pooled: Sequence[Plate],
        embed: nn.Module,
        usual: Tensor,
    ) -> Tensor:
        weight = torch.ones(joined.shape[:-1]).to(joined)
        present = [mask for mask in masks if mask is not None]
        if present:
            some = present[0]
            for mask in present[1:]:
                some = some | mask
            weight = weight * some.to(joined)
        dims = [(plate.dim or 0) - 1 for plate in pooled]
        if not self.hidden:
            elements = joined
        elif joined.shape[-1] <= SQUARES_UP_TO:
            elements = torch.cat([joined, joined.square(), embed(joined)], -1)
        else:
            elements = embed(joined)
        weight = weight[..., None]
        total, count = (elements * weight).sum(dims, keepdim=True), weight.sum(dims, keepdim=True)
        if not self.calibrated:
            usual.copy_(count.mean().clamp_min(1.0))
        number = torch.cat([count / usual - 1.0, (count + 1.0).log() - (usual + 1.0).log()], -1)
        mean = total / count.clamp_min(1.0)
        parts = [mean, total / usual, number]
        if self.hidden and joined.shape[-1] <= SQUARES_UP_TO:
            middle, square = mean.split(joined.shape[-1], -1)[:2]
            variance = (square - middle.square()).clamp_min(0.0)
            parts.append(0.5 * (variance + SMALLEST_VARIANCE).log())
        return _join(parts)

    calibrated = False

    def forward(self, shown: Mapping[str, Shown]) -> Tensor:
        """Return the outputs (*batch, outputs)."""
        features = self.features(shown)
        if features is None or self.skip is None:
            return self.bias
        result = self.skip(features) + self.bias
        return result if self.body is None else result + self.body(features)


def _join(parts: Sequence[Tensor]) -> Tensor:
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)
