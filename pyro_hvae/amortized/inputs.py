"""Inputs of the encoders: values of a site or an argument as standardised columns, laid out along the plates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_hvae.amortized.look import Seen
from pyro_hvae.amortized.transforms import inner_support, transform_onto
from pyro_hvae.problem import Plate
from pyro_hvae.problem.structure import leaf_distribution

__all__ = ["Input", "align", "along"]

CATEGORIES = 64
"""Categorical values of at most so many kinds are shown as indicators."""


class Input(nn.Module):
    """Values of one site or argument as columns.

    Continuous latents are shown on the real line.  Columns are standardised by the mean and standard deviation of
    the example (by those of the prior for latents); categories are indicators.  Entries that are masked are shown as
    zero, beside indicators of the entries that are not.

    Args:
        plates: the plates around it.
        event_dim: dims of an event.
        categories: the number of values, 0 for numbers.
        latent: values have to be mapped to the real line.
        logs: add a column of logarithms, for positive numbers and counts.
        masked: add the indicator.
    """

    def __init__(
        self,
        plates: tuple[Plate, ...],
        event_dim: int,
        *,
        categories: int = 0,
        latent: bool = False,
        logs: bool = False,
    ) -> None:
        super().__init__()
        self.plates, self.event_dim, self.categories = plates, event_dim, categories
        self.latent, self.logs, self.masked, self.partial = latent, logs, False, False
        self.center: Tensor
        self.scale: Tensor
        self.register_buffer("center", torch.zeros(1))
        self.register_buffer("scale", torch.ones(1))

    @property
    def width(self) -> int:
        return len(self.center) * (2 if self.partial else 1) + self.masked

    def columns(self, value: Tensor, fn: Any = None) -> Tensor:
        """Return the columns (*batch, c) before they are standardised."""
        if self.categories:
            flat = nn.functional.one_hot(value.long().clamp(0, self.categories - 1), self.categories)
            return flat.reshape(*value.shape[: value.dim() - self.event_dim], -1).to(self.center)
        event_dim = self.event_dim
        if self.latent:
            transform = transform_onto(inner_support(fn))
            value = transform.inv(value)
            event_dim += transform.domain.event_dim - transform.codomain.event_dim
        value = value.to(self.center)
        flat = value.reshape(*value.shape[: value.dim() - event_dim], -1)
        if self.logs:
            flat = torch.cat([flat, flat.clamp_min(0).add(self.shift).log()], -1)
        return flat

    shift = 1e-6

    def standardise(self, columns: Tensor, mask: Tensor | None) -> None:
        """Set center and scale from the columns (*batch, c) of an example, or of draws."""
        rows = columns.detach().reshape(-1, columns.shape[-1])
        if mask is not None:
            rows = rows[mask.expand(columns.shape[:-1]).reshape(-1)]
            self.masked = mask.numel() > 1
        rows = rows[rows.isfinite().all(-1)]
        count = columns.shape[-1]
        self.center, self.scale = rows.new_zeros(count), rows.new_ones(count)
        if self.categories or len(rows) < 2:
            if len(rows) and not self.categories:
                self.scale = rows[0].abs().clamp_min(1.0)
            return
        spread = rows.std(0)
        self.center = rows.mean(0)
        self.scale = torch.where(spread > 1e-6 * self.center.abs().clamp_min(1e-6), spread, torch.ones_like(spread))

    def forward(
        self, value: Tensor, fn: Any = None, mask: Tensor | None = None, entries: Tensor | None = None
    ) -> Tensor:
        """Return (*batch, :attr:`width`)."""
        shown = (self.columns(value, fn) - self.center) / self.scale
        if self.partial:
            counted = torch.ones_like(value, dtype=torch.bool) if entries is None else entries.expand(value.shape)
            counted = counted.reshape(shown.shape)
            shown = torch.cat([torch.where(counted, shown, torch.zeros_like(shown)), counted.to(shown)], -1)
        if mask is not None:
            shown = torch.where(mask[..., None], shown, torch.zeros_like(shown))
        if self.masked:
            present = torch.ones(()) if mask is None else mask
            present = present.to(shown).expand(shown.shape[:-1])
            shown = torch.cat([shown, present[..., None]], -1)
        return shown


def input_of(seen: Seen, *, linear: bool) -> Input:
    """Return the input of a site, not yet standardised."""
    leaf: Any = leaf_distribution(seen.fn)
    categories, kind = 0, type(leaf).__name__
    if kind == "Categorical" and leaf.probs.shape[-1] <= CATEGORIES:
        categories = leaf.probs.shape[-1]
    latent = seen.kind == "latent" and not inner_support(seen.fn).is_discrete
    logs = False
    if seen.kind == "observed" and not linear and not categories and seen.entries is None:
        logs = _positive(seen.value, seen.mask)
    made = Input(seen.plates, seen.fn.event_dim, categories=categories, latent=latent, logs=logs)
    made.shift = 1.0 if logs and inner_support(seen.fn).is_discrete else Input.shift
    made.partial = seen.entries is not None and not categories
    return made


def _positive(value: Tensor, mask: Tensor | None) -> bool:
    """Whether numbers are never negative, and not only 0 and 1."""
    if mask is not None and mask.dim() == value.dim():
        value = value[mask.expand(value.shape)]
    return bool(value.numel()) and bool((value >= 0).all()) and bool((value > 1).any())


def covariate_input(argument: Tensor, plates: tuple[Plate, ...], *, linear: bool) -> Input:
    """Return the input of an argument whose first dims are those of ``plates``."""
    numbers = argument.is_floating_point() or argument.dtype in (torch.int32, torch.int64)
    logs = not linear and numbers and bool((argument > 0).all()) and bool((argument > 1).any())
    return Input(plates, argument.dim() - len(plates), logs=logs)


def align(argument: Tensor, stacks: list[tuple[Plate, ...]]) -> tuple[Plate, ...]:
    """Return the plates that the first dims of an argument belong to, by their sizes.

    Args:
        stacks: plates of each site that depends on the argument, leftmost dim first.
    """
    best: tuple[Plate, ...] = ()
    for stack in stacks:
        plates = [plate for plate in stack if plate.dim is not None]
        last = -(plates[-1].dim or 0) if plates else 0
        sizes = [plate.size for plate in plates]
        if len(plates) >= argument.dim() > 0 and last == 1 and tuple(sizes[-argument.dim() :]) == tuple(argument.shape):
            chosen: list[Plate] = plates[-argument.dim() :]  # as an argument is broadcast
        else:
            chosen, position = [], 0
            for plate in plates:
                if position < argument.dim() and argument.shape[position] == plate.size:
                    chosen.append(plate)
                    position += 1
        if len(chosen) > len(best):
            best = tuple(chosen)
    return best


def along(argument: Tensor, plates: tuple[Plate, ...]) -> Tensor:
    """Reshape an argument so that the dims of its plates are where programs have them, before its event."""
    dims = [plate.dim or 0 for plate in plates]
    shape = [1] * max((-dim for dim in dims), default=0)
    for dim, size in zip(dims, argument.shape, strict=False):
        shape[dim] = size
    return argument.reshape(*shape, *argument.shape[len(plates) :])
