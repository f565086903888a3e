"""Where a site's values stand in the tree: draws first, then the site's plates, then its event, each dim with a name.

Programs that run with K particles hold values of shape ``(K, plates and the gaps between them, event)``, or without
K where nothing random enters; the tree wants ``(K, own plates, event)``, of one shape for each site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_hvae.traces import Plate, Reading
from pyro_hvae.traces.structure import sample_sites

__all__ = ["Layout", "Placed", "is_deterministic", "layout_of"]


@dataclass(frozen=True)
class Placed:
    """One site: its role, and the shape and the dim names of one value of it.

    ``role`` is ``latent``, ``auxiliary``, ``enumerated``, ``observed``, ``factor`` or ``deterministic``.
    """

    name: str
    role: str
    plates: tuple[Plate, ...]
    event_shape: tuple[int, ...]
    event_names: tuple[str, ...]
    in_guide: bool = False
    integer: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(plate.size for plate in self.plates) + self.event_shape

    @property
    def plate_names(self) -> list[str]:
        return [plate.name for plate in self.plates]

    @property
    def dims(self) -> list[str]:
        return [*self.plate_names, *self.event_names]


@dataclass(frozen=True)
class Layout:
    """The sites of a pair, and the arithmetic that puts their values in place."""

    sites: Mapping[str, Placed]
    common: tuple[Plate, ...]
    max_plate_nesting: int
    bytes_a_draw: int

    def role(self, *roles: str) -> list[str]:
        """Names of the sites of these roles, in the order of the programs."""
        return [name for name, site in self.sites.items() if site.role in roles]

    def value(self, name: str, value: Tensor, num_particles: int) -> Tensor:
        """A value of a site as ``(K, own plates, event)``."""
        site = self.sites[name]
        if site.role == "deterministic":
            return self._computed(site, value, num_particles)
        value = self.put(site, value, num_particles, site.event_shape)
        return value.to(site.integer) if site.integer is not None and value.is_floating_point() else value

    def density(self, name: str, value: Tensor, num_particles: int) -> Tensor:
        """A log-density of a site, of its batch shape, as ``(K, own plates)``."""
        return self.put(self.sites[name], value, num_particles, ())

    def datum(self, value: Tensor) -> Tensor:
        """What a :class:`Reading` reduced to the common plates, as ``(K, plates)``."""
        return value.reshape(value.shape[0], *(plate.size for plate in self.common))

    def put(self, site: Placed, value: Tensor, num_particles: int, event: tuple[int, ...]) -> Tensor:
        """A value in a site's plates, with an event of its own, as ``(K, own plates, event)``."""
        nesting, events = self.max_plate_nesting, len(event)
        if num_particles == 1 and value.dim() <= nesting + events:
            value = value.reshape((1,) * (nesting + events + 1 - value.dim()) + value.shape)
        rank = 1 + nesting + events
        if value.dim() < rank:
            value = value.reshape((1,) * (rank - value.dim()) + value.shape)
        own = {plate.dim for plate in site.plates}
        spare = [d for d in range(1, 1 + nesting) if d - 1 - nesting not in own]
        extra = value.dim() > rank or any(value.shape[d] != 1 for d in spare)
        if extra or tuple(value.shape[value.dim() - events :]) != event:
            raise ValueError(
                f"site '{site.name}' has a value of shape {tuple(value.shape)} with {num_particles} draws at once, "
                f"where its plates {site.plate_names} and its event leave room for {(num_particles, *site.shape)}. Put "
                "every batch dim into a plate or an event (.to_event), and keep event shapes the same at every draw; "
                "chunk_size=1 runs programs that can't be vectorised"
            )
        value = value.squeeze(tuple(spare)) if spare else value
        return value.expand(num_particles, *(plate.size for plate in site.plates), *event)

    def _computed(self, site: Placed, value: Tensor, num_particles: int) -> Tensor:
        """What the program computed has the draws' dim where a draw entered it, and gaps that mean nothing."""
        size = 1
        for length in site.shape:
            size *= length
        if value.numel() == size * num_particles:
            return value.reshape(num_particles, *site.shape)
        if value.numel() == size:
            return value.reshape(1, *site.shape).expand(num_particles, *site.shape)
        raise ValueError(
            f"deterministic site '{site.name}' has {value.numel()} values for {num_particles} draws at once, and "
            f"{size} in a single run: compute it from the last dims, [..., i], or use chunk_size=1"
        )


