"""What a pair of traces consists of: sites, roles, plates, and the plates that all sites share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

__all__ = ["PARTICLES", "Plate", "SiteInfo", "Structure", "sample_sites", "signature", "structure_of"]

PARTICLES = "num_particles_vectorized"
"""Name of the plate that vectorises particles, as Pyro's own estimators call it."""


class Plate(NamedTuple):
    """A plate as a site sees it: ``size`` indices are present out of ``full_size``."""

    name: str
    dim: int | None
    size: int
    full_size: int

    @property
    def subsampled(self) -> bool:
        return self.size != self.full_size

    @property
    def scale(self) -> float:
        return self.full_size / self.size


@dataclass(frozen=True)
class SiteInfo:
    """One sample site of the pair.

    ``role`` is ``"latent"`` (in the model, drawn by the guide), ``"observed"`` (in the model, given),
    ``"enumerated"`` (in the model, summed out) or ``"auxiliary"`` (in the guide alone).  ``event_dims`` are the names
    that either program gives by ``infer={"event_dims": [...]}``.
    """

    name: str
    role: str
    plates: tuple[Plate, ...]
    has_rsample: bool
    model_distribution: str | None
    guide_distribution: str | None
    user_scaled: bool
    masked: bool
    event_dims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structure:
    """Sites of a pair in the order of the model, then the guide's own; and the plates common to all."""

    sites: dict[str, SiteInfo]
    common: tuple[Plate, ...]
    guide_order: tuple[str, ...]
    max_plate_nesting: int
    signature: tuple = field(repr=False)

    @cached_property
    def latent(self) -> tuple[str, ...]:
        return tuple(name for name, site in self.sites.items() if site.role == "latent")

    @cached_property
    def observed(self) -> tuple[str, ...]:
        return tuple(name for name, site in self.sites.items() if site.role == "observed")

    @cached_property
    def auxiliary(self) -> tuple[str, ...]:
        return tuple(name for name, site in self.sites.items() if site.role == "auxiliary")

    @cached_property
    def drawn(self) -> tuple[str, ...]:
        """Sites that the guide draws: latent and auxiliary."""
        return self.latent + self.auxiliary

    @cached_property
    def subsampled(self) -> tuple[Plate, ...]:
        """Every subsampled plate of the pair."""
        return tuple({plate: None for site in self.sites.values() for plate in site.plates if plate.subsampled})


def sample_sites(trace: Trace) -> Iterator[dict[str, Any]]:
    """The sample sites of a trace, without the draws of subsample indices."""
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield site


def plates_of(site: dict[str, Any]) -> tuple[Plate, ...]:
    """The plates around a site, leftmost dimension first, without the particle plate."""
    plates = []
    for frame in site["cond_indep_stack"]:
        if frame.name == PARTICLES:
            continue
        full_size = frame.size if frame.full_size is None or frame.full_size < 0 else frame.full_size
        plates.append(Plate(frame.name, frame.dim, frame.size, full_size))
    return tuple(sorted(plates, key=lambda plate: (plate.dim is None, plate.dim or 0)))


def signature(model_trace: Trace, guide_trace: Trace) -> tuple:
    """A hashable value that two runs share exactly when their sites and plates are the same."""
    return tuple(
        tuple((s["name"], s["is_observed"], s["cond_indep_stack"]) for s in sample_sites(trace))
        for trace in (model_trace, guide_trace)
    )


def is_enumerated(site: dict[str, Any]) -> bool:
    return site["infer"].get("enumerate") == "parallel" and not site["is_observed"]


