r"""How far a guide's draws can be trusted, datum by datum and layer by layer.

The weights :math:`w = p(x, z)/q(z|x)` correct a guide's draws for what the guide misses.  The Pareto shape k-hat of
their tail tells whether that correction works at all: below :math:`\min(1 - 1/\log_{10} S, 0.7)` an average over S
weighted draws can be trusted, above 1 the weights have no mean to speak of (Pareto Smoothed Importance Sampling,
Vehtari, Simpson, Gelman, Yao and Gabry, 2024; for guides, Yes, but Did It Work?: Evaluating Variational Inference,
Yao, Vehtari, Simpson and Gelman, 2018).

The weight of all data together is a product of one weight for each datum, so its k-hat grows with their number
whatever the guide's quality.  Where the latents are local to a datum, each datum has posterior, weights and k-hat of
its own, which do not depend on how many others there are.

**Layers.**  A guide draws its layers one after another.  With the layers before l held at one draw,

.. math:: w_{\ge l}(z_l, \dots, z_L) = \frac{p(x, z_{<l}, z_l, \dots, z_L)}{q(z_l, \dots, z_L \mid z_{<l}, x)}

is the weight of the rest, and its k-hat judges layer l **and those the guide draws after it**: the posterior factors
in the guide's order too, so a guide that is exact from layer l on has equal weights there.  What is wrong in a layer
shows in its own k-hat and in those before it in the guide's order; blame the last layer that is flagged first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_hvae.psis import good_khat, pareto_khat
from pyro_hvae.traces import Plate, Structure, read, structure
from pyro_hvae.traces.running import bind_context

__all__ = ["KHats", "khats"]


@dataclass(frozen=True)
class KHats:
    """Pareto shapes of the weights of a guide's draws; ``-inf`` where all weights are equal, so the guide is exact.

    Attributes:
        joint: of all latents and data together, shape ``()``.
        per_datum: of each datum, in the shape of ``plates``; None if no latent is local to a datum.
        per_layer: by site in the guide's order, of that layer and those drawn after it: of each datum for a layer
            that is local to one, of shape ``()`` for another.
        plates: names of the dims of ``per_datum``.
        given: sites that ``per_datum`` holds at one draw, the global latents.
        num_draws: S.
        good: largest k-hat that is to be trusted with so many draws.
    """

    joint: Tensor
    per_datum: Tensor | None
    per_layer: Mapping[str, Tensor]
    plates: tuple[str, ...]
    given: tuple[str, ...]
    num_draws: int
    good: float

    def flagged(self) -> dict[str, int]:
        """How many k-hats are above ``good``: of ``"joint"``, ``"per_datum"`` and each layer by its name."""
        rows = {"joint": self.joint, **self.per_layer}
        if self.per_datum is not None:
            rows["per_datum"] = self.per_datum
        return {name: int((value > self.good).sum()) for name, value in rows.items()}

    def to_dataset(self) -> Any:
        """``xarray.Dataset`` with ``joint``, ``per_datum`` and ``per_layer``, whose first dim is ``layer``.

        A layer that is not local to a datum has the same value at each.
        """
        import xarray as xr

        def array(value: Tensor) -> Any:
            return xr.DataArray(value.cpu().numpy(), dims=self.plates if value.dim() else ())

        found = {"joint": array(self.joint)}
        if self.per_datum is not None:
            found["per_datum"] = array(self.per_datum)
        if self.per_layer:
            layers = xr.broadcast(*(array(value) for value in self.per_layer.values()))
            found["per_layer"] = xr.concat(layers, "layer").assign_coords(layer=list(self.per_layer))
        attrs = {"num_draws": self.num_draws, "good_k": self.good, "given": ", ".join(self.given)}
        return xr.Dataset(found, attrs=attrs)

    def __str__(self) -> str:
        rows = {"joint": self.joint}
        if self.per_datum is not None:
            rows["each datum" + (f" | {', '.join(self.given)}" if self.given else "")] = self.per_datum
        rows |= {f"{name} and after": value for name, value in self.per_layer.items()}
        width = max(map(len, rows))
        head = f"Pareto k-hat of {self.num_draws} draws; above {self.good:.2f} the draws can't be corrected by weights"
        return "\n".join([head, *(f"  {name:<{width}}  {_range(value, self.good)}" for name, value in rows.items())])


def khats(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 1000,
    layers: Sequence[str] | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> KHats:
    r"""k-hat of a guide: for all data together, for each datum, and for each layer.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.
        num_draws: S >= 20 for each number; a fit from fewer than some hundreds says little.
        layers: sites whose own k-hat is wanted, each of which costs a run of the pair; all by default.
        chunk_size: how many draws run at once; by default so many that draws times data stay below 20,000.

    Returns:
        :class:`KHats`.  A datum is an index of the plates common to all sites, or, with global latents, of those
        common to all observed sites, the global latents held at one draw.

    Raises:
        ValueError: for fewer than 20 draws, layers that the guide does not draw, programs that do not fit each other, a
            guide that draws nothing or nothing but points, or weights that are NaN.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def narrow(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.3))
        >>> _ = torch.manual_seed(0)
        >>> khats(model, narrow, torch.zeros(3)).per_datum > 0.7
        tensor([True, True, True])
    """
    if num_draws < 20:
        raise ValueError(f"a tail needs at least 20 draws, got num_draws={num_draws}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    found = structure(model, guide, args, kwargs)
    if not found.drawn:
        raise ValueError(f"the guide draws nothing (sites of the pair: {sorted(found.sites)}), so there are no weights")
    if all(_point(found, name) for name in found.drawn):
        raise ValueError(
            f"the guide is a point estimate (of {sorted(found.drawn)}): its draws are all the same, so that equal "
            "weights say nothing of how far it is from the posterior"
        )
    data = _data_plates(found)
    size = chunk_size or max(1, 20_000 // math.prod(plate.size for plate in data or _largest(found)))

    def weights(once: frozenset[str], plates: tuple[Plate, ...]) -> Tensor:
        return _weights(model, guide, args, kwargs, num_draws, size, once, plates)

    everything = weights(frozenset(), found.common)
    joint = pareto_khat(everything.flatten(1).sum(1) if everything.dim() > 1 else everything)
    drawn = [name for name in found.guide_order if name in found.drawn and not _point(found, name)]
    local = _local(found, data)
    outside = frozenset(found.drawn) - _inside(found, data) if local else frozenset()
    per_datum: Tensor | None = None
    if local:
        per_datum = pareto_khat(weights(outside, data) if outside else everything)
    per_layer: dict[str, Tensor] = {}
    for name in _chosen(found, drawn, layers):
        before = frozenset(found.guide_order[: found.guide_order.index(name)])
        if name in local:
            assert per_datum is not None
            rest = before | outside
            per_layer[_label(found, name)] = per_datum if rest == outside else pareto_khat(weights(rest, data))
        else:
            per_layer[_label(found, name)] = pareto_khat(weights(before, ())) if before or found.common else joint
    return KHats(
        joint=joint,
        per_datum=per_datum,
        per_layer=per_layer,
        plates=tuple(plate.name for plate in data) if local else (),
        given=tuple(_label(found, name) for name in drawn if name in outside),
        num_draws=num_draws,
        good=good_khat(num_draws),
    )


def _weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    num_draws: int,
    size: int,
    once: frozenset[str],
    plates: tuple[Plate, ...],
) -> Tensor:
    """Log-weights ``(S, *plates)`` with the sites ``once`` at one draw, the same for every chunk."""
    parts = []
    with torch.no_grad():
        if once:
            (model, guide), kwargs = bind_context((model, guide), kwargs)
            drawn, held = read(model, guide, args, kwargs).guide_trace, Trace()
            for name in once:
                held.add_node(name, **drawn.nodes[name])
            guide = poutine.replay(guide, trace=held)
        for start in range(0, num_draws, size):
            count = min(size, num_draws - start)
            reading = read(model, guide, args, kwargs, num_particles=count, once=lambda _: once)
            weights = reading.over(plates).log_weights
            parts.append(weights.expand(count, *weights.shape[1:]))
    return torch.cat(parts)


def _chosen(found: Structure, drawn: list[str], layers: Sequence[str] | None) -> list[str]:
    """Layers by the names that a reader knows."""
    named = {_label(found, name): name for name in drawn}
    unknown = sorted(set(layers or ()) - set(named))
    if unknown:
        raise ValueError(f"layers names {unknown}, which the guide does not draw; it draws {list(named)}")
    return [site for name, site in named.items() if layers is None or name in layers]


def _data_plates(found: Structure) -> tuple[Plate, ...]:
    """The plates that a datum indexes: common to all sites, or else to all that are observed."""
    if found.common:
        return found.common
    stacks = [
        {plate for plate in found.sites[name].plates if plate.dim is not None}
        for name in found.observed
        if found.sites[name].model_distribution not in ("Unit", "Delta")
    ]
    shared = set.intersection(*stacks) if stacks else set()
    return tuple(sorted(shared, key=lambda plate: plate.dim or 0))


def _inside(found: Structure, data: tuple[Plate, ...]) -> frozenset[str]:
    """What the guide draws for each datum, points included."""
    if not data:
        return frozenset()
    dims = {(plate.dim, plate.size) for plate in data}
    return frozenset(n for n in found.drawn if dims <= {(p.dim, p.size) for p in found.sites[n].plates})


def _local(found: Structure, data: tuple[Plate, ...]) -> frozenset[str]:
    """What the guide draws for each datum by itself; nothing if it computes a local value from a draw for all data."""
    inside = _inside(found, data)
    points = {name for name in inside if _point(found, name)}
    if any(f"{name}_unconstrained" not in inside for name in points):
        return frozenset()
    return inside - points


def _point(found: Structure, name: str) -> bool:
    return found.sites[name].guide_distribution == "Delta"


def _label(found: Structure, name: str) -> str:
    """AutoGuides draw ``<site>_unconstrained`` and map it; the site is what a reader knows."""
    site = name.removesuffix("_unconstrained")
    return site if site in found.sites else name


def _largest(found: Structure) -> tuple[Plate, ...]:
    return max((site.plates for site in found.sites.values()), key=lambda plates: math.prod(p.size for p in plates))


def _range(value: Tensor, good: float) -> str:
    """One k-hat, or how they spread."""
    if value.dim() == 0:
        text = "exact" if value == -math.inf else f"{float(value):.2f}"
        return text + ("  flagged" if value > good else "")
    worst = "exact" if value.max() == -math.inf else f"{float(value.max()):.2f}"
    middle = "exact" if value.median() == -math.inf else f"{float(value.median()):.2f}"
    return f"median {middle}, largest {worst}; {int((value > good).sum())} of {value.numel()} flagged"
