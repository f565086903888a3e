"""Structure of a pair of programs: sites, roles, plates, and the plates that all sites share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

from pyro_hvae.problem.cached import Bounded, cached

__all__ = [
    "PARTICLES",
    "Plate",
    "SiteInfo",
    "Structure",
    "is_deterministic",
    "is_enumerated",
    "is_factor",
    "leaf_distribution",
    "plates_of",
    "sample_sites",
    "shared_plates",
    "signature_of",
    "structure_of",
    "user_scale",
]

PARTICLES = "num_particles_vectorized"
"""Name of the plate that vectorises particles; Pyro's own estimators use the same."""

WRAPPERS = ("Independent", "ExpandedDistribution", "MaskedDistribution")


class Plate(NamedTuple):
    """A plate around a site: ``size`` of its ``full_size`` indices are present; ``dim`` is None in a loop."""

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

    ``role`` is ``"latent"`` (in the model, drawn by the guide), ``"observed"`` (in the model, with a value),
    ``"enumerated"`` (in the model, summed out), ``"auxiliary"`` (drawn in the guide alone) or ``"factor"`` (a density
    in the guide alone).  ``enumerated_in_guide`` marks a site whose values the guide enumerates, ``drawn_in_groups``
    one of which it draws ``num_samples`` values instead; ``mask_from_model``
    one that ``obs_mask`` leaves unobserved, where the guide's density takes the model's mask.  ``event_dims`` are the
    names that either program gives by ``infer={"event_dims": [...]}``.
    """

    name: str
    role: str
    plates: tuple[Plate, ...]
    has_rsample: bool
    model_distribution: str | None
    guide_distribution: str | None
    user_scaled: bool
    masked: bool
    deterministic: bool = False
    enumerated_in_guide: bool = False
    drawn_in_groups: bool = False
    mask_from_model: bool = False
    event_dims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structure:
    """Sites of a pair in the order of the model, then the guide's own; and the plates common to all.

    ``uncovered`` are latents for which the guide covers only a part of the model's support.  ``facts`` caches results
    derived for programs of this structure.  ``guide_drawn`` says that the
    sites which the guide marks for enumeration are drawn.
    """

    sites: dict[str, SiteInfo]
    common: tuple[Plate, ...]
    guide_order: tuple[str, ...]
    max_plate_nesting: int
    signature: tuple = field(repr=False)
    uncovered: tuple[str, ...] = ()
    facts: dict[Any, Any] = field(default_factory=Bounded, repr=False, compare=False)
    guide_drawn: bool = False

    def __hash__(self) -> int:
        return hash(self.signature)

    def with_role(self, role: str) -> tuple[str, ...]:
        """Return the names of the sites of a role, in the order of the programs."""
        return tuple(name for name, site in self.sites.items() if site.role == role)

    @cached
    def latent(self) -> tuple[str, ...]:
        return self.with_role("latent")

    @cached
    def observed(self) -> tuple[str, ...]:
        return self.with_role("observed")

    @cached
    def auxiliary(self) -> tuple[str, ...]:
        return self.with_role("auxiliary")

    @cached
    def enumerated(self) -> tuple[str, ...]:
        """Sites that are summed out in the model."""
        return self.with_role("enumerated")

    @cached
    def enumerated_in_guide(self) -> tuple[str, ...]:
        return tuple(name for name, site in self.sites.items() if site.enumerated_in_guide)

    @cached
    def drawn(self) -> tuple[str, ...]:
        """Sites that the guide draws: latent and auxiliary."""
        return self.latent + self.auxiliary

    @cached
    def subsampled(self) -> tuple[Plate, ...]:
        """Every subsampled plate of the pair."""
        return tuple({plate: None for site in self.sites.values() for plate in site.plates if plate.subsampled})

    @cached
    def partial(self) -> tuple[Plate, ...]:
        """Subsampled plates that do not enclose every site."""
        return tuple(plate for plate in self.subsampled if plate not in self.common)

    @cached
    def data_plates(self) -> tuple[Plate, ...]:
        """The plates that a datum indexes: those common to all sites, or else those common to the observed ones."""
        if self.common:
            return self.common
        observed = [self.sites[name] for name in self.observed]
        return shared_plates(site.plates for site in observed if site.model_distribution not in ("Unit", "Delta"))

    @cached
    def entries(self) -> int:
        """The largest number of plate indices around one site: tensor entries per draw, for the chunk rule."""
        sizes = [1]
        for site in self.sites.values():
            size = 1
            for plate in site.plates:
                size *= plate.size
            sizes.append(size)
        return max(sizes)

    @cached
    def with_guide_drawn(self) -> Structure:
        """The same structure, in which the sites that the guide enumerates are drawn."""
        sites = {name: replace(site, enumerated_in_guide=False) for name, site in self.sites.items()}
        return replace(self, sites=sites, guide_drawn=True)

    def laid_out_as(self, other: Structure) -> bool:
        """Whether runs of both structures have the same dims."""
        return (
            self.max_plate_nesting == other.max_plate_nesting
            and self.enumerated == other.enumerated
            and self.enumerated_in_guide == other.enumerated_in_guide
        )

    def require_whole(self, what: str) -> None:
        """Refuse a subsampled plate that does not enclose all sites.

        Args:
            what: the subject of the message, such as ``"the evidence"``.

        Raises:
            ValueError: naming the plate.
        """
        if self.partial:
            plate = self.partial[0]
            raise ValueError(
                f"the subsampled plate '{plate.name}' shows {plate.size} of {plate.full_size} indices and does not "
                f"enclose all sites: {what} of a part of the data is not that of the whole. Pass the whole data"
            )


def sample_sites(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield the sample sites of a trace, without the draws of subsample indices."""
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield site


