r"""Dependencies between sites.  No dependency is missed silently.

The divergence of layer *t*,

.. math:: \mathrm E_q\,\mathrm{KL}\bigl(q(z_t\mid\cdot)\,\|\,p(z_t\mid \mathrm{pa}(z_t))\bigr),

equals the bound's term :math:`\mathrm E_q[\log q(z_t|\cdot)-\log p(z_t|\mathrm{pa}(z_t))]` only where no parent
of :math:`z_t` in the model descends from :math:`z_t` in the guide.  Three analyses search for a path:

1. *order*: draws that the guide made before :math:`z_t` cannot descend from it;
2. *provenance*: draws are marked, and marks are followed through tensor operations (Wingate et al., 2011); this
   follows ``detach`` but loses in-place copies and ``vmap``.  Where Python reads the value of a marked tensor
   (``if``, ``float``, ``item``, numpy), everything later depends on its marks;
3. *autograd*: draws become leaves, and the graph is searched for them; this follows in-place copies but loses
   ``detach`` and discrete draws.  Every later site therefore counts as dependent on a discrete draw.

A path counts if either of the last two finds it; an analysis that fails counts as a path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_hvae.problem.execute import Programs
from pyro_hvae.problem.isolation import isolated
from pyro_hvae.problem.parameters import graph_leaves
from pyro_hvae.problem.structure import Structure

__all__ = ["Dependencies", "dependencies_of", "program_edges"]

Edges = dict[str, frozenset[str]]

VALUE_READERS = frozenset(
    (
        "__array__",
        "__bool__",
        "__complex__",
        "__contains__",
        "__float__",
        "__format__",
        "__index__",
        "__int__",
        "allclose",
        "equal",
        "is_nonzero",
        "item",
        "numpy",
        "tolist",
    )
)


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
        """Return the guide's draws that depend on ``name``, directly or not."""
        later = self.order[self.order.index(name) + 1 :]
        if not self.complete:
            return frozenset(later)
        reached = {name}
        for site in later:
            if self.guide[site] & reached:
                reached.add(site)
        return frozenset(reached - {name})

    def broken_by(self, name: str) -> frozenset[str]:
        """Return the model's parents of ``name`` that descend from it in the guide; with any, its KL is no term."""
        descendants = self.descendants(name)
        return descendants if not self.complete else self.model[name] & descendants


def dependencies_of(programs: Programs, structure: Structure) -> Dependencies:
    """Analyse a pair by one marked run for provenance and one for autograd."""
    order = tuple(name for name in structure.guide_order if name in set(structure.drawn))
    try:
        marked = _edges(programs, _Provenance())
        linked = _edges(programs, _Autograd())
    except Exception:  # programs may reject tensor subclasses; then every later draw counts as a dependency
        return Dependencies({}, {}, order, complete=False)
    if set(marked[1]) != set(structure.guide_order) or set(linked[1]) != set(structure.guide_order):
        return Dependencies({}, {}, order, complete=False)
    return Dependencies(
        model={name: marked[0][name] | linked[0][name] for name in marked[0]},
        guide={name: marked[1][name] | linked[1][name] for name in marked[1]},
        order=order,
        complete=True,
    )


def _edges(programs: Programs, tracker: _Tracker) -> tuple[Edges, Edges]:
    model, guide, kwargs = programs.bound()
    with isolated(programs.model, programs.guide), torch.enable_grad(), pyro.validation_enabled(False):
        if isinstance(poutine.unwrap(guide), Messenger):
            raise TypeError("a guide that is an effect handler runs inside of the model")
        with tracker:
            guide_trace = poutine.trace(guide).get_trace(*programs.args, **kwargs)
        in_guide, draws = tracker.edges, guide_trace.copy()
        for name, value in tracker.values.items():
            draws.nodes[name] = {**draws.nodes[name], "value": value}
        tracker.start_model()
        with tracker:
            poutine.trace(poutine.replay(model, trace=draws)).get_trace(*programs.args, **kwargs)
    return tracker.edges, in_guide


