r"""Pareto k-hat of a guide's weights: for all data, for each datum and for each layer.

The weights :math:`w = p(x, z)/q(z|x)` correct a guide's draws.  The Pareto shape k-hat of their tail shows whether the
correction works: below :math:`\min(1 - 1/\log_{10} S, 0.7)` an average over S weighted draws is reliable, above 1 the
weights of the fitted tail have no mean (Pareto Smoothed Importance Sampling,
Vehtari, Simpson, Gelman, Yao and Gabry, 2024; for guides, Yes, but Did It Work?: Evaluating Variational Inference,
Yao, Vehtari, Simpson and Gelman, 2018).

The weight of all data together is a product of one weight for each datum, so its k-hat grows with their number
for any guide.  Where the latents are local to a datum, each datum has posterior, weights and k-hat of
its own, which do not depend on how many others there are.

**Layers.**  A guide draws its layers one after another.  With the layers before l held at one draw,

.. math:: w_{\ge l}(z_l, \dots, z_L) = \frac{p(x, z_{<l}, z_l, \dots, z_L)}{q(z_l, \dots, z_L \mid z_{<l}, x)}

is the weight of the rest, and its k-hat measures layer l **and those the guide draws after it**: the posterior factors
in the guide's order too, so a guide that is exact from layer l on has equal weights there.  An error in a layer changes
its own k-hat and those before it in the guide's order: mend the last flagged layer first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.arguments import check_count
from pyro_hvae.problem import Plate, Problem, Structure, of_pair
from pyro_hvae.weights import chunks, default_chunk, good_khat, joined, pareto_khat

__all__ = ["KHats", "LayerWeights", "khats", "khats_of_tree", "khats_of_weights"]


@dataclass(frozen=True)
class KHats:
    """Pareto shapes of the weights of a guide's draws.

    They are ``-inf`` where all weights are equal, so that the guide is exact, and where the largest of weights of
    discrete draws is common, so that they are bounded.

    Attributes:
        joint: of all latents and data together, shape ``()``.
        per_datum: of each datum, in the shape of ``plates``; None if no latent is local to a datum.
        per_layer: by site in the guide's order, of that layer and those drawn after it: of each datum for a layer
            that is local to one, of shape ``()`` for another.
        plates: names of the dims of ``per_datum``.
        conditioned_on: sites that ``per_datum`` holds at one draw, the global latents.
        num_draws: S.
        good: largest reliable k-hat of so many draws.
        exact: whether the weights of all latents are equal, at each datum.
    """

    joint: Tensor
    per_datum: Tensor | None
    per_layer: Mapping[str, Tensor]
    plates: tuple[str, ...]
    conditioned_on: tuple[str, ...]
    num_draws: int
    good: float
    exact: bool = False

    def number(self, value: float) -> str:
        """Format one k-hat: ``exact`` or ``bounded`` for ``-inf``."""
        return f"{value:.2f}" if value != -math.inf else "exact" if self.exact else "bounded"

    def flagged(self) -> dict[str, int]:
        """Count the k-hats above ``good``: of ``"joint"``, ``"per_datum"`` and each layer by its name."""
        rows = {"joint": self.joint, **self.per_layer}
        if self.per_datum is not None:
            rows["per_datum"] = self.per_datum
        return {name: int((value > self.good).sum()) for name, value in rows.items()}

    def to_dataset(self) -> Any:
        """Return an ``xarray.Dataset`` with ``joint``, ``per_datum`` and ``per_layer``, whose first dim is ``layer``.

        A layer that is not local to a datum has the same value at each.
        """
        import xarray as xr

        def array(value: Tensor) -> Any:
            return xr.DataArray(value.cpu().numpy(), dims=self.plates if value.dim() else ())

        arrays = {"joint": array(self.joint)}
        if self.per_datum is not None:
            arrays["per_datum"] = array(self.per_datum)
        if self.per_layer:
            layers = xr.broadcast(*(array(value) for value in self.per_layer.values()))
            arrays["per_layer"] = xr.concat(layers, "layer").assign_coords(layer=list(self.per_layer))
        attrs = {"num_draws": self.num_draws, "good_k": self.good, "conditioned_on": ", ".join(self.conditioned_on)}
        return xr.Dataset(arrays, attrs=attrs)

    def __str__(self) -> str:
        rows = {"joint": self.joint}
        if self.per_datum is not None:
            condition = f" | {', '.join(self.conditioned_on)}" if self.conditioned_on else ""
            rows["each datum" + condition] = self.per_datum
        rows |= {f"{name} and after": value for name, value in self.per_layer.items()}
        width = max(map(len, rows))
        head = f"Pareto k-hat of {self.num_draws} draws; above {self.good:.2f} the draws can't be corrected by weights"
        return "\n".join([head, *(f"  {name:<{width}}  {_range(value, self)}" for name, value in rows.items())])


@of_pair
def khats(
    problem: Problem,
    *,
    num_draws: int = 1000,
    layers: Sequence[str] | None = None,
    chunk_size: int | None = None,
) -> KHats:
    r"""Compute k-hat of a guide: for all data together, for each datum, and for each layer.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.
        num_draws: S >= 20 for each k-hat; some hundreds give a useful fit.
        layers: sites whose own k-hat is computed, with one run of the pair each; all by default.
        chunk_size: number of draws that run at once; by default draws times indices of the largest site's plates stay
            below 20,000.

    Returns:
        :class:`KHats`.  A datum is an index of the plates common to all sites, or, with global latents, of those
        common to all observed sites, the global latents held at one draw.

    Raises:
        ValueError: for fewer than 20 draws, layers that the guide does not draw, programs that do not fit each other, a
            guide that draws nothing or a point, a minibatch whose plate does not enclose all sites, or weights that are
            NaN.

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> _ = torch.manual_seed(0)
        >>> khats(model, guide(scale=0.3), torch.zeros(3)).per_datum > 0.7
        tensor([True, True, True])
    """
    weights = LayerWeights(problem, num_draws, chunk_size)
    return khats_of_weights(weights, weights(frozenset(), problem.structure.common), layers)


class LayerWeights:
    """Log-weights of a guide with some of its sites held at one draw.

    Raises:
        ValueError: as :func:`khats`.
    """

    def __init__(self, problem: Problem, num_draws: int, chunk_size: int | None = None) -> None:
        check_count("num_draws", num_draws)
        if num_draws < 20:
            raise ValueError(f"a tail needs at least 20 draws, got num_draws={num_draws}")
        structure = problem.structure
        if not structure.drawn:
            raise ValueError(
                f"the guide draws nothing (sites of the pair: {sorted(structure.sites)}), so there are no "
                "weights: use a guide that draws the latents"
            )
        problem.require_density("k-hat")
        structure.require_whole("k-hat")
        self.problem, self.num_draws = problem, num_draws
        self.counts = chunks(num_draws, default_chunk(structure.entries) if chunk_size is None else chunk_size)

    def __call__(self, once: frozenset[str], plates: tuple[Plate, ...]) -> Tensor:
        """Draw log-weights ``(S, *plates)``, with the sites ``once`` at one draw, the same for every chunk."""
        with torch.no_grad():
            held = {}
            if once:
                drawn = self.problem.run(draw_enumerated=True).values
                held = {name: value for name, value in drawn.items() if name in once}
            runs = (self.problem.run(count, held=held, draw_enumerated=True) for count in self.counts)
            return joined((run.over(plates).log_weights for run in runs), self.num_draws)


def khats_of_weights(weights: LayerWeights, everything: Tensor, layers: Sequence[str] | None = None) -> KHats:
    """Compute k-hats; those of all latents from the log-weights ``everything``.

    Args:
        weights: draws the log-weights of layers.
        everything: log-weights of a run with nothing held, ``(S, *plates common to all sites)``.
        layers: as in :func:`khats`.
    """
    structure = weights.problem.structure
    data = structure.data_plates
    joint = pareto_khat(everything.flatten(1).sum(1) if everything.dim() > 1 else everything)
    drawn = [name for name in structure.guide_order if name in structure.drawn and not _point(structure, name)]
    local = _local(structure, data)
    outside = frozenset(structure.drawn) - _inside(structure, data) if local else frozenset()
    per_datum: Tensor | None = None
    if local:
        per_datum = pareto_khat(weights(outside, data) if outside else everything)
    per_layer: dict[str, Tensor] = {}
    for name in _chosen(structure, drawn, layers):
        before = frozenset(structure.guide_order[: structure.guide_order.index(name)])
        if name in local:
            assert per_datum is not None
            rest = before | outside
            per_layer[_label(structure, name)] = per_datum if rest == outside else pareto_khat(weights(rest, data))
        else:
            separate = bool(before or structure.common)
            per_layer[_label(structure, name)] = pareto_khat(weights(before, ())) if separate else joint
    return KHats(
        joint=joint,
        per_datum=per_datum,
        per_layer=per_layer,
        plates=tuple(plate.name for plate in data) if local else (),
        conditioned_on=tuple(_label(structure, name) for name in drawn if name in outside),
        num_draws=weights.num_draws,
        good=good_khat(weights.num_draws),
        exact=_equal(everything),
    )


def khats_of_tree(tree: Any) -> KHats:
    """Compute k-hats of a tree's log-weights, of all data together and of each datum.

    Args:
        tree: with ``sample_stats/log_weight``; draws of all chains are pooled.
    """
    values = tree["sample_stats"]["log_weight"].transpose("chain", "draw", ...)
    weights = torch.as_tensor(values.values).flatten(0, 1)
    local = weights.dim() > 1
    return KHats(
        joint=pareto_khat(weights.flatten(1).sum(1) if local else weights),
        per_datum=pareto_khat(weights) if local else None,
        per_layer={},
        plates=tuple(str(dim) for dim in values.dims[2:]),
        conditioned_on=(),
        num_draws=len(weights),
        good=good_khat(len(weights)),
        exact=_equal(weights),
    )


def _chosen(structure: Structure, drawn: list[str], layers: Sequence[str] | None) -> list[str]:
    """Return the selected layers, which ``layers`` names by the model's sites."""
    named = {_label(structure, name): name for name in drawn}
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Sequence)):
        raise TypeError(f"layers must be a list of site names, got {layers!r}")
    unknown = sorted(set(layers or ()) - set(named))
    if unknown:
        raise ValueError(f"layers names {unknown}, which the guide does not draw; it draws {list(named)}")
    return [site for name, site in named.items() if layers is None or name in layers]