def plates_of(site: Mapping[str, Any]) -> tuple[Plate, ...]:
    """Return the plates around a site, leftmost dim first, without the particle plate."""
    plates = [Plate(*frame) for frame in _frames(site)]
    return tuple(sorted(plates, key=lambda plate: (plate.dim is None, plate.dim or 0)))


def _frames(site: Mapping[str, Any]) -> tuple[tuple[str, int | None, int, int], ...]:
    return tuple(
        (f.name, f.dim, f.size, f.size if f.full_size is None or f.full_size < 0 else f.full_size)
        for f in site["cond_indep_stack"]
        if f.name != PARTICLES
    )


def signature_of(model_trace: Trace, guide_trace: Trace) -> tuple:
    """Return the properties that two runs must share to have the same structure."""
    parts: list[Any] = []
    for trace in (model_trace, guide_trace):
        for site in trace.nodes.values():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            fn, frames, infer = site["fn"], _frames(site), site["infer"]
            leaf, masked = fn, site["mask"] is not None
            while (kind := type(leaf).__name__) in WRAPPERS:
                masked = masked or kind == "MaskedDistribution"
                leaf = leaf.base_dist
            parts.append(
                (
                    site["name"],
                    site["is_observed"],
                    frames,
                    type(leaf),
                    getattr(fn, "event_shape", ()),
                    getattr(fn, "has_rsample", False),
                    masked,
                    _scaled_by_user(site["scale"], frames),
                    infer.get("enumerate"),
                    infer.get("is_auxiliary"),
                    infer.get("_deterministic"),
                )
            )
        parts.append(None)
    return tuple(parts)


def _scaled_by_user(scale: Any, frames: tuple) -> bool:
    if not isinstance(scale, (int, float)):
        return True
    plain = 1.0
    for _, _, size, full_size in frames:
        plain = plain * full_size / size if size else plain
    return abs(scale - plain) > 1e-12 * plain


