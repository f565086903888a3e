"""The layout of tensors in a run: particles leftmost, then the plates' dims, then the event.

With K > 1 particles a log-density of a site has shape ``(K, dims of all plates)`` broadcast from the right, a value
``(K, dims of all plates, *event)``; with one particle the first dim is absent.  All sums and reshapes along these
dims are in this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pyro_hvae.problem.structure import Plate

__all__ = ["Layout", "LayoutError", "batch_shape_of"]


class LayoutError(ValueError):
    """Error: a tensor has other dims than its particles, plates and event."""


def batch_shape_of(plates: Sequence[Plate]) -> tuple[int, ...]:
    """Return the sizes along the dims of plates, 1 in gaps between them."""
    shape = [1] * max((-plate.dim for plate in plates if plate.dim is not None), default=0)
    for plate in plates:
        if plate.dim is not None:
            shape[plate.dim] = plate.size
    return tuple(shape)


class Layout(NamedTuple):
    """Dims of a run.

    Attributes:
        nesting: how many dims the plates of the pair take.
        num_particles: K.
    """

    nesting: int
    num_particles: int

    @property
    def rank(self) -> int:
        """Dims left of the event."""
        return self.nesting + (self.num_particles > 1)

    def padded(self, value: Tensor, event_dim: int = 0) -> Tensor:
        """Return a value with leading dims of size 1, up to the rank of the run."""
        missing = self.rank + event_dim - value.dim()
        return value.reshape((1,) * missing + value.shape) if missing > 0 else value

    def reduce(self, value: Tensor, plates: Sequence[Plate]) -> Tensor:
        """Sum a tensor of batch shape over all dims but those of ``plates``: ``(K or 1, *plates)``."""
        value = self.padded(value)
        keep = {plate.dim for plate in plates}
        if self.num_particles > 1:
            keep.add(-self.rank)
        dims = [dim for dim in range(-value.dim(), 0) if dim not in keep]
        if dims:
            value = value.sum(dims)
        return value if self.num_particles > 1 else value.unsqueeze(0)

    def spread(self, per_datum: Tensor, plates: Sequence[Plate], event_dim: int = 0) -> Tensor:
        """Reshape values ``(K, *plates)`` so that they broadcast against a site's value."""
        shape = [1] * (self.nesting + 1)
        shape[0] = len(per_datum)
        for plate, size in zip(plates, per_datum.shape[1:], strict=True):
            assert plate.dim is not None
            shape[plate.dim] = size
        laid = per_datum.reshape(shape if self.num_particles > 1 else shape[1:])
        return laid.reshape(laid.shape + (1,) * event_dim)

    def vector(self, value: Tensor, plates: Sequence[Plate], event_dim: int) -> Tensor:
        """Flatten a site's value for each particle and index of ``plates``: ``(K or 1, *plates, elements)``."""
        order = self._plates_first(plates, event_dim)
        value = self.padded(value, event_dim).permute(order)
        kept = len(plates) + (self.num_particles > 1)
        value = value.reshape(*value.shape[:kept], -1)
        return value if self.num_particles > 1 else value.unsqueeze(0)

    def unvector(self, vector: Tensor, plates: Sequence[Plate], event_dim: int, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`vector` for a site whose value has the sizes ``shape``, 1 along the dims of ``plates``."""
        order = self._plates_first(plates, event_dim)
        leading = vector.shape if self.num_particles > 1 else vector.shape[1:]
        kept = len(plates) + (self.num_particles > 1)
        lead = self.rank - self.nesting
        rest = [shape[d - lead] for d in order[kept:]]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return vector.reshape(*leading[:kept], *rest).permute(inverse)

    def _plates_first(self, plates: Sequence[Plate], event_dim: int) -> list[int]:
        """Return the order of dims that has particles, then ``plates``, then all others."""
        lead = self.rank - self.nesting
        first = list(range(lead)) + [self.rank + plate.dim for plate in plates if plate.dim is not None]
        return first + [d for d in range(self.rank + event_dim) if d not in first]

    def put(self, value: Tensor, plates: Sequence[Plate], event_shape: Sequence[int]) -> Tensor:
        """Reshape a value of a site to ``(K, *plates, *event)``.

        Raises:
            LayoutError: if the value has other dims than particles, plates and event.
        """
        count, events = self.num_particles, len(event_shape)
        if count == 1 and value.dim() <= self.nesting + events:
            value = value.reshape((1,) * (self.nesting + events + 1 - value.dim()) + value.shape)
        rank = 1 + self.nesting + events
        if value.dim() < rank:
            value = value.reshape((1,) * (rank - value.dim()) + value.shape)
        own = {plate.dim for plate in plates}
        spare = [d for d in range(1, 1 + self.nesting) if d - 1 - self.nesting not in own]
        extra = value.dim() > rank or any(value.shape[d] != 1 for d in spare)
        if extra or tuple(value.shape[value.dim() - events :]) != tuple(event_shape):
            raise LayoutError(
                f"a value has shape {tuple(value.shape)} with {count} draw(s) at once, where its plates "
                f"{[plate.name for plate in plates]} and its event {tuple(event_shape)} give "
                f"{(count, *(plate.size for plate in plates), *event_shape)}. Put every batch dim into a plate or an "
                "event (.to_event), and keep event shapes the same at every draw"
            )
        value = value.squeeze(tuple(spare)) if spare else value
        return value.expand(count, *(plate.size for plate in plates), *event_shape)

    def place(self, value: Tensor, shape: Sequence[int], event_dim: int) -> Tensor:
        """Reshape a value ``(K, *shape)`` to the dims that programs use; ``(*shape)`` for one particle."""
        if self.num_particles == 1:
            return value.reshape(tuple(shape))
        padding = self.nesting + event_dim - len(shape)
        return value.reshape(self.num_particles, *(1,) * padding, *shape)