def _inside(structure: Structure, data: tuple[Plate, ...]) -> frozenset[str]:
    """Return the sites that the guide draws for each datum, points included."""
    if not data:
        return frozenset()
    dims = {(plate.dim, plate.size) for plate in data}
    return frozenset(n for n in structure.drawn if dims <= {(p.dim, p.size) for p in structure.sites[n].plates})


def _local(structure: Structure, data: tuple[Plate, ...]) -> frozenset[str]:
    """Return the sites drawn for each datum; none if a local value is computed from a draw for all data."""
    inside = _inside(structure, data)
    points = {name for name in inside if _point(structure, name)}
    if any(f"{name}_unconstrained" not in inside for name in points):
        return frozenset()
    return inside - points


def _point(structure: Structure, name: str) -> bool:
    return structure.sites[name].guide_distribution == "Delta"


def _label(structure: Structure, name: str) -> str:
    """Return the model's name of a site; AutoGuides draw ``<site>_unconstrained``."""
    site = name.removesuffix("_unconstrained")
    return site if site in structure.sites else name


def _range(value: Tensor, hats: KHats) -> str:
    """Format one k-hat, or the range of several."""
    if value.dim() == 0:
        return hats.number(float(value)) + ("  flagged" if value > hats.good else "")
    worst, middle = hats.number(float(value.max())), hats.number(float(value.median()))
    return f"median {middle}, largest {worst}; {int((value > hats.good).sum())} of {value.numel()} flagged"


def _equal(weights: Tensor) -> bool:
    """Whether log-weights ``(S, ...)`` are the same but for round-off."""
    least, most = weights.aminmax(dim=0)
    round_off = (64 * torch.finfo(weights.dtype).eps * torch.maximum(-least, most)).clamp(1e-8, 0.01)
    return bool((most - least <= round_off).all())
