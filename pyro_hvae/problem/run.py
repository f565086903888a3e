"""One run of a pair, reduced to log-weights per datum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyro_hvae.problem.cached import cached
from pyro_hvae.problem.enumeration import Enumerated
from pyro_hvae.problem.execute import Call
from pyro_hvae.problem.isolation import RUNNING
from pyro_hvae.problem.parameters import frozen, trainable
from pyro_hvae.problem.plates import Layout, LayoutError
from pyro_hvae.problem.states import draw_states
from pyro_hvae.problem.structure import Plate, Structure, sample_sites, user_scale

__all__ = ["Run", "total"]


class Run:
    """K draws of a guide with log p and log q of every site and datum, reduced on demand.

    Tensors have shape ``(K, *plates)``: particles, then the plates that index a datum (``(K,)`` if there are none).
    Values are in nats.  Gradients flow to the parameters and through the draws, unless the run was made under
    :func:`torch.no_grad`.

    Attributes:
        model_trace, guide_trace: Pyro's traces.
        structure: of the pair.
        plates: the plates that index a datum; by default those common to all sites.
    """

    def __init__(
        self,
        model_trace: Trace,
        guide_trace: Trace,
        structure: Structure,
        call: Call,
        plates: tuple[Plate, ...] | None = None,
        held: Sequence[Tensor] = (),
    ) -> None:
        self.model_trace = model_trace
        self.guide_trace = guide_trace
        self.structure = structure
        self.call = call
        self.num_particles = call.num_particles
        self.plates = structure.common if plates is None else plates
        self._held = held  # parameters that stay without gradient when a density is evaluated

    @property
    def layout(self) -> Layout:
        """Dims of the run's tensors."""
        return self.call.layout

    @property
    def shape(self) -> tuple[int, ...]:
        """``(K, *plates)``."""
        return (self.num_particles, *(plate.size for plate in self.plates))

    @property
    def scale(self) -> float:
        """N/B of the plates that a datum indexes; it multiplies the sum over the data, outside of the weights."""
        scale = 1.0
        for plate in self.plates:
            scale *= plate.scale
        return scale

    @cached
    def values(self) -> dict[str, Tensor]:
        """The guide's draws; a leading dim of size K where ``num_particles`` is above one."""
        drawn = set(self.structure.drawn)
        return {site["name"]: site["value"] for site in sample_sites(self.guide_trace) if site["name"] in drawn}

    @cached
    def log_p(self) -> Mapping[str, Tensor]:
        """log p of each site of the model given its parents.

        Sites that share a summed-out variable are one term under their joined names.  Where the guide enumerates a
        site, each term is the exact expectation over it.
        """
        return _SiteTerms(self._twin(), self.model_trace) if self._enumerated is None else self._enumerated.log_p(self)

    @cached
    def log_q(self) -> Mapping[str, Tensor]:
        """log q of each site of the guide given its parents; in expectation over sites that the guide enumerates."""
        return _SiteTerms(self._twin(), self.guide_trace)

    @cached
    def log_ratios(self) -> Tensor:
        """log p(x, z) - log q(z|x), in expectation over sites that the guide enumerates; shape ``(K, *plates)``."""
        summed: Any = torch.zeros(())
        if self.log_p:
            summed = total(self.log_p)
        if self.log_q:
            summed = summed - total(self.log_q)
        return self.shaped(summed)

    @cached
    def log_weights(self) -> Tensor:
        """Logarithms of weights whose expectation is p(x), shape ``(K, *plates)``.

        They are :attr:`log_ratios`, unless the guide enumerates a site: then weights are summed over its values, each
        with its own draws at the other sites.
        """
        if self._enumerated is None or not self.structure.enumerated_in_guide:
            return self.log_ratios
        return self.shaped(self._enumerated.log_weights(self))

    def log_p_alone(self, name: str) -> Tensor | None:
        """Return log p of one site of the model in its own plates, ``(K, *plates)``; None if it is not separate.

        That is so where it is summed together with other sites, or over states that its plates share.
        """
        site, plates = self.model_trace.nodes[name], self.structure.sites[name].plates
        within = self.over(tuple(plate for plate in plates if plate.dim is not None))
        value = within.log_prob(site) if self._enumerated is None else self._enumerated.log_p_alone(within, name)
        return None if value is None else within.shaped(value)

    def draw_states(self) -> dict[str, Tensor]:
        """Draw the sites that the model sums out from their posterior given the guide's draws, jointly.

        Raises:
            ValueError: where no state has a positive probability.
        """
        return {} if self._enumerated is None or not self.structure.enumerated else draw_states(self._enumerated)

    def _twin(self) -> Run:
        """Return the same run without its results: terms that held the run itself would keep it alive in a cycle."""
        twin = self.over(self.plates)
        vars(twin)["_enumerated"] = self._enumerated
        return twin

    @cached
    def _enumerated(self) -> Enumerated | None:
        structure = self.structure
        if not (structure.enumerated or structure.enumerated_in_guide):
            return None
        return Enumerated(self.model_trace, self.guide_trace, structure)

    def shaped(self, summed: Tensor) -> Tensor:
        """Expand a sum of terms to ``(K, *plates)``."""
        return summed if summed.shape == self.shape else summed.expand(self.shape)

    def log_prob(self, site: dict[str, Any]) -> Tensor:
        """Return the log-density of one site: with masks and user scales, without the scale of the datum's plates."""
        if site["mask"] is False:
            return self._zero(site)
        with RUNNING, frozen(self._held) if self._held else nullcontext():
            value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        self.check_rank(site, value)
        return self.weigh(site, value)

    def check_rank(self, site: dict[str, Any], value: Tensor) -> None:
        """Refuse a log-density with more dims than particles, plates and enumerated variables have."""
        rank = self.layout.rank
        if self._enumerated is not None:
            rank = self._enumerated.rank(site, rank)
        if value.dim() > rank and any(size > 1 for size in value.shape[: value.dim() - rank]):
            raise LayoutError(
                f"site '{site['name']}' has batch shape {tuple(value.shape)} for {self.num_particles} particles where "
                f"the plates give {rank} dim(s): its parameters carry the event of a site outside of a "
                "plate, whose shape is (particles, 1 for each plate, *event), as batch dims. Write .to_event(...) "
                "instead of the plate, or move the event into it, as in value.squeeze(-2)"
            )

    def mask_of(self, site: dict[str, Any]) -> Any:
        """Return the mask of a site; for a guide's draw of entries that ``obs_mask`` leaves unobserved, the model's."""
        info = self.structure.sites.get(site["name"])
        if info is not None and info.mask_from_model and site["mask"] is None:
            return self.model_trace.nodes[site["name"].removesuffix("_unconstrained")]["mask"]
        return site["mask"]

    def weigh(self, site: dict[str, Any], value: Tensor) -> Tensor:
        """Apply a site's mask and scales to a tensor of its batch shape, and reduce it."""
        outside = tuple(plate for plate in self.plates if plate.subsampled and _encloses(plate, site))
        scale, mask = user_scale(site, outside), self.mask_of(site)
        if mask is not None or not (isinstance(scale, float) and scale == 1.0):
            value = scale_and_mask(value, scale, mask)
        if self.structure.enumerated_in_guide:
            assert self._enumerated is not None
            value = self._enumerated.expectation(site, value)
        return self.layout.reduce(value, self.plates)

    def _zero(self, site: dict[str, Any]) -> Tensor:
        value = site["value"]
        dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        return value.new_zeros((1,) * (len(self.plates) + 1), dtype=dtype)

    def score_log_q(self) -> Tensor | None:
        """Sum log q over the draws that can't be reparameterised, without any scale; None if there is none.

        A score-function gradient differentiates this density, so it has neither a plate's nor a user's scale.

        Raises:
            ValueError: for such a draw that depends on a site which the guide enumerates.
        """
        summed = None
        for site in sample_sites(self.guide_trace):
            if site["is_observed"] or site["fn"].has_rsample or site["infer"].get("_enumerate_dim") is not None:
                continue
            term = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            if self._enumerated is not None and self.structure.enumerated_in_guide:
                self._enumerated.refuse_downstream(site, term)
            mask = self.mask_of(site)
            if mask is not None:
                term = scale_and_mask(term, 1.0, mask)
            term = self.layout.reduce(term, self.plates)
            summed = term if summed is None else summed + term
        return summed

    def replay(self, *, freeze: bool, detach: bool) -> Run:
        """Evaluate both programs again on the same draws.

        Args:
            freeze: stop the gradient at the parameters of model and guide; the paths from layer to layer keep theirs.
            detach: stop the gradient at the draws.
        """
        named = (self.model_trace, self.guide_trace) if freeze else ()
        model_trace, guide_trace = self.call.replayed(self.guide_trace, freeze=named, detach=detach)
        held: list[Tensor] = []
        if freeze:
            held = trainable(self.call.programs.model, self.call.programs.guide, *named)
            for site in sample_sites(guide_trace):
                _clear_caches(site["fn"])
        return Run(model_trace, guide_trace, self.structure, self.call, self.plates, held)

    def over(self, plates: tuple[Plate, ...]) -> Run:
        """Return the same run, with ``plates`` as the data."""
        return Run(self.model_trace, self.guide_trace, self.structure, self.call, plates, self._held)


def _clear_caches(fn: Any) -> None:
    """Clear the caches of flows: they hold the last draw with its gradient."""
    while fn is not None:
        clear = getattr(fn, "clear_cache", None)
        if clear is not None:
            clear()
        fn = getattr(fn, "base_dist", None)


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Sum the log-densities of a program's sites."""
    parts = iter(terms.values())
    return sum(parts, start=next(parts))


class _SiteTerms(Mapping[str, Tensor]):
    """The log-densities of a trace's sites, each computed once, when it is asked for."""

    def __init__(self, run: Run, trace: Trace) -> None:
        self._run = run
        self._sites = {site["name"]: site for site in sample_sites(trace)}
        self._terms: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._terms:
            self._terms[name] = self._run.log_prob(self._sites[name])
        return self._terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def _encloses(plate: Plate, site: Mapping[str, Any]) -> bool:
    return any(frame.dim == plate.dim and frame.size == plate.size for frame in site["cond_indep_stack"])

