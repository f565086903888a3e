r"""Which site depends on which, found so that no dependency can be missed quietly.

The divergence of layer *t*,

.. math:: \mathrm E_q\,\mathrm{KL}\bigl(q(z_t\mid\cdot)\,\|\,p(z_t\mid \mathrm{pa}(z_t))\bigr),

equals the bound's term :math:`\mathrm E_q[\log q(z_t|\cdot)-\log p(z_t|\mathrm{pa}(z_t))]` only where no parent
of :math:`z_t` in the model descends from :math:`z_t` in the guide.  A path is looked for in three ways:

1. *order*: what the guide drew before :math:`z_t` cannot descend from it, whatever the program does;
2. *provenance*: draws are marked, and marks are followed through tensor operations (Wingate et al., 2011); this
   sees through ``detach`` but loses in-place copies and ``vmap``;
3. *autograd*: draws are made leaves, and the graph is searched for them; this sees through in-place copies but
   loses ``detach``, and cannot see discrete draws, which are therefore taken to reach everything drawn later.

A path that any of the last two shows counts; an analysis that fails counts as a path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_hvae.traces.parameters import graph_leaves
from pyro_hvae.traces.running import isolated
from pyro_hvae.traces.structure import Structure, sample_sites

__all__ = ["Dependencies", "dependencies"]

Edges = dict[str, frozenset[str]]


@dataclass(frozen=True)
class Dependencies:
    """Direct dependencies of each site on draws of the guide.

    ``model`` and ``guide`` map a site to the guide's draws that its distribution depends on in that program.
    ``complete`` is False where the analysis could not run, and then every later draw counts as a dependency.
    """

    model: Edges
    guide: Edges
    order: tuple[str, ...]
    complete: bool

    def descendants(self, name: str) -> frozenset[str]:
        """The guide's draws that depend on ``name``, directly or not."""
        later = self.order[self.order.index(name) + 1 :]
        if not self.complete:
            return frozenset(later)
        found = {name}
        for site in later:
            if self.guide[site] & found:
                found.add(site)
        return frozenset(found - {name})

    def broken_by(self, name: str) -> frozenset[str]:
        """Parents of ``name`` in the model that descend from it in the guide: where its KL is not the term."""
        descendants = self.descendants(name)
        return descendants if not self.complete else self.model[name] & descendants


def dependencies(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    structure: Structure,
) -> Dependencies:
    """Analyse a pair by one marked run for provenance and one for autograd."""
    order = tuple(name for name in structure.guide_order if name in set(structure.drawn))
    try:
        marked = _edges(model, guide, args, kwargs, _Provenance())
        linked = _edges(model, guide, args, kwargs, _Autograd())
    except Exception:  # any program may refuse tensor subclasses; then nothing is known, and nothing is assumed
        return Dependencies({}, {}, order, complete=False)
    if set(marked[1]) != set(structure.guide_order) or set(linked[1]) != set(structure.guide_order):
        return Dependencies({}, {}, order, complete=False)
    return Dependencies(
        model={name: marked[0][name] | linked[0][name] for name in marked[0]},
        guide={name: marked[1][name] | linked[1][name] for name in marked[1]},
        order=order,
        complete=True,
    )


def _edges(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    tracker: _Tracker,
) -> tuple[Edges, Edges]:
    with isolated(model, guide), torch.enable_grad(), pyro.validation_enabled(False):
        handler = poutine.unwrap(guide)
        if isinstance(handler, Messenger):
            raise TypeError("a guide that is an effect handler runs inside of the model")
        with tracker:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        in_guide = dict(tracker.edges)
        draws: Trace = guide_trace.copy()
        for name, value in tracker.values.items():
            draws.nodes[name] = {**draws.nodes[name], "value": value}
        tracker.edges.clear()
        model_trace = poutine.trace(poutine.replay(partial(model, *args, **kwargs), trace=draws)).get_trace()
        in_model = {site["name"]: tracker.parents(site["fn"], site["value"]) for site in sample_sites(model_trace)}
    return in_model, in_guide


class _Tracker(Messenger):
    """Mark what the guide draws, and tell which marks a distribution depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.edges: Edges = {}
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        self.edges[msg["name"]] = self.parents(msg["fn"], msg["value"])
        if not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]] = self.mark(msg["name"], msg["value"])

    def parents(self, fn: Any, value: Any) -> frozenset[str]:
        raise NotImplementedError

    def mark(self, name: str, value: Tensor) -> Tensor:
        raise NotImplementedError


class _Provenance(_Tracker):
    def parents(self, fn: Any, value: Any) -> frozenset[str]:
        bare = detach_provenance(value)
        return frozenset(get_provenance(fn.log_prob(bare))) | frozenset(get_provenance(_parameters(fn)))

    def mark(self, name: str, value: Tensor) -> Tensor:
        return ProvenanceTensor(detach_provenance(value), frozenset({name}))


class _Autograd(_Tracker):
    def __init__(self) -> None:
        super().__init__()
        self.leaves: dict[int, str] = {}
        self.opaque: set[str] = set()

    def parents(self, fn: Any, value: Any) -> frozenset[str]:
        roots = [fn.log_prob(value.detach()), *_parameters(fn)]
        if isinstance(value, Tensor):
            roots.append(value)  # a Delta passes its parent on through its value
        leaves = graph_leaves(root for root in roots if isinstance(root, Tensor))
        own = self.leaves.get(id(value))
        return frozenset({self.leaves[key] for key in leaves if key in self.leaves} - {own}) | frozenset(self.opaque)

    def mark(self, name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            self.opaque.add(name)
            return value
        leaf = value.detach().clone().requires_grad_()
        self.leaves[id(leaf)] = name
        return leaf


def _parameters(fn: Any) -> list[Tensor]:
    """Tensors that a distribution holds: the parents may enter where log_prob does not show them."""
    found, stack = [], [fn]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, torch.distributions.Distribution):
            stack.extend(vars(item).values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return found
