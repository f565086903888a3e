r"""Requirements of :class:`~pyro_hvae.bounds.SMCBound` on a pair: programs that list their sites one by one.

The order is that of the guide, :math:`q(z)=\prod_s q(z_s|z_{<s})`.  The model is a product of factors, and each enters
the target as soon as the draws that it depends on are there:

.. math:: \gamma_s(z_{\le s}) = \prod_{f:\,\mathrm{sites}(f)\subseteq\{1..s\}} f(z),\qquad \gamma_S = p(x, z).

========================================== ==============================================================
pair                                       factors that enter with a draw
========================================== ==============================================================
a sequence, guide forwards in time         :math:`p(z_t|z_{t-1})\,p(x_t|z_t)` with :math:`z_t`
``TopDown``, guide ``BottomUp``            :math:`p(x|z_1)` with :math:`z_1`; :math:`p(z_{t-1}|z_t)` with
                                           :math:`z_t`; :math:`p(z_T)` besides with the last
``TopDown``, guide ``Ladder``              :math:`p(z_t|z_{t+1})` with :math:`z_t`; :math:`p(x|z_1)` besides
                                           with the last
========================================== ==============================================================

In the last two rows the targets before the last lack a factor of the latest draw (its prior, or the likelihood), for
which a twist can stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import pyro.poutine as poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_hvae.problem.execute import Particles
from pyro_hvae.problem.structure import sample_sites

__all__ = ["Node", "Segmented", "Stage", "Stepwise", "check_stepwise", "segments_of", "stages_of"]

Node = tuple[str, str, tuple[str, ...], Callable[..., Any]]
"""A site: its kind, its name, the names of the values that it depends on, and a function of these values.

