r"""Sum over discrete variables instead of drawing them, in the model or in the guide, by Pyro's enumeration.

**In the model.**  A site marked ``infer={"enumerate": "parallel"}`` that the guide does not draw is summed out.  The
sites that depend on it get one marginal log p: the sum over its values inside, the product over inner plates outside
(Tensor Variable Elimination for Factor Graphs, Obermeyer et al., 2019).  A mask does not change the variable's own
probabilities: where every dependent site is masked, the sum is one.  All sites that are summed together must have the
same scale; the scale multiplies the sum.

**In the guide.**  A site marked so in the guide is enumerated there: terms become exact expectations

.. math:: \sum_y q(y|x)\,[\log p(x, y, z_y) - \log q(y, z_y|x)],

and the weight of a draw is :math:`\sum_y p(x, y, z_y)/q(z_y|y, x)`, whose expectation is p(x).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_hvae.problem.isolation import RUNNING
from pyro_hvae.problem.structure import PARTICLES, Structure, plates_of, sample_sites, user_scale

if TYPE_CHECKING:
    from pyro_hvae.problem.run import Run

__all__ = ["Enumerated"]


class Enumerated:
    """The traces of a run with enumerated sites, packed: dims have symbols.

    Args:
        model_trace, guide_trace: of the run.
        structure: of the pair.
    """

    def __init__(self, model_trace: Trace, guide_trace: Trace, structure: Structure) -> None:
        self.structure = structure
        guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        for trace, marked in (
            (guide_trace, structure.enumerated_in_guide),
            (model_trace, structure.enumerated),
        ):
            for name, site in trace.nodes.items():  # copies: the sites of the run do not change
                trace.nodes[name] = {**site, "infer": dict(site.get("infer") or {})}
                for computed in ("packed", "log_prob", "unscaled_log_prob", "log_prob_sum"):
                    trace.nodes[name].pop(computed, None)
                if name in marked:
                    trace.nodes[name]["fn"] = _unmasked(site["fn"])
            with RUNNING, pyro.validation_enabled(False):
                trace.compute_log_prob()
        guide_trace.pack_tensors()
        model_trace.pack_tensors(guide_trace.plate_to_symbol)
        self.model_trace, self.guide_trace = model_trace, guide_trace
        self.symbol_to_dim = {**guide_trace.symbol_to_dim, **model_trace.symbol_to_dim}
        self.plate_to_symbol = {**guide_trace.plate_to_symbol, **model_trace.plate_to_symbol}
        self.in_model = _symbols(model_trace, structure.enumerated)
        self.in_guide = _symbols(guide_trace, structure.enumerated_in_guide)
        self.drawn_last_first = [n for n in reversed(structure.guide_order) if structure.sites[n].enumerated_in_guide]

    def rank(self, site: Mapping[str, Any], rank: int) -> int:
        """Return the largest number of dims of a log-density of a site."""
        dims: list[int] = []
        for trace in (self.model_trace, self.guide_trace):
            if site["name"] in trace.nodes:
                dims += trace.nodes[site["name"]]["infer"].get("_dim_to_symbol") or {}
        return max([rank, *(-dim for dim in dims)])

    def log_p(self, run: Run) -> dict[str, Tensor]:
        """Return log p by site; sites that are summed together are one term under their joined names."""
        terms: dict[str, Tensor] = {}
        joined: list[tuple[dict[str, Any], Tensor]] = []
        for site in sample_sites(self.model_trace):
            value = self.factor(site)
            if self.in_model.isdisjoint(value._pyro_dims) and site["name"] not in self.structure.enumerated:
                terms[site["name"]] = run.log_prob(run.model_trace.nodes[site["name"]])
            else:
                joined.append((site, value))
        for component in _components(joined, self.in_model):
            names = [s["name"] for s, _ in component if s["name"] not in self.structure.enumerated]
            value = self._contracted(run, component, self.in_model)
            label = "+".join(names) or "+".join(site["name"] for site, _ in component)
            terms[label] = run.layout.reduce(self._averaged(value, component[0][0]), run.plates)
        return terms

    def log_p_alone(self, run: Run, name: str) -> Tensor | None:
        """Return log p of one site in the plates of the run; None where it is summed with other sites."""
        site, plates = self.model_trace.nodes[name], self.structure.sites[name].plates
        joined = [(other, self.factor(other)) for other in sample_sites(self.model_trace)]
        members = next(c for c in _components(joined, self.in_model) if any(s is site for s, _ in c))
        if len(members) == 1:
            return run.log_prob(run.model_trace.nodes[name])
        for other, _ in members:
            info = self.structure.sites[other["name"]]
            if other is not site and (info.role != "enumerated" or not set(plates) <= set(info.plates)):
                return None
        contracted = self._contracted(run, members, self.in_model)
        return run.layout.reduce(packed.unpack(contracted, self.symbol_to_dim), run.plates)

    def log_weights(self, run: Run) -> Tensor:
        """Return the log of the weights, summed over every enumerated site, ``(K or 1, *plates)``."""
        factors = [(site, self.factor(site)) for site in sample_sites(self.model_trace)]
        for site in sample_sites(self.guide_trace):
            draws = site["infer"].get("num_samples")
            if site["name"] in self.structure.enumerated_in_guide and draws is None:
                continue
            ratio = packed.neg(self.factor(site))
            if draws is not None:
                dims, ratio = ratio._pyro_dims, ratio - math.log(draws)
                ratio._pyro_dims = dims
            factors.append((site, ratio))
        symbols = self.in_model | self.in_guide
        summed: Any = 0.0
        for component in _components(factors, symbols):
            summed = summed + run.layout.reduce(
                packed.unpack(self._contracted(run, component, symbols), self.symbol_to_dim), run.plates
            )
        return summed

    def factor(self, site: dict[str, Any]) -> Any:
        """Return the unscaled log-density of a site, packed and masked; an enumerated site stays unmasked."""
        value = site["packed"]["unscaled_log_prob"]
        if site["infer"].get("_enumerate_dim") is not None:
            return value
        return packed.scale_and_mask(value, mask=site["packed"]["mask"])

    def expectation(self, site: dict[str, Any], value: Tensor) -> Tensor:
        """Return the mean of a tensor of a site's batch shape over the values that the guide enumerates."""
        name = site["name"]
        names: dict[int, str] = {}
        for trace in (self.model_trace, self.guide_trace):  # a divergence has the dims of both
            if name in trace.nodes:
                names |= trace.nodes[name]["infer"]["_dim_to_symbol"]
        tensor = packed.pack(value, names)
        if self.in_guide.isdisjoint(tensor._pyro_dims):
            del tensor._pyro_dims
            return value
        return self._averaged(tensor, site)

    def _averaged(self, value: Any, site: Mapping[str, Any]) -> Tensor:
        """Average over enumerated sites of the guide, the last drawn first; return an unpacked tensor."""
        for name in self.drawn_last_first:
            node = self.guide_trace.nodes[name]
            symbol = node["infer"].get("_enumerate_symbol")
            if symbol is None or symbol not in value._pyro_dims:
                continue
            log_q = node["packed"]["unscaled_log_prob"]
            if (self._plates(node) & set(log_q._pyro_dims)) - self._plates(site):
                raise ValueError(
                    f"site '{site['name']}' depends on '{name}', which the guide enumerates in a plate around that "
                    "site alone, so its expectation is not defined. Draw the variable instead, or move the site into "
                    "the plate"
                )
            weights: Any = packed.exp(log_q)
            if (draws := node["infer"].get("num_samples")) is not None:
                weights = torch.full_like(weights, 1.0 / draws)
                weights._pyro_dims = log_q._pyro_dims
            q, terms = packed.broadcast_all(weights, value)
            safe = torch.where(q > 0, terms, torch.zeros_like(terms))  # 0 times -inf is 0, and so is its gradient
            mean: Any = (q * safe).sum(terms._pyro_dims.index(symbol))
            mean._pyro_dims = terms._pyro_dims.replace(symbol, "")
            value = mean
        return packed.unpack(value, self.symbol_to_dim)

    def _plates(self, site: Mapping[str, Any]) -> set[str]:
        """Return the symbols of the plates around a site, without the particles."""
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized and frame.name != PARTICLES]
        return {self.plate_to_symbol[frame.name] for frame in frames}

    def refuse_downstream(self, site: Mapping[str, Any], log_q: Tensor) -> None:
        """Refuse a score-function gradient at a draw that depends on a site which the guide enumerates.

        Raises:
            ValueError: naming the site.
        """
        names = self.guide_trace.nodes[site["name"]]["infer"]["_dim_to_symbol"]
        tensor = packed.pack(log_q[...], names)
        if not self.in_guide.isdisjoint(tensor._pyro_dims):
            raise ValueError(
                f"site '{site['name']}' has no reparameterised draws and depends on a site that the guide enumerates: "
                'mark it infer={"enumerate": "parallel"} too'
            )

    def _check_plates(self, component: list[tuple[dict[str, Any], Any]]) -> None:
        """Refuse to sum a variable of the model over one that the guide enumerates in a plate inside."""
        summed = [site for site, _ in component if site["name"] in self.structure.enumerated]
        present = {symbol for _, value in component for symbol in value._pyro_dims}
        for name in self.structure.enumerated_in_guide:
            node = self.guide_trace.nodes[name]
            if node["infer"].get("_enumerate_symbol") not in present:
                continue
            for site in summed:
                if self._plates(node) - self._plates(site):
                    raise ValueError(
                        f"the model sums '{site['name']}' out, outside of a plate in which the guide enumerates "
                        f"'{name}': the sum and the expectation do not factorise. Draw '{name}' instead (remove its "
                        "mark), or draw both"
                    )

    def _contracted(self, run: Run, component: list[tuple[dict[str, Any], Any]], symbols: set[str]) -> Any:
        """Sum the product of factors over ``symbols``; packed, scaled, with the plates of a datum kept."""
        kept = {plate.dim for plate in run.plates}
        factors: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
        target: set[str] = set()
        scales = []
        for site, value in component:
            frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized and frame.size > 1]
            factors.setdefault(frozenset(self.plate_to_symbol[f.name] for f in frames), []).append(value)
            target |= {self.plate_to_symbol[f.name] for f in frames if f.dim in kept or f.name == PARTICLES}
            outside = tuple(plate for plate in plates_of(site) if plate in run.plates)
            scales.append((site["name"], user_scale(site, outside)))
        scale = _common_scale(scales)
        self._check_plates(component)
        present = symbols & {symbol for _, value in component for symbol in value._pyro_dims}
        value = contract_to_tensor(factors, present, target_ordinal=frozenset(target))
        if isinstance(scale, (int, float)) and scale == 1.0:
            return value
        dims = value._pyro_dims
        if isinstance(scale, Tensor) and scale.dim():
            raise ValueError(
                f"sites {[name for name, _ in scales]} are summed over a discrete variable together and carry a "
                "poutine.scale of more than one number: use one number, or draw the variable in the guide"
            )
        value = value * scale
        value._pyro_dims = dims
        return value


