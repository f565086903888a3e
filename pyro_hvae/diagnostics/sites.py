"""Sites of a pair as variables of a tree: draws first, then the site's plates, then its event, with names of dims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_hvae.problem import Layout, Plate, Run
from pyro_hvae.problem.plates import LayoutError
from pyro_hvae.problem.structure import is_deterministic, sample_sites

__all__ = ["TreeSite", "TreeSites", "sites_of"]


@dataclass(frozen=True)
class TreeSite:
    """One site: its role, and the shape and the dim names of one value of it.

    ``role`` is ``latent``, ``auxiliary``, ``enumerated``, ``observed``, ``factor`` or ``deterministic``.
    """

    name: str
    role: str
    plates: tuple[Plate, ...]
    event_shape: tuple[int, ...]
    event_names: tuple[str, ...]
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
class TreeSites:
    """The sites of a pair; ``common`` are the plates of a datum, ``draw_bytes`` is the memory of one draw of all."""

    sites: Mapping[str, TreeSite]
    common: tuple[Plate, ...]
    draw_bytes: int

    def __getitem__(self, name: str) -> TreeSite:
        return self.sites[name]

    def __contains__(self, name: str) -> bool:
        return name in self.sites

    def role(self, *roles: str) -> list[str]:
        """Return the names of the sites of these roles, in the order of the programs."""
        return [name for name, site in self.sites.items() if site.role in roles]

    def value(self, name: str, value: Any, layout: Layout) -> Tensor:
        """Reshape a value of a site to ``(K, *plates, *event)``."""
        site, value = self.sites[name], torch.as_tensor(value)
        if site.role == "deterministic":
            return _computed(site, value, layout.num_particles)
        value = self.put(name, value, layout, site.event_shape)
        return value.to(site.integer) if site.integer is not None and value.is_floating_point() else value

    def density(self, name: str, value: Tensor, layout: Layout) -> Tensor:
        """Reshape a log-density of a site to ``(K, *plates)``."""
        return self.put(name, value, layout, ())

    def put(self, name: str, value: Tensor, layout: Layout, event_shape: Sequence[int]) -> Tensor:
        """Reshape a value with an event of another shape to ``(K, *plates, *event)``.

        Raises:
            LayoutError: naming the site.
        """
        try:
            return layout.put(value, self.sites[name].plates, event_shape)
        except LayoutError as error:
            raise LayoutError(f"site '{name}': {error}; chunk_size=1 runs programs that can't be vectorised") from None


def _computed(site: TreeSite, value: Tensor, num_particles: int) -> Tensor:
    """Reshape a deterministic site's value, which has the draws' dim only if it depends on a draw."""
    size = 1
    for length in site.shape:
        size *= length
    if value.numel() == size * num_particles:
        return value.reshape(num_particles, *site.shape)
    if value.numel() == size:
        return value.reshape(1, *site.shape).expand(num_particles, *site.shape)
    raise LayoutError(
        f"deterministic site '{site.name}' has {value.numel()} values for {num_particles} draws at once, and "
        f"{size} in a single run: compute it from the last dims, [..., i], or use chunk_size=1"
    )


def sites_of(run: Run, model_trace: Trace, dims: Mapping[str, Sequence[str]] | None = None) -> TreeSites:
    """Return the sites of a run with one particle.

    Args:
        run: one particle.
        model_trace: of the model at the same draws, with nothing summed out.
        dims: names of event dims by site, which override those of the programs.

    Raises:
        ValueError: for names of unknown sites, another number of names than the event has dims, or a name of two sizes.
    """
    named = {} if dims is None else dims
    model_sites = {site["name"]: site for site in sample_sites(model_trace)}
    guide_sites = {site["name"]: site for site in sample_sites(run.guide_trace)}
    sites: dict[str, TreeSite] = {}
    draw_bytes = 0
    for name, info in run.structure.sites.items():
        site = guide_sites[name] if info.role in ("latent", "auxiliary") else model_sites[name]
        sites[name] = _site(site, info, model_sites.get(name), named.get(name))
        value = torch.as_tensor(site["value"])
        draw_bytes += (2 + (sites[name].role == "latent")) * value.numel() * value.element_size()
    unknown = sorted(set(named) - set(sites))
    if unknown:
        raise ValueError(f"dims names {unknown}, which are no sites; there are {sorted(sites)}")
    _check_names(sites)
    return TreeSites(sites, run.plates, max(draw_bytes, 1))


def _site(
    site: Mapping[str, Any], info: Any, model_site: Mapping[str, Any] | None, names: Sequence[str] | None
) -> TreeSite:
    role, value, event_dim = info.role, torch.as_tensor(site["value"]), site["fn"].event_dim
    if role == "observed" and is_deterministic(site):
        role = "deterministic"
    elif role == "observed" and info.model_distribution == "Unit":
        role = "factor"
    plates = tuple(plate for plate in info.plates if plate.dim is not None)
    if role == "deterministic":
        plates, event_dim = _computed_dims(plates, event_dim, value)
    event_shape = () if role == "factor" else tuple(value.shape[value.dim() - event_dim :])
    names = names or info.event_dims or [f"{info.name}_dim_{i}" for i in range(len(event_shape))]
    if len(names) != len(event_shape):
        raise ValueError(
            f"site '{info.name}' has {len(event_shape)} event dim(s) of shape {event_shape}, and not the "
            f"{len(names)} of {list(names)}: name event dims only, not plates"
        )
    integer = None
    if model_site is not None and role in ("latent", "enumerated", "observed"):
        integer = _integer(model_site["fn"])
    return TreeSite(info.name, role, plates, event_shape, tuple(names), integer)


def _computed_dims(plates: tuple[Plate, ...], event_dim: int, value: Tensor) -> tuple[tuple[Plate, ...], int]:
    """Return the plates and the number of event dims of a deterministic site, whose default event has all dims."""
    nesting = max((-plate.dim for plate in plates if plate.dim is not None), default=0)
    if event_dim == value.dim() and value.dim() >= nesting:
        event_dim = value.dim() - nesting
    batch = value.shape[: value.dim() - event_dim]
    kept = tuple(p for p in plates if p.dim is not None and -p.dim <= len(batch) and batch[p.dim] == p.size)
    return kept, event_dim


def _integer(fn: Any) -> torch.dtype | None:
    """Return an integer type for integer supports: torch has floats there, and ArviZ recognises counts by type."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    kind = type(support).__name__
    if kind in ("_Boolean", "_OneHot"):
        return torch.int8
    counts = ("_IntegerInterval", "_IntegerLessThan", "_IntegerGreaterThan", "_Multinomial")
    return torch.int32 if kind in counts else None


def _check_names(sites: Mapping[str, TreeSite]) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for site in sites.values():
        for dim, length in zip(site.dims, site.shape, strict=True):
            if sizes.setdefault(dim, (length, site.name))[0] != length:
                raise ValueError(
                    f"dim '{dim}' has size {length} at site '{site.name}' and {sizes[dim][0]} at '{sizes[dim][1]}': a "
                    "name must have one size. Rename the plate or the event dim"
                )
        if len(set(site.dims)) < len(site.dims):
            raise ValueError(f"site '{site.name}' has two dims of one name: {site.dims}. Rename one")
    for name in sites:
        if name in sizes:
            raise ValueError(
                f"'{name}' names a site and a dim, of which a tree can hold one. Rename the plate or event dim"
            )
