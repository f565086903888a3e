"""Compare the sites of a model with those of its guide: names, supports, event shapes, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine import Trace

from pyro_hvae import devices
from pyro_hvae.problem.structure import (
    is_deterministic,
    is_enumerated,
    is_factor,
    leaf_distribution,
    sample_sites,
)
from pyro_hvae.problem.supports import bare_support, reached, vanishes

__all__ = ["compare_programs"]

Site = Mapping[str, Any]


def compare_programs(model_trace: Trace, guide_trace: Trace) -> tuple[str, ...]:
    """Refuse a pair whose sites do not match.

    Returns:
        Names of latents for which the guide covers only a part of the model's support.

    Raises:
        ValueError: if the two programs seem to be swapped; if a latent site of the model has no draw in the guide, or
            the guide has a site that the model lacks and that is not marked ``infer={"is_auxiliary": True}``; if a
            site's event shapes, supports or masks differ.
    """
    model_sites = {site["name"]: site for site in sample_sites(model_trace)}
    guide_sites = {site["name"]: site for site in sample_sites(guide_trace)}
    _check_roles(model_sites, guide_sites)
    _check_names(model_sites, guide_sites)
    uncovered = []
    for name, guide_site in guide_sites.items():
        model_site = model_sites.get(name)
        if model_site is None or model_site["is_observed"]:
            continue
        _check_event(name, model_site, guide_site)
        if not _check_support(name, model_site, guide_site):
            uncovered.append(name)
        _check_mask(name, model_site, guide_site, borrows_mask(name, model_sites, guide_sites))
    return tuple(uncovered)


def _check_roles(model_sites: Mapping[str, Site], guide_sites: Mapping[str, Site]) -> None:
    observed = [name for name, site in guide_sites.items() if _is_likelihood(site)]
    if not observed:
        return
    if any(_is_likelihood(site) for site in model_sites.values()):
        advice = "a guide draws the latents and observes nothing: remove obs=, or mark a density by pyro.factor"
    else:
        advice = "model and guide seem to be swapped: the model, which observes the data, comes first"
    raise ValueError(f"the guide observes {observed}: {advice}")


def _is_likelihood(site: Site) -> bool:
    return bool(site["is_observed"]) and not is_factor(site) and not is_deterministic(site)


def _check_names(model_sites: Mapping[str, Site], guide_sites: Mapping[str, Site]) -> None:
    latent = {name for name, site in model_sites.items() if not site["is_observed"]}
    missing = {name for name in latent - set(guide_sites) if not is_enumerated(model_sites[name])}
    extra = {
        name
        for name, site in guide_sites.items()
        if name not in latent and not site["infer"].get("is_auxiliary") and not site["is_observed"]
    }
    if not (missing or extra):
        return
    lines = ["model and guide do not have the same latent sites:"]
    if missing:
        lines.append(f"  the guide draws nothing for the model's {sorted(missing)}")
    if extra:
        lines.append(
            f"  the model has no latent site {sorted(extra)} that the guide draws"
            ' (a guide\'s own variable needs infer={"is_auxiliary": True})'
        )
    lines.append(f"  latent in the model: {sorted(latent)}; drawn by the guide: {sorted(guide_sites)}")
    raise ValueError("\n".join(lines))


def _check_event(name: str, model_site: Site, guide_site: Site) -> None:
    in_model, in_guide = (tuple(site["fn"].event_shape) for site in (model_site, guide_site))
    if in_model != in_guide:
        raise ValueError(
            f"site '{name}' has event shape {in_model} in the model and {in_guide} in the guide: declare the same "
            "event dims in both, as in .to_event(1)"
        )


def _check_support(name: str, model_site: Site, guide_site: Site) -> bool:
    """Refuse draws of the guide where the model has no density, unless its density is zero there.

    Returns:
        False if the guide certainly leaves out a part of the model's support.
    """
    model_leaf, guide_leaf = leaf_distribution(model_site["fn"]), leaf_distribution(guide_site["fn"])
    try:
        in_model, in_guide = bare_support(model_leaf), bare_support(guide_leaf)
    except (NotImplementedError, AttributeError):
        return True
    value, point = guide_site["value"], type(guide_leaf).__name__ == "Delta"
    if type(model_leaf).__name__ == "Delta":
        return True
    first, second = reached(model_leaf, in_model), reached(guide_leaf, in_guide)
    if not point and first is not None and second is not None:
        if first.discrete != second.discrete:
            kinds = ["discrete" if interval.discrete else "continuous" for interval in (first, second)]
            raise ValueError(
                f"site '{name}' is {kinds[0]} in the model ({type(model_leaf).__name__}) and {kinds[1]} in the guide "
                f"({type(guide_leaf).__name__}): use distributions of one kind in both"
            )
        outside = first.outside(second)
        if outside is None or vanishes(model_leaf, outside, value):
            return second.outside(first) is None
        where = f"on {second}", f"on {first}"
    elif type(in_model) is type(in_guide) and not point:
        return True
    else:
        if in_model.is_discrete != in_guide.is_discrete and not point:
            raise ValueError(
                f"site '{name}' is {type(model_leaf).__name__} in the model and {type(guide_leaf).__name__} in the "
                "guide, one of them discrete: use distributions of one kind in both"
            )
        if not devices.has_values(value):
            return True
        try:
            inside = bool(model_site["fn"].support.check(value).all())
        except (NotImplementedError, RuntimeError, ValueError):
            return True
        if inside:
            on_reals = type(in_model).__name__ in ("_Real", "_RealVector")
            return point or not (on_reals and in_guide.event_dim > 0)  # the simplex is a part of the reals
        where = f"on {in_guide}", f"on {in_model}"
    raise ValueError(
        f"the guide draws site '{name}' {where[0]} ({type(guide_leaf).__name__}), and the model has it {where[1]} "
        f"({type(model_leaf).__name__}), outside of which the value of its log-density is arbitrary: use a "
        "distribution of the model's support, or a TransformedDistribution with biject_to(support)"
    )


def _check_mask(name: str, model_site: Site, guide_site: Site, borrows: bool) -> None:
    in_model, in_guide = _mask(model_site), _mask(guide_site)
    if in_model is None and in_guide is None:
        return
    if in_guide is None and borrows:
        return
    if in_model is not None and in_guide is not None and _same_mask(in_model, in_guide):
        return
    which = "in the model alone" if in_guide is None else "in the guide alone" if in_model is None else "differently"
    raise ValueError(
        f"site '{name}' is masked {which}: an entry that only one of the two densities counts gives no bound. Put "
        "the same poutine.mask around the site in both programs"
    )


def borrows_mask(name: str, model_sites: Mapping[str, Site], guide_sites: Mapping[str, Site]) -> bool:
    """Whether a site holds the unobserved entries of ``obs_mask``; its masked entries enter no density.

    An AutoGuide puts the density on an auxiliary site, which must belong to this site alone.
    """
    if not name.endswith("_unobserved") or f"{name.removesuffix('_unobserved')}_observed" not in model_sites:
        return False
    is_delta = type(leaf_distribution(guide_sites[name]["fn"])).__name__ == "Delta"
    return not is_delta or f"{name}_unconstrained" in guide_sites


def _mask(site: Site) -> Any:
    mask, fn = site["mask"], site["fn"]
    while hasattr(fn, "base_dist"):
        own = getattr(fn, "_mask", None)
        if own is not None and type(fn).__name__ == "MaskedDistribution":
            mask = own if mask is None else torch.as_tensor(mask) & torch.as_tensor(own)
        fn = fn.base_dist
    return mask


def _same_mask(first: Any, second: Any) -> bool:
    if first is second:
        return True
    first, second = torch.as_tensor(first), torch.as_tensor(second)
    if not devices.has_values(first, second):
        return first.shape == second.shape
    try:
        return bool((first == second).all())
    except RuntimeError:
        return False
