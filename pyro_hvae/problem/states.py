r"""Draw the discrete variables that a model sums out from their posterior given the guide's draws.

Forward filtering, backward sampling over the factors of a run, by Pyro's sampling ring, as in
``pyro.infer.infer_discrete``.  Particles are one more plate on the left.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from opt_einsum import shared_intermediates
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.rings import SampleRing
from torch import Tensor

from pyro_hvae import devices
from pyro_hvae.problem.isolation import RUNNING
from pyro_hvae.problem.structure import sample_sites

if TYPE_CHECKING:
    from pyro_hvae.problem.enumeration import Enumerated

__all__ = ["draw_states"]


def draw_states(enumerated: Enumerated) -> dict[str, Tensor]:
    """Draw every summed-out site from its posterior, jointly, one draw a particle.

    Masks of the sites that depend on a site apply; a mask of the site itself does not, so a masked entry is drawn from
    its prior.

    Returns:
        Values by site, in the batch dims of the run.

    Raises:
        ValueError: where no state has a positive probability.
    """
    terms, sizes, leaves = _factors(enumerated)
    present = enumerated.in_model & set(sizes)
    cache: dict[Any, Any] = {}
    with RUNNING, pyro.validation_enabled(False), torch.no_grad(), shared_intermediates(cache):
        ring = SampleRing(cache=cache, dim_to_size=sizes)
        for roots in contract_tensor_tree(terms, present, ring=ring).values():
            for root in roots:
                if devices.has_values(root) and not bool(torch.isfinite(root).all()):
                    raise ValueError(
                        f"the states of {list(enumerated.structure.enumerated)}, which are summed out, can't be drawn: "
                        "at some draw of the guide no state has a positive probability, or a density is NaN. Check the "
                        "parameters and the supports of the sites that depend on them"
                    )
                if hasattr(root, "_pyro_backward"):
                    root._pyro_backward()
    return {name: _value(enumerated, name, leaves.get(name)) for name in enumerated.structure.enumerated}


def _factors(enumerated: Enumerated) -> tuple[OrderedDict[frozenset[str], list[Any]], dict[str, int], dict[str, Any]]:
    """Return the factors with a summed-out symbol by plates, the sizes by symbol, and the factors of those sites."""
    marked = set(enumerated.structure.enumerated)
    sites = sorted(sample_sites(enumerated.model_trace), key=lambda site: site["name"] in marked)
    terms: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
    sizes: dict[str, int] = {}
    leaves: dict[str, Any] = {}
    for site in sites:
        factor = enumerated.factor(site)
        if enumerated.in_model.isdisjoint(factor._pyro_dims):
            continue
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized and frame.size > 1]
        symbols = {enumerated.plate_to_symbol[frame.name]: frame.size for frame in frames}
        value = _spread(factor, symbols)
        sizes.update(zip(value._pyro_dims, value.shape, strict=True))
        terms.setdefault(frozenset(symbols), []).append(value)
        if site["name"] in marked:
            require_backward(value)
            leaves[site["name"]] = value
    return terms, sizes, leaves


def _spread(factor: Any, plates: Mapping[str, int]) -> Any:
    """Return a copy of a factor with all dims of its plates, so that a state is drawn for each index."""
    missing = "".join(symbol for symbol in sorted(plates) if symbol not in factor._pyro_dims)
    value: Any = factor.detach().expand(*(plates[symbol] for symbol in missing), *factor.shape)
    value._pyro_dims = missing + factor._pyro_dims
    return value


def _value(enumerated: Enumerated, name: str, leaf: Any) -> Tensor:
    """Return the drawn value of a site: its support at the drawn index."""
    site: Mapping[str, Any] = enumerated.model_trace.nodes[name]
    support = _support(site)
    index = _index(enumerated, site, leaf)
    return support[0] if index is None else support[index]


def _support(site: Mapping[str, Any]) -> Tensor:
    """Return the values of a site along the first dim, then its event."""
    value, event_dim = site["value"], site["fn"].event_dim
    batch = value.dim() - event_dim
    enumerated = batch + site["infer"]["_enumerate_dim"]
    place = tuple(slice(None) if dim == enumerated else 0 for dim in range(batch))
    return value[place]


def _index(enumerated: Enumerated, site: Mapping[str, Any], leaf: Any) -> Tensor | None:
    """Return the index of a site's value, in the batch dims of the run; None for a support of one value."""
    sample = getattr(leaf, "_pyro_backward_result", None)
    if sample is None:
        return None
    symbol = site["infer"]["_enumerate_symbol"]
    if symbol not in sample._pyro_sample_dims:
        return None
    index = sample[sample._pyro_sample_dims.index(symbol)]
    index._pyro_dims = sample._pyro_dims[1:]
    return packed.unpack(index, enumerated.symbol_to_dim)