The function of a ``"draw"`` returns a Pyro distribution, that of a ``"factor"`` a log-density that broadcasts to
``(K, *plates)``, that of a ``"value"`` a tensor with particles on the leftmost dim, which later nodes may depend on.
Values have shape ``(K, *plates, *event)``; a function without dependencies may leave out the particles' dim.
"""


class Stepwise(Protocol):
    """A program that lists its sites.

    ``stepwise`` takes the program's arguments and returns the nodes: draws and values of a guide in the order of
    sampling, factors and values of a model in any order.  Calling the program with ``visit=f`` returns ``f(self)``
    from inside of the module's call, where its parameters register.
    """

    def __call__(self, *args: Any, visit: Callable[[Any], Any], **kwargs: Any) -> Any: ...
    def stepwise(self, *args: Any, **kwargs: Any) -> Sequence[Node]: ...


class Segmented(Protocol):
    """A program whose parts are run one after the other, each a function of a state of tensors (K, *plates, *event).

    The model's parts write the state, which is resampled with the particles; the guide's parts read it.
    """

    def __call__(self, *args: Any, visit: Callable[[Any], Any], **kwargs: Any) -> Any: ...
    def segments(self, *args: Any, **kwargs: Any) -> Sequence[Callable[[Any], Any]]: ...


@dataclass
class Stage:
    """One draw of the guide with what is computed before and after it, and the values that are then dropped."""

    draw: Node
    before: list[Node]
    after: list[Node] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def check_stepwise(model: Any, guide: Any) -> None:
    """Refuse programs that do not list their sites.

    Raises:
        TypeError: naming the program, and the bounds that read any pair.
    """
    for which, program in (("model", model), ("guide", guide)):
        if not any(callable(getattr(program, method, None)) for method in ("stepwise", "segments")):
            name = getattr(program, "__name__", None) or type(program).__name__
            raise TypeError(
                f"SMCBound runs a pair site by site, and the {which} {name} has no method stepwise: use the chains of "
                "this package, give the program one (pyro_hvae.bounds.stepwise says which), or use IWELBO, which reads "
                "any pair"
            )


def stages_of(guide: Sequence[Node], model: Sequence[Node]) -> list[Stage]:
    """Order the nodes of a pair: one stage for each draw.

    Raises:
        ValueError: for a node that depends on what nobody draws, and for a kind that the program can't have.
    """
    for which, nodes, kinds in (("guide", guide, ("draw", "value")), ("model", model, ("factor", "value"))):
        for kind, name, *_ in nodes:
            if kind not in kinds:
                allowed = " and ".join(kinds)
                raise ValueError(f"node '{name}' of the {which} is of kind {kind!r}; a {which} has kinds {allowed}")
    stages: list[Stage] = []
    at: dict[str, int] = {}  # the stage at which a value is there
    before: list[Node] = []
    for node in guide:
        _require("guide", node, at)
        kind, name, *_ = node
        at[name] = len(stages)
        before.append(node)
        if kind == "draw":
            stages.append(Stage(before.pop(), before))
            before = []
    if not stages:
        raise ValueError("the guide draws nothing, so there is nothing to resample: use TraceELBO")
    if before:
        raise ValueError(f"value '{before[0][1]}' of the guide comes after its last draw, which nothing depends on")
    for node in _sorted(model, set(at)):
        kind, name, parents, _ = node
        entered = max((at[parent] for parent in parents), default=0)
        stages[entered].after.append(node)
        if kind == "value":
            at[name] = entered
    last = dict(at)  # the stage after which a value is not needed any more
    for index, stage in enumerate(stages):
        for _, _, parents, _ in (*stage.before, stage.draw, *stage.after):
            last.update((parent, max(last[parent], index)) for parent in parents)
    for name, index in last.items():
        stages[index].dropped.append(name)
    return stages


def _sorted(nodes: Sequence[Node], there: set[str]) -> list[Node]:
    """Return the nodes of a model, values before the nodes that depend on them."""
    waiting, done = list(nodes), list[Node]()
    while waiting:
        later: list[Node] = []
        for node in waiting:
            kind, name, parents, _ = node
            if there.issuperset(parents):
                done.append(node)
                if kind == "value":
                    there.add(name)
            else:
                later.append(node)
        if len(later) == len(waiting):
            _require("model", waiting[0], dict.fromkeys(there, 0))
        waiting = later
    return done


def _require(which: str, node: Node, at: dict[str, int]) -> None:
    missing = [parent for parent in node[2] if parent not in at]
    if missing:
        raise ValueError(
            f"node '{node[1]}' of the {which} depends on {missing}, which no earlier node of the guide gives (there "
            f"are {sorted(at)[:10]})"
        )


Move = Callable[[dict[str, Tensor], tuple[int, ...]], tuple[Any, Any]]


def segments_of(guide: Sequence[Callable[[Any], Any]], model: Sequence[Callable[[Any], Any]]) -> list[Move]:
    """Pair the parts of two programs.

    Returns:
        Functions of the state, which they change, and of (K, *plates).  They return log p - log q of the part's sites,
        and the sum of log q over draws that can't be reparameterised, None if there are none.
    """
    if len(guide) != len(model):
        raise ValueError(f"the guide has {len(guide)} parts and the model {len(model)}: both need the same steps")
    return [_move(*parts) for parts in zip(guide, model, strict=True)]


def _move(guide: Callable[[Any], Any], model: Callable[[Any], Any]) -> Move:
    def move(state: dict[str, Tensor], shape: tuple[int, ...]) -> tuple[Any, Any]:
        with poutine.block(hide_fn=lambda site: site["type"] == "sample"), Particles(shape[0], -len(shape)):
            drawn = poutine.trace(guide).get_trace(MappingProxyType(state))
            scored = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(state)
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() < len(shape) or value.shape[0] != shape[0]:
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"state {name!r} is {given}, and {shape[0]} particles are resampled along its first dim: keep what "
                    "all particles share outside of the state"
                )
        increment: Any = 0.0
        score: Any = None
        for trace, sign in ((scored, 1), (drawn, -1)):
            for site in sample_sites(trace):
                term = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
                increment = increment + sign * term
                if sign < 0 and not site["fn"].has_rsample:
                    own = term.expand(shape).sum(0)
                    score = own if score is None else score + own
        return increment, score

    return move
