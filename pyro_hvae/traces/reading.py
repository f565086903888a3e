"""Reduce the traces of one run of a pair to log-weights per datum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyro_hvae.traces.enumeration import marginalise
from pyro_hvae.traces.structure import (
    Plate,
    Structure,
    sample_sites,
    user_scale,
)

__all__ = ["Reading", "total"]

Program = Callable[..., Any]


class Reading:
    """One run of a pair, reduced on demand.

    Tensors have shape ``(K, *plates)``: particles, then the plates common to all sites (``(K,)`` if there are
    none).  Values are in nats.  Gradients flow to the parameters and through the draws, unless the run was made
    under :func:`torch.no_grad`.
    """

    def __init__(
        self,
        model_trace: Trace,
        guide_trace: Trace,
        structure: Structure,
        num_particles: int,
        rerun: Callable[..., tuple[Trace, Trace]],
        plates: tuple[Plate, ...] | None = None,
    ) -> None:
        self.model_trace = model_trace
        self.guide_trace = guide_trace
        self.structure = structure
        self.num_particles = num_particles
        self.plates = structure.common if plates is None else plates
        self._rerun = rerun

    @property
    def scale(self) -> float:
        """N/B of the plates that a datum indexes: what multiplies the sum over the data, outside of the weights."""
        scale = 1.0
        for plate in self.plates:
            scale *= plate.scale
        return scale

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """What the guide drew; a leading dimension of size K where ``num_particles`` is above one."""
        drawn = set(self.structure.drawn)
        return {site["name"]: site["value"] for site in sample_sites(self.guide_trace) if site["name"] in drawn}

    @cached_property
    def log_p(self) -> Mapping[str, Tensor]:
        """log p of each site of the model, given its parents; evaluated when looked up."""
        if any(site.role == "enumerated" for site in self.structure.sites.values()):
            return marginalise(self.model_trace, self.structure, self.reduce, self.plates)
        return _SiteTerms(self, self.model_trace)

    @cached_property
    def log_q(self) -> Mapping[str, Tensor]:
        """log q of each site of the guide, given its parents; evaluated when looked up."""
        return _SiteTerms(self, self.guide_trace)

    @cached_property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z|x), shape ``(K, *plates)``."""
        return self._total(self.log_p) - self._total(self.log_q)

    def log_prob(self, site: dict[str, Any]) -> Tensor:
        """Log-density of one site of a trace: user scale and masks in, scale of the datum's plates out."""
        if site["mask"] is False:
            return self._zero(site)
        value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        rank = self.structure.max_plate_nesting + (self.num_particles > 1)
        if value.dim() > rank and any(size > 1 for size in value.shape[: value.dim() - rank]):
            raise ValueError(
                f"site '{site['name']}' has batch shape {tuple(value.shape)} for {self.num_particles} particles where "
                f"the plates leave room for {rank} dim(s): its parameters carry the event of a site outside of a "
                "plate, whose shape is (particles, 1 for each plate, *event), as batch dims. Say .to_event(...) "
                "instead of the plate, or move the event into it, as in value.squeeze(-2)"
            )
        return self.weigh(site, value)

    def weigh(self, site: dict[str, Any], value: Tensor) -> Tensor:
        """Apply a site's mask and scales to a tensor of its batch shape, and reduce it."""
        outside = tuple(plate for plate in self.plates if plate.subsampled and _encloses(plate, site))
        scale = user_scale(site, outside)
        if site["mask"] is not None or not (isinstance(scale, float) and scale == 1.0):
            value = scale_and_mask(value, scale, site["mask"])
        return self.reduce(value)

    def _zero(self, site: dict[str, Any]) -> Tensor:
        value = site["value"]
        dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        return torch.zeros((1,) * (len(self.plates) + 1), dtype=dtype, device=value.device)

    def reduce(self, value: Tensor) -> Tensor:
        """Sum a tensor of batch shape over all dimensions but the particles' and the datum's plates."""
        particles = self.num_particles > 1
        rank = self.structure.max_plate_nesting + particles
        if value.dim() < rank:
            value = value.reshape((1,) * (rank - value.dim()) + value.shape)
        keep = {plate.dim for plate in self.plates} | ({-rank} if particles else set())
        dims = [dim for dim in range(-value.dim(), 0) if dim not in keep]
        if dims:
            value = value.sum(dims)
        return value if particles else value.unsqueeze(0)

    def score_log_q(self) -> Tensor | None:
        """Sum of log q over the sites that can't be reparameterised, in no scale at all; None if there is none.

        It is the density that a score-function gradient differentiates, so neither a plate's nor a user's scale
        belongs in it.
        """
        total = None
        for site in sample_sites(self.guide_trace):
            if site["is_observed"] or site["fn"].has_rsample:
                continue
            term = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            if site["mask"] is not None:
                term = scale_and_mask(term, 1.0, site["mask"])
            term = self.reduce(term)
            total = term if total is None else total + term
        return total

    def replay(self, *, freeze: bool, detach: bool) -> Reading:
        """Evaluate both programs again on the same draws.

        Args:
            freeze: stop the gradient at the parameters of model and guide; the paths from layer to layer stay.
            detach: stop the gradient at the draws.
        """
        named_in = (self.model_trace, self.guide_trace) if freeze else ()
        model_trace, guide_trace = self._rerun(self.guide_trace, freeze=named_in, detach=detach)
        return Reading(model_trace, guide_trace, self.structure, self.num_particles, self._rerun, self.plates)

    def over(self, plates: tuple[Plate, ...]) -> Reading:
        """The same run, with ``plates`` as the data."""
        return Reading(self.model_trace, self.guide_trace, self.structure, self.num_particles, self._rerun, plates)

    def _total(self, terms: Mapping[str, Tensor]) -> Tensor:
        # A program without sites of its own, such as the guide of a model without latents, weighs nothing.
        summed = total(terms) if terms else self._zero(next(sample_sites(self.model_trace)))
        shape = (self.num_particles, *(plate.size for plate in self.plates))
        return summed if summed.shape == shape else summed.expand(shape)


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of the log-densities of a program's sites."""
    parts = iter(terms.values())
    return sum(parts, start=next(parts))


class _SiteTerms(Mapping[str, Tensor]):
    """The log-densities of a trace's sites, each computed once, when it is asked for."""

    def __init__(self, reading: Reading, trace: Trace) -> None:
        self._reading = reading
        self._sites = {site["name"]: site for site in sample_sites(trace)}
        self._terms: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._terms:
            self._terms[name] = self._reading.log_prob(self._sites[name])
        return self._terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def _encloses(plate: Plate, site: dict[str, Any]) -> bool:
    return any(frame.dim == plate.dim and frame.size == plate.size for frame in site["cond_indep_stack"])