def is_deterministic(site: Mapping[str, Any]) -> bool:
    return bool(site["infer"].get("_deterministic"))


def layout_of(reading: Reading, model_trace: Trace, dims: Mapping[str, Sequence[str]] | None = None) -> Layout:
    """The layout that a run of a single particle shows.

    Args:
        reading: one particle.
        model_trace: of the model at the same draws, with nothing summed out.
        dims: names of event dims by site, which go before those that the programs give.

    Raises:
        ValueError: for names of other sites than there are, of another number than the event has dims, or that stand
            for two sizes.
    """
    found = reading.structure
    given = {} if dims is None else dims
    model_sites = {site["name"]: site for site in sample_sites(model_trace)}
    guide_sites = {site["name"]: site for site in sample_sites(reading.guide_trace)}
    placed: dict[str, Placed] = {}
    size = 0
    for name, info in found.sites.items():
        site = guide_sites[name] if info.role in ("latent", "auxiliary") else model_sites[name]
        role = info.role
        value = site["value"]
        event_dim = site["fn"].event_dim
        if role == "observed" and is_deterministic(site):
            role = "deterministic"
        elif role == "observed" and info.model_distribution == "Unit":
            role = "factor"
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value)
        plates = tuple(plate for plate in info.plates if plate.dim is not None)
        if role == "deterministic":
            plates, event_dim, value = _computed_dims(plates, event_dim, value)
        event_shape = () if role == "factor" else tuple(value.shape[value.dim() - event_dim :])
        names = given.get(name) or info.event_dims or [f"{name}_dim_{i}" for i in range(len(event_shape))]
        if len(names) != len(event_shape):
            raise ValueError(
                f"site '{name}' has {len(event_shape)} event dim(s) of shape {event_shape}, and the names "
                f"{list(names)} are given for them: plates come by their own names"
            )
        model_site = model_sites.get(name)
        integer = None
        if model_site is not None and role in ("latent", "enumerated", "observed"):
            integer = _integer(model_site["fn"])
        placed[name] = Placed(name, role, plates, event_shape, tuple(names), name in guide_sites, integer)
        size += (2 + (role == "latent")) * value.numel() * value.element_size()
    unknown = sorted(set(given) - set(placed))
    if unknown:
        raise ValueError(f"dims names {unknown}, which are no sites; there are {sorted(placed)}")
    _check_names(placed)
    return Layout(placed, reading.plates, found.max_plate_nesting, max(size, 1))


def _computed_dims(plates: tuple[Plate, ...], event_dim: int, value: Tensor) -> tuple[tuple[Plate, ...], int, Tensor]:
    """A deterministic site in a plate counts all its dims as an event unless told; those of its plates are none."""
    nesting = max((-plate.dim for plate in plates if plate.dim is not None), default=0)
    if event_dim == value.dim() and value.dim() >= nesting:
        event_dim = value.dim() - nesting
    batch = value.shape[: value.dim() - event_dim]
    kept = tuple(p for p in plates if p.dim is not None and -p.dim <= len(batch) and batch[p.dim] == p.size)
    return kept, event_dim, value


def _integer(fn: Any) -> torch.dtype | None:
    """The type of whole numbers, which torch keeps as floats, while ArviZ tells counts by their type."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    kind = type(support).__name__
    if kind in ("_Boolean", "_OneHot"):
        return torch.int8
    counts = ("_IntegerInterval", "_IntegerLessThan", "_IntegerGreaterThan", "_Multinomial")
    return torch.int32 if kind in counts else None


def _check_names(placed: Mapping[str, Placed]) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for site in placed.values():
        for dim, length in zip(site.dims, site.shape):
            if sizes.setdefault(dim, (length, site.name))[0] != length:
                raise ValueError(
                    f"dim '{dim}' has size {length} at site '{site.name}' and {sizes[dim][0]} at '{sizes[dim][1]}': a "
                    "name stands for one size. Rename the plate or the event dim"
                )
        if len(set(site.dims)) < len(site.dims):
            raise ValueError(f"site '{site.name}' has two dims of one name: {site.dims}. Rename one")
    for name in placed:
        if name in sizes:
            raise ValueError(
                f"'{name}' names a site and a dim, of which a tree can hold one. Rename the plate or event dim"
            )