def is_enumerated(site: Mapping[str, Any]) -> bool:
    """Whether a site is marked for enumeration and can be enumerated."""
    return site["infer"].get("enumerate") in ("parallel", "sequential") and not site["is_observed"]


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a site is a ``pyro.deterministic`` statement."""
    return bool(site["infer"].get("_deterministic"))


def is_factor(site: Mapping[str, Any]) -> bool:
    """Whether a site is a ``pyro.factor`` statement."""
    return type(site["fn"]).__name__ == "Unit"


def structure_of(
    model_trace: Trace,
    guide_trace: Trace,
    event_dims: Mapping[str, tuple[str, ...]] | None = None,
    uncovered: tuple[str, ...] = (),
) -> Structure:
    """Build the :class:`Structure` of two traces of one pair.

    Args:
        event_dims: names of event dims by site; a replay removes them from the model's trace.
        uncovered: see :class:`Structure`.
    """
    model_sites = {site["name"]: site for site in sample_sites(model_trace)}
    guide_sites = {site["name"]: site for site in sample_sites(guide_trace)}
    infos: dict[str, SiteInfo] = {}
    for name, site in model_sites.items():
        role = "observed" if site["is_observed"] else "latent" if name in guide_sites else "enumerated"
        borrows = role == "latent" and site["mask"] is not None and name.endswith("_unobserved")
        infos[name] = _info(name, role, site, guide_sites.get(name) if role == "latent" else None, borrows)
    for name, site in guide_sites.items():
        if name not in infos and site["is_observed"]:
            infos[name] = _info(name, "factor", None, site)
        elif name not in infos:
            unobserved = infos.get(name.removesuffix("_unconstrained"))
            infos[name] = _info(name, "auxiliary", None, site, unobserved is not None and unobserved.mask_from_model)
    for name, names in ({} if event_dims is None else event_dims).items():
        if name in infos:
            infos[name] = replace(infos[name], event_dims=names)
    dims = [plate.dim for info in infos.values() for plate in info.plates if plate.dim is not None]
    return Structure(
        sites=infos,
        common=_common_plates(infos, guide_sites),
        guide_order=tuple(guide_sites),
        max_plate_nesting=-min(dims, default=0),
        signature=signature_of(model_trace, guide_trace),
        uncovered=uncovered,
    )


def _info(
    name: str,
    role: str,
    model_site: dict[str, Any] | None,
    guide_site: dict[str, Any] | None,
    borrows: bool = False,
) -> SiteInfo:
    site = model_site if model_site is not None else guide_site
    assert site is not None
    present = [s for s in (model_site, guide_site) if s is not None]
    return SiteInfo(
        name=name,
        role=role,
        plates=plates_of(site),
        has_rsample=bool(guide_site is None or guide_site["fn"].has_rsample),
        model_distribution=None if model_site is None else type(leaf_distribution(model_site["fn"])).__name__,
        guide_distribution=None if guide_site is None else type(leaf_distribution(guide_site["fn"])).__name__,
        user_scaled=any(_scaled_by_user(s["scale"], _frames(s)) for s in present),
        masked=any(s["mask"] is not None for s in present),
        deterministic=role in ("observed", "factor") and is_deterministic(site),
        enumerated_in_guide=guide_site is not None and is_enumerated(guide_site),
        drawn_in_groups=guide_site is not None and guide_site["infer"].get("num_samples") is not None,
        mask_from_model=borrows,
    )


def leaf_distribution(fn: Any) -> Any:
    """Return a distribution without the wrappers that expand, mask and declare event dims."""
    while type(fn).__name__ in WRAPPERS:
        fn = fn.base_dist
    return fn


def user_scale(site: Mapping[str, Any], outside: tuple[Plate, ...]) -> Any:
    """Return the scale of a site without that of the plates ``outside``; 1.0 where nothing else scales it."""
    scale = site["scale"]
    for plate in outside:
        if plate.subsampled:
            scale = scale / plate.scale
    if isinstance(scale, float) and abs(scale - 1.0) < 1e-12:
        return 1.0
    return scale


def _common_plates(infos: dict[str, SiteInfo], guide_sites: dict[str, dict[str, Any]]) -> tuple[Plate, ...]:
    """Return the plates around every site that has a density.  A guide may rename its plate, but not resize it."""
    counted = [info for info in infos.values() if info.role not in ("auxiliary", "factor") and not info.deterministic]
    common = shared_plates(info.plates for info in counted)
    for site in guide_sites.values():
        if site["is_observed"] and is_deterministic(site):
            continue
        present = {(plate.dim, plate.size, plate.full_size) for plate in plates_of(site)}
        common = tuple(plate for plate in common if (plate.dim, plate.size, plate.full_size) in present)
    return common


def shared_plates(stacks: Iterable[Iterable[Plate]]) -> tuple[Plate, ...]:
    """Return the plates with a dim that are in every stack, leftmost first."""
    sets = [set(stack) for stack in stacks]
    shared = set.intersection(*sets) if sets else set()
    return tuple(sorted((plate for plate in shared if plate.dim is not None), key=lambda plate: plate.dim or 0))
