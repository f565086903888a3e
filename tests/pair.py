"""What a pair of the registry is, and how its weights are drawn without the package's estimators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor, nn

__all__ = ["PAIRS", "Pair", "build", "draw_weights", "pair", "parameters", "reference_weights"]


@dataclass
class Pair:
    """Two programs, what they are called with, and what is known of them.

    Attributes:
        dims: dims of the plates that are common to all sites, from the left.
        scale: N/B of the common plates.
        discrete: guide sites whose draws have no reparameterisation.
        refused: subsampled plates that a multi-sample bound has to refuse, by name.
        shareable: whether ``IWELBO(share_globals=True)`` is valid, and weighs local draws only.
        exact: whether the guide is the exact posterior.
        moved: a Delta site of the guide through which parameters move a draw, so that log q can't be held.
        plain: a pair with the same weights that Pyro alone can evaluate, where the pair itself is none.
        rows: for each argument the dim along which the programs take any number of data; None where they take one.
    """

    model: Callable
    guide: Callable
    args: tuple
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    log_evidence: Tensor | None = None
    dims: tuple[int, ...] = (-1,)
    scale: float = 1.0
    discrete: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    shareable: bool = False
    exact: bool = False
    moved: str = ""
    plain: tuple[Callable, Callable] | None = None
    rows: tuple[int, ...] | None = (0,)


PAIRS: dict[str, Callable[[], Pair]] = {}


def pair(make: Callable[[], Pair]) -> Callable[[], Pair]:
    PAIRS[make.__name__] = make
    return make


def build(name: str) -> Pair:
    """New programs of a registered pair, in float64; always with the same numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return PAIRS[name]()


def parameters(pair: Pair) -> list[Tensor]:
    """Leaf tensors of a pair that was run before: of its modules and in Pyro's store."""
    found = [p for program in (pair.model, pair.guide) if isinstance(program, nn.Module) for p in program.parameters()]
    found += [value.unconstrained() for value in pyro.get_param_store().values()]
    return list({id(p): p for p in found if p.requires_grad and p.is_leaf}.values())


def draw_weights(pair: Pair) -> Tensor:
    """Log-weight of one draw of the guide, shape of the common plates, by Pyro's traces alone."""
    model, guide = pair.plain or (pair.model, pair.guide)
    drawn = poutine.trace(guide).get_trace(*pair.args, **pair.kwargs)
    scored = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*pair.args, **pair.kwargs)
    total = torch.zeros(())
    for trace, sign in ((scored, 1.0), (drawn, -1.0)):
        trace.compute_log_prob()
        for site in trace.nodes.values():
            if site["type"] != "sample" or isinstance(site["fn"], poutine.subsample_messenger._Subsample):
                continue
            term = sign * site["log_prob"] / pair.scale
            summed = [d for d in range(-term.dim(), 0) if d not in pair.dims]
            total = total + (term.sum(summed) if summed else term)
    return total.detach()


@cache
def reference_weights(name: str, num: int = 240) -> Tensor:
    """``num`` log-weights ``(num, *plates)``, drawn one by one without any code of the package's estimators."""
    with torch.random.fork_rng(devices=[]), pyro.poutine.block(), torch.no_grad():
        made = build(name)
        torch.manual_seed(11)
        return torch.stack([draw_weights(made) for _ in range(num)])
