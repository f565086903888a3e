"""Latent sites of a model for the factors of a product: plates, shapes, supports, and their layout."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_hvae.problem import Layout, Plate, Problem
from pyro_hvae.problem.plates import batch_shape_of
from pyro_hvae.problem.structure import leaf_distribution

__all__ = ["Latents", "Site", "entered", "latents_of", "same_support", "size_of", "support_of"]


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
        return leaf_distribution(self.prior)

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
    """The latent sites of a model in its order, and the plates that index its data.

    ``like`` is a number of the dtype and device that factors take.
    """

    sites: dict[str, Site]
    common: tuple[Plate, ...]
    like: Tensor

    @property
    def data_shape(self) -> tuple[int, ...]:
        return tuple(plate.size for plate in self.common)

    def elements(self, site: Site) -> int:
        """Return the number of elements of a site that belong to one datum."""
        inner = torch.Size(plate.size for plate in site.plates if plate not in self.common)
        return inner.numel() * site.event_shape.numel()

    def spread(self, per_datum: Tensor, site: Site, event: bool = True) -> Tensor:
        """Reshape values ``(K, *data)`` so that they broadcast against a site's K values, or their log-densities."""
        layout = Layout(len(site.batch_shape), len(per_datum))
        return layout.spread(per_datum, self.common, site.event_dim if event else 0)

    def flatten(self, value: Tensor, site: Site) -> Tensor:
        """Reshape a site's K values to ``(K, *data, elements)``."""
        event_shape = value.shape[value.dim() - site.event_dim :]
        value = Layout(len(site.batch_shape), len(value)).put(value, site.plates, event_shape)
        order = self._common_first(site)
        value = value.permute(0, *(1 + place for place in order), *range(1 + len(order), value.dim()))
        return value.reshape(len(value), *self.data_shape, -1)

    def unflatten(self, flat: Tensor, site: Site) -> Tensor:
        """Invert :meth:`flatten`: ``(K, *site.shape)``."""
        order = self._common_first(site)
        value = flat.reshape(len(flat), *(site.plates[place].size for place in order), *site.event_shape)
        back = [1 + order.index(place) for place in range(len(order))]
        value = value.permute(0, *back, *range(1 + len(order), value.dim()))
        return value.reshape(len(flat), *site.shape)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Split concatenated elements of all sites ``(K, *data, D)`` into values by site ``(K, *site.shape)``."""
        parts = flat.split([self.elements(site) for site in self.sites.values()], -1)
        return {name: self.unflatten(part, site) for (name, site), part in zip(self.sites.items(), parts, strict=True)}

    def places(self) -> dict[str, range]:
        """Return the range of each site in the concatenated elements of all sites."""
        ranges, start = {}, 0
        for name, site in self.sites.items():
            ranges[name] = range(start, start + self.elements(site))
            start += len(ranges[name])
        return ranges

    def _common_first(self, site: Site) -> list[int]:
        common = [site.plates.index(plate) for plate in self.common]
        return common + [place for place in range(len(site.plates)) if place not in common]

    def plates(self) -> dict[str, Any]:
        """Return Pyro's plates around the sites, by name."""
        plates: dict[str, Any] = {}
        for plate in (plate for site in self.sites.values() for plate in site.plates):
            if plate.name not in plates:
                subsample = torch.arange(plate.size, device=self.like.device)
                plates[plate.name] = pyro.plate(plate.name, plate.full_size, subsample=subsample, dim=plate.dim)
        return plates


def entered(site: Site, plates: Mapping[str, Any]) -> ExitStack:
    """Enter a site's plates."""
    stack = ExitStack()
    for plate in site.plates:
        stack.enter_context(plates[plate.name])
    return stack


def latents_of(problem: Problem) -> Latents:
    """Return the latents of a problem, whose guide must draw them.

    Raises:
        ValueError: for a model without latents, with a subsampled plate that does not enclose all its sites, or with
            one that draws its indices at random.
    """
    with torch.no_grad():
        run = problem.run()
    structure = run.structure
    if not structure.latent:
        raise ValueError(f"the model has no latent site to factorise (sites: {sorted(structure.sites)})")
    structure.require_whole("a posterior")
    if run.call.indices:
        raise ValueError(
            f"plate(s) {sorted(run.call.indices)} draw another minibatch at each call, and a product approximates the "
            "posterior of one: pass the minibatch as data, and give its indices to the plate as subsample="
        )
    sites = {}
    for name in structure.latent:
        prior = run.model_trace.nodes[name]["fn"]
        plates = tuple(plate for plate in structure.sites[name].plates if plate.dim is not None)
        shape = torch.Size(batch_shape_of(plates)) + prior.event_shape
        sites[name] = Site(name, plates, shape, prior.event_dim, prior)
    real = [value for value in run.values.values() if value.is_floating_point()]
    like = real[0] if real else run.log_weights  # of discrete latents, the log-weights have the dtype
    return Latents(sites, structure.common, like.detach().new_zeros(()))


def support_of(site: Site) -> Tensor | None:
    """Return the values of an element of a discrete site, None where they are not finitely many numbers."""
    if not site.support.is_discrete:
        return None
    try:
        values = site.leaf.enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return values.reshape(-1) if values.numel() == len(values) else None


def size_of(site: Site) -> int:
    """Return the number of values of a discrete element.

    Raises:
        ValueError: for a site without a finite support.
    """
    support = support_of(site)
    if support is None:
        raise ValueError(f"site '{site.name}' ({type(site.leaf).__name__}) has no finite support, which a table needs")
    return len(support)


def same_support(first: Any, second: Any) -> bool:
    """Whether two constraints have the same type and the same bounds."""
    if isinstance(first, torch.distributions.constraints.Constraint):
        attributes = vars(first)
        return type(first) is type(second) and all(
            same_support(value, vars(second).get(name)) for name, value in attributes.items()
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same_support(*pair) for pair in zip(first, second, strict=True))
    if isinstance(first, (Tensor, int, float)) and isinstance(second, (Tensor, int, float)):
        try:
            return not bool((torch.as_tensor(first) != torch.as_tensor(second)).any())
        except RuntimeError:  # bounds of shapes that do not broadcast
            return False
    return first is second or type(first) is type(second)
