"""Parameters of a pair: list them, check that they are trained, freeze them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine import Trace
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_hvae.problem.isolation import RUNNING

__all__ = ["check_trained", "frozen", "graph_leaves", "make_registrable", "param_sites", "trainable"]


def param_sites(*traces: Trace | None) -> dict[str, Tensor]:
    """Return the unconstrained parameter of each ``pyro.param`` statement in the traces, by name."""
    return {
        site["name"]: unconstrained(site["value"])
        for trace in traces
        if trace is not None
        for site in trace.nodes.values()
        if site["type"] == "param"
    }


def unconstrained(value: Tensor) -> Tensor:
    """Return the leaf behind a parameter's value."""
    reference = getattr(value, "unconstrained", None)
    return value if reference is None else reference()


def trainable(model: Any, guide: Any, *traces: Trace | None) -> list[Tensor]:
    """Return every parameter that the pair owns or names, each once."""
    parameters = {id(parameter): parameter for parameter in param_sites(*traces).values()}
    for program in (model, guide):
        if isinstance(program, nn.Module):
            parameters.update({id(parameter): parameter for parameter in program.parameters()})
    return list(parameters.values())


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Treat parameters as constants inside of the block; gradients through other tensors are kept.

    All threads see the same parameters, so :data:`RUNNING` is held: by this block, and by whatever makes a graph of
    the parameters or sends a gradient to them.
    """
    with RUNNING:
        held = [parameter for parameter in parameters if parameter.requires_grad and parameter.is_leaf]
        try:
            for parameter in held:
                parameter.requires_grad_(False)
            with warnings.catch_warnings():  # pyro.module warns of each frozen parameter
                warnings.filterwarnings("ignore", message=".*was not registered in the param store.*")
                yield
        finally:
            for parameter in held:
                parameter.requires_grad_(True)


def graph_leaves(roots: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return the leaf tensors that a gradient of ``roots`` would reach, by ``id``."""
    leaves: dict[int, Tensor] = {}
    stack: list[Any] = []
    for root in roots:
        if root.grad_fn is not None:
            stack.append(root.grad_fn)
        elif root.requires_grad:
            leaves[id(root)] = root
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves[id(variable)] = variable
        stack.extend(parent for parent, _ in node.next_functions)
    return leaves


def make_registrable(*traces: Trace) -> None:
    """Give module parameters the attribute ``unconstrained`` that ``pyro.infer.SVI.step`` reads.

    With ``module_local_params`` Pyro hands out ``nn.Parameter`` objects as values of parameter sites, which lack
    the ``unconstrained()`` that its own ``SVI.step`` calls; the reference is the one that the store would set.
    """
    for trace in traces:
        for site in trace.nodes.values():
            if site["type"] == "param" and not hasattr(site["value"], "unconstrained"):
                site["value"].unconstrained = weakref.ref(site["value"])


def check_trained(
    called: Any,
    traces: tuple[Trace, ...],
    loss: Tensor,
    *,
    route: str,
    trains: tuple[str, ...] = ("model", "guide"),
    again: Callable[[], Tensor] | None = None,
) -> None:
    """Refuse a pair of which a parameter would silently stay untrained.

    Args:
        called: model, guide, args and kwargs, as attributes.
        route: ``"store"`` for :class:`pyro.infer.SVI`, which moves the parameters of ``pyro.param`` statements, or
            ``"module"`` for an optimiser over ``objective.parameters()``.
        trains: which of the two programs the objective is meant to train.
        again: computes the loss once more; leaves that differ then are not parameters.

    Raises:
        ValueError: naming the parameters and the reason.
    """
    programs = {"model": called.model, "guide": called.guide}
    owned = {
        id(parameter): (f"{which}.{name}", parameter)
        for which in trains
        if isinstance(programs[which], nn.Module)
        for name, parameter in programs[which].named_parameters()
        if parameter.requires_grad
    }
    sites = param_sites(*traces)
    stored = {id(parameter) for parameter in sites.values()}
    arguments = {id(leaf) for leaf in tree_leaves((called.args, dict(called.kwargs))) if isinstance(leaf, Tensor)}
    reached = {key: leaf for key, leaf in graph_leaves([loss]).items() if key not in arguments}

    if route == "store":
        lost = [name for key, (name, _) in owned.items() if key not in stored]
        nameless = [leaf for key, leaf in reached.items() if key not in stored and key not in owned]
        if lost:
            raise ValueError(_untrained_by_svi(lost, sites))
        if nameless and again is not None:
            repeated = again()  # kept, so that no new leaf takes the place of an old one
            lasting = graph_leaves([repeated])
            nameless = [leaf for leaf in nameless if id(leaf) in lasting]
        if nameless:
            shapes = [tuple(leaf.shape) for leaf in nameless]
            raise ValueError(
                f"SVI would leave {len(nameless)} parameter(s) of shapes {shapes[:5]} untrained: the loss depends on "
                "them, but no pyro.param or pyro.module statement names them. Register their module with "
                "pyro.module(name, module) in the program, or write the program as a pyro.nn.PyroModule."
            )
        return

    everything_owned = all(isinstance(program, nn.Module) for program in programs.values())
    lost = [name for key, (name, _) in owned.items() if key not in reached]
    if lost:
        raise ValueError(_untrained_by_module(lost, sites, reached))
    if everything_owned:
        members = {id(p) for program in programs.values() for p in program.parameters()}
        foreign = [
            name for name, parameter in sites.items() if id(parameter) in reached and id(parameter) not in members
        ]
        if foreign:
            raise ValueError(
                f"an optimiser over objective.parameters() would leave {_few(foreign)} untrained: the programs read "
                "them from Pyro's parameter store, which has tensors of another program under these names. Call "
                "pyro.clear_param_store() before building the programs, or give each a name of its own."
            )


def _untrained_by_svi(lost: list[str], sites: dict[str, Tensor]) -> str:
    text = f"SVI would leave {len(lost)} parameter(s) untrained: {_few(lost)}. "
    if not sites:
        return text + (
            "The programs ran no pyro.param or pyro.module statement, so the parameter store is empty: call the "
            "module itself (not another method of it), keep kernels in attributes (not in an nn.ModuleDict), or "
            "train objective = bound(model, guide) with a torch optimiser."
        )
    return text + (
        "The parameter store holds other tensors under their names (a second program of the same name, or a store "
        "left over from an earlier one), or no statement registers them. Call pyro.clear_param_store() first, give "
        "the programs different names, or, if that is intended, call requires_grad_(False) on them. "
        f"Names in the store: {_few(sorted(sites))}."
    )


def _untrained_by_module(lost: list[str], sites: dict[str, Tensor], reached: dict[int, Tensor]) -> str:
    text = f"the loss does not depend on {len(lost)} parameter(s), which would stay untrained: {_few(lost)}. "
    if any(id(parameter) in reached for parameter in sites.values()):
        text += (
            "If Pyro's parameter store has another program's tensors under their names, call "
            "pyro.clear_param_store() or give the programs different names. "
        )
    return text + "If that is intended, call requires_grad_(False) on them."


def _few(names: list[str], most: int = 6) -> str:
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed}, ... ({len(names)} in all)"
