"""The latent sites of a model as the factors of a product see them: plates, shapes, supports, and their layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_hvae.traces import Plate, read

__all__ = ["Latents", "Site", "latents_of", "size_of", "support_of"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Site:
    """A latent site: ``shape`` is its batch shape followed by its event shape, without particles."""

    name: str
    plates: tuple[Plate, ...]
    shape: torch.Size
    event_dim: int
    prior: Any

    @property
    def leaf(self) -> Any:
        """The prior without the event dims declared around it."""
        leaf = self.prior
        wrappers = ("Independent", "ExpandedDistribution", "MaskedDistribution")
        while type(leaf).__name__ in wrappers:
            leaf = leaf.base_dist
        return leaf

    @property
    def support(self) -> Any:
        """The prior's support; that of its components where it is a mixture."""
        support = self.prior.support
        while type(support).__name__ == "MixtureSameFamilyConstraint":
            support = support.base_constraint
        return support

    @property
    def to_support(self) -> Any:
        """The map from the real line onto the support."""
        return biject_to(self.support)

    @property
    def batch_shape(self) -> torch.Size:
        return self.shape[: len(self.shape) - self.event_dim]

    @property
    def event_shape(self) -> torch.Size:
        return self.shape[len(self.shape) - self.event_dim :]


@dataclass(frozen=True)
class Latents:
    """The latent sites of a model in its order, and the plates that index its data."""

    sites: dict[str, Site]
    common: tuple[Plate, ...]
    nesting: int
    like: Tensor

    @property
    def data_shape(self) -> tuple[int, ...]:
        return tuple(plate.size for plate in self.common)

    def spread(self, per_datum: Tensor, site: Site, event: bool = True) -> Tensor:
        """Values ``(K, *data)`` laid out to broadcast against a site's K values, or their log-densities."""
        shape = [len(per_datum)] + [1] * len(site.batch_shape)
        for plate, size in zip(self.common, per_datum.shape[1:], strict=True):
            assert plate.dim is not None
            shape[plate.dim] = size
        return per_datum.reshape(shape + [1] * (site.event_dim if event else 0))

    def flatten(self, value: Tensor, site: Site) -> Tensor:
        """A site's K values as ``(K, *data, elements)``."""
        count, rank = len(value), len(site.batch_shape)
        value = value.reshape(count, *site.batch_shape, *value.shape[value.dim() - site.event_dim :])
        front = [1 + rank + plate.dim for plate in self.common if plate.dim is not None]
        rest = [dim for dim in range(1, value.dim()) if dim not in front]
        return value.permute(0, *front, *rest).reshape(count, *self.data_shape, -1)

    def unflatten(self, flat: Tensor, site: Site) -> Tensor:
        """The inverse of :meth:`flatten`, whatever the number of elements of the site's event."""
        count, rank = len(flat), len(site.batch_shape)
        front = [rank + plate.dim for plate in self.common if plate.dim is not None]
        rest = [dim for dim in range(rank) if dim not in front]
        inner = [site.batch_shape[dim] for dim in rest]
        value = flat.reshape(count, *self.data_shape, *inner, *site.event_shape)
        order = [0] * rank
        for position, dim in enumerate([*front, *rest]):
            order[dim] = 1 + position
        return value.permute(0, *order, *range(1 + rank, value.dim()))

    def enter(self, names: Mapping[str, Site]) -> dict[str, Any]:
        """Plates of a run, by name."""
        found: dict[str, Any] = {}
        for site in names.values():
            for plate in site.plates:
                if plate.name not in found:
                    subsample = torch.arange(plate.size, device=self.like.device)
                    found[plate.name] = pyro.plate(plate.name, plate.full_size, subsample=subsample, dim=plate.dim)
        return found


def within(site: Site, plates: Mapping[str, Any]) -> ExitStack:
    """A site's plates, entered."""
    stack = ExitStack()
    for plate in site.plates:
        stack.enter_context(plates[plate.name])
    return stack


def latents_of(model: Program, proposal: Program, args: tuple, kwargs: Mapping[str, Any]) -> Latents:
    """Read a model's latents, with a program that can draw them.

    Raises:
        ValueError: for a model without latents, or with a subsampled plate that does not enclose all its sites.
    """
    with torch.no_grad():
        reading = read(model, proposal, args, kwargs)
    structure = reading.structure
    if not structure.latent:
        raise ValueError(f"the model has no latent site to factorise (sites: {sorted(structure.sites)})")
    partial = [plate for plate in structure.subsampled if plate not in structure.common]
    if partial:
        raise ValueError(
            f"plate '{partial[0].name}' shows {partial[0].size} of {partial[0].full_size} indices and does not enclose "
            "all sites: a posterior given a part of the data is not that given the whole. Pass the whole data"
        )
    sites = {}
    for name in structure.latent:
        prior = reading.model_trace.nodes[name]["fn"]
        plates = tuple(plate for plate in structure.sites[name].plates if plate.dim is not None)
        rank = max([-plate.dim for plate in plates if plate.dim is not None], default=0)
        batch = [1] * rank
        for plate in plates:
            assert plate.dim is not None
            batch[plate.dim] = plate.size
        sites[name] = Site(name, plates, torch.Size(batch) + prior.event_shape, prior.event_dim, prior)
    values = [value for value in reading.values.values() if value.is_floating_point()]
    like = values[0] if values else torch.zeros(())
    return Latents(sites, structure.common, structure.max_plate_nesting, like.new_zeros(()))


def support_of(site: Site) -> Tensor | None:
    """The values that an element of a discrete site can take, None where they are not finitely many numbers."""
    if not site.support.is_discrete:
        return None
    try:
        values = site.leaf.enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return values.reshape(-1) if values.numel() == len(values) else None


def size_of(site: Site) -> int:
    """How many values a discrete element can take.

    Raises:
        ValueError: for a site without a finite support.
    """
    support = support_of(site)
    if support is None:
        raise ValueError(f"site '{site.name}' ({type(site.leaf).__name__}) has no finite support to write a table of")
    return len(support)