def structure_of(
    model_trace: Trace, guide_trace: Trace, event_dims: Mapping[str, tuple[str, ...]] | None = None
) -> Structure:
    """Build the :class:`Structure` of two traces of one pair.

    Args:
        event_dims: names of event dims by site, which a replay has taken off the model's trace.

    Raises:
        ValueError: if a latent site of the model has no draw in the guide, or the guide has a site that the
            model lacks and that is not marked ``infer={"is_auxiliary": True}``.
    """
    model_sites = {site["name"]: site for site in sample_sites(model_trace)}
    guide_sites = {site["name"]: site for site in sample_sites(guide_trace)}
    _check_match(model_sites, guide_sites)

    infos: dict[str, SiteInfo] = {}
    for name, site in model_sites.items():
        if site["is_observed"]:
            role = "observed"
        else:
            role = "latent" if name in guide_sites else "enumerated"
        infos[name] = _info(name, role, site, guide_sites.get(name) if role == "latent" else None)
    for name, site in guide_sites.items():
        if name not in infos:
            infos[name] = _info(name, "auxiliary", None, site)
    for name, names in ({} if event_dims is None else event_dims).items():
        if name in infos:
            infos[name] = replace(infos[name], event_dims=names)

    dims = [plate.dim for info in infos.values() for plate in info.plates if plate.dim is not None]
    return Structure(
        sites=infos,
        common=_common_plates(infos, guide_sites),
        guide_order=tuple(guide_sites),
        max_plate_nesting=-min(dims, default=0),
        signature=signature(model_trace, guide_trace),
    )


def _info(name: str, role: str, model_site: dict[str, Any] | None, guide_site: dict[str, Any] | None) -> SiteInfo:
    site = model_site if model_site is not None else guide_site
    assert site is not None
    plates = plates_of(site)
    present = [s for s in (model_site, guide_site) if s is not None]
    return SiteInfo(
        name=name,
        role=role,
        plates=plates,
        has_rsample=bool(guide_site is None or guide_site["fn"].has_rsample),
        model_distribution=None if model_site is None else _describe(model_site["fn"]),
        guide_distribution=None if guide_site is None else _describe(guide_site["fn"]),
        user_scaled=any(not _is_one(user_scale(s, plates_of(s))) for s in present),
        masked=any(s["mask"] is not None for s in present),
    )


def _describe(fn: Any) -> str:
    while type(fn).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__


def user_scale(site: dict[str, Any], outside: tuple[Plate, ...]) -> Any:
    """The scale of a site without that of the plates ``outside``; exactly 1.0 where nothing else scales it."""
    scale = site["scale"]
    for plate in outside:
        if plate.subsampled:
            scale = scale / plate.scale
    if isinstance(scale, float) and abs(scale - 1.0) < 1e-12:
        return 1.0
    return scale


def _is_one(scale: Any) -> bool:
    return isinstance(scale, (int, float)) and scale == 1.0


def _common_plates(infos: dict[str, SiteInfo], guide_sites: dict[str, dict[str, Any]]) -> tuple[Plate, ...]:
    """Plates around every site.  A guide may give its plate another name, not another dimension or size."""
    # An observation that a mask or an empty plate leaves without a plate of its own still counts as a site.
    stacks = [set(info.plates) for info in infos.values() if info.role != "auxiliary"]
    common = set.intersection(*stacks) if stacks else set()
    common = {plate for plate in common if plate.dim is not None}
    for site in guide_sites.values():
        present = {(plate.dim, plate.size, plate.full_size) for plate in plates_of(site)}
        common = {plate for plate in common if (plate.dim, plate.size, plate.full_size) in present}
    return tuple(sorted(common, key=lambda plate: plate.dim or 0))


def _check_match(model_sites: dict[str, Any], guide_sites: dict[str, Any]) -> None:
    latent = {name for name, site in model_sites.items() if not site["is_observed"]}
    missing = {name for name in latent - set(guide_sites) if not is_enumerated(model_sites[name])}
    observed_by_guide = {name for name, site in guide_sites.items() if site["is_observed"] and not _is_factor(site)}
    extra = {
        name
        for name, site in guide_sites.items()
        if name not in latent and not site["infer"].get("is_auxiliary") and not site["is_observed"]
    }
    if missing or extra or (observed_by_guide & latent):
        lines = ["model and guide do not have the same latent sites:"]
        if missing:
            lines.append(f"  the guide draws nothing for the model's {sorted(missing)}")
        if extra:
            lines.append(
                f"  the model has no latent site {sorted(extra)} that the guide draws"
                ' (a guide\'s own variable needs infer={"is_auxiliary": True})'
            )
        if observed_by_guide & latent:
            lines.append(f"  the guide observes {sorted(observed_by_guide & latent)}, which the model leaves latent")
        lines.append(f"  latent in the model: {sorted(latent)}; drawn by the guide: {sorted(guide_sites)}")
        raise ValueError("\n".join(lines))


def _is_factor(site: dict[str, Any]) -> bool:
    return type(site["fn"]).__name__ in ("Unit", "Delta")