def _unmasked(fn: Any) -> Any:
    """Return a distribution without its own masks."""
    if type(fn).__name__ == "MaskedDistribution":
        return _unmasked(fn.base_dist)
    if type(fn).__name__ == "Independent":
        return type(fn)(_unmasked(fn.base_dist), fn.reinterpreted_batch_ndims)
    return fn


def _symbols(trace: Trace, names: Iterable[str]) -> set[str]:
    symbols = (trace.nodes[name]["infer"].get("_enumerate_symbol") for name in names)
    return {symbol for symbol in symbols if symbol is not None}


def _components(
    factors: list[tuple[dict[str, Any], Any]], symbols: set[str]
) -> list[list[tuple[dict[str, Any], Any]]]:
    """Group factors that share a summed-out symbol, directly or through others; in the order of the first of each."""
    groups: list[tuple[set[str], list[tuple[dict[str, Any], Any]]]] = []
    for factor in factors:
        present = symbols & set(factor[1]._pyro_dims)
        members = [factor]
        rest = []
        for shared, group in groups:
            if shared & present:
                present, members = present | shared, group + members
            else:
                rest.append((shared, group))
        groups = [*rest, (present, members)]
    return [members for _, members in groups]


def _common_scale(scales: list[tuple[str, Any]]) -> Any:
    """Return the scale that all sites share.

    Raises:
        ValueError: naming sites with different ones.
    """
    first_name, first = scales[0]
    for name, scale in scales[1:]:
        same = scale is first
        if not same and not isinstance(scale, Tensor) and not isinstance(first, Tensor):
            same = abs(scale - first) <= 1e-12 * abs(first)
        elif not same:
            same = bool(torch.equal(torch.as_tensor(scale), torch.as_tensor(first)))
        if not same:
            raise ValueError(
                f"sites '{first_name}' and '{name}' are summed over a discrete variable together and carry different "
                f"scales ({first} and {scale}), of a subsampled plate or of poutine.scale; a scale can't enter "
                "the sum. Give both the same scale, or draw the discrete variable in the guide instead"
            )
    return first