def program_edges(program: Callable[..., Any], args: tuple, kwargs: Any, marks: Mapping[int, str]) -> Edges | None:
    """Return the draws and the marked arguments that each site of one program depends on; None if it can't be analysed.

    Args:
        args, kwargs: of the program.
        marks: names of tensors among the flattened arguments, by position.
    """
    edges: Edges = {}
    for tracker in (_Provenance(), _Autograd()):
        leaves, spec = tree_flatten((args, dict(kwargs)))
        if isinstance(tracker, _Provenance):
            leaves = [tracker.mark(marks[i], leaf) if i in marks else leaf for i, leaf in enumerate(leaves)]
        marked_args, marked_kwargs = tree_unflatten(leaves, spec)
        try:
            with isolated(program), torch.enable_grad(), pyro.validation_enabled(False), tracker:
                program(*marked_args, **marked_kwargs)
        except Exception:  # a program may reject tensor subclasses
            return None
        for name, parents in tracker.edges.items():
            edges[name] = edges.get(name, frozenset()) | parents
    return edges


class _Tracker(Messenger):
    """Mark the guide's draws, and record at each site which marks its distribution depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.edges: Edges = {}
        self.values: dict[str, Tensor] = {}
        self.opaque: set[str] = set()
        self.marking = True

    def start_model(self) -> None:
        """Start recording the model, which is replayed on the guide's marked values."""
        self.edges, self.opaque, self.marking = {}, set(), False

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name = msg["name"]
        self.edges[name] = self.parents(msg["fn"], msg["value"]) | frozenset(self.opaque)
        if self.marking and not msg["is_observed"]:
            msg["value"] = self.values[name] = self.mark(name, msg["value"])

    def parents(self, fn: Any, value: Any) -> frozenset[str]:
        raise NotImplementedError

    def mark(self, name: str, value: Tensor) -> Tensor:
        raise NotImplementedError


class _ValueReads(TorchFunctionMode):
    """Record the marks of tensors whose values Python reads."""

    def __init__(self, opaque: Callable[[frozenset[str]], None]) -> None:
        super().__init__()
        self.note = opaque

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in VALUE_READERS:
            self.note(get_provenance(list(args)))
        elif args and (name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))):
            # Values written into a plain tensor lose their marks.
            written = get_provenance([*args[1:], kwargs or {}])
            if not written <= get_provenance(args[0]):
                self.note(written)
        return func(*args, **(kwargs or {}))


class _Provenance(_Tracker):
    def __enter__(self) -> Any:
        self._reads = _ValueReads(lambda marks: self.opaque.update(marks))
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._reads.__exit__(*error)
        return super().__exit__(*error)

    def parents(self, fn: Any, value: Any) -> frozenset[str]:
        bare, opaque = detach_provenance(value), set(self.opaque)
        marks = frozenset(get_provenance(fn.log_prob(bare))) | frozenset(get_provenance(_parameters(fn)))
        self.opaque = opaque  # values that the density reads are not control flow of the program
        return marks

    def mark(self, name: str, value: Tensor) -> Tensor:
        return ProvenanceTensor(detach_provenance(value), frozenset({name}))


class _Autograd(_Tracker):
    def __init__(self) -> None:
        super().__init__()
        self.leaves: dict[int, str] = {}
        self.discrete: set[str] = set()

    def parents(self, fn: Any, value: Any) -> frozenset[str]:
        roots = [fn.log_prob(value.detach()), *_parameters(fn)]
        if isinstance(value, Tensor):
            roots.append(value)  # a Delta passes its parent on through its value
        leaves = graph_leaves(root for root in roots if isinstance(root, Tensor))
        own = self.leaves.get(id(value))
        return frozenset({self.leaves[key] for key in leaves if key in self.leaves} - {own}) | frozenset(self.discrete)

    def mark(self, name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            self.discrete.add(name)
            return value
        leaf = value.detach().clone().requires_grad_()
        self.leaves[id(leaf)] = name
        return leaf


def _parameters(fn: Any) -> list[Tensor]:
    """Return the tensors that a distribution holds; log_prob need not depend on all of them."""
    tensors, stack = [], [fn]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            tensors.append(item)
        elif isinstance(item, torch.distributions.Distribution):
            stack.extend(vars(item).values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return tensors
