"""Programs by the convention of Pyro's ``SMCFilter``, methods ``init`` and ``step``, as programs of whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Any

import pyro.poutine as poutine
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

__all__ = ["Unrolled", "unroll"]

Segment = Callable[[Any], Any]


def unroll(model: Any, guide: Any) -> tuple[Unrolled, Unrolled]:
    """Make programs of whole sequences from a model and a guide written for :class:`pyro.infer.SMCFilter`.

    The results are ordinary Pyro programs, called with ``(data, *args, **kwargs)``: ``init(state, *args, **kwargs)``
    runs once, then ``step(state, y)`` for each y of ``data``, a tensor with time as its first dim or a sequence of
    tensors, of tuples of arguments, or of dicts of keywords.  :class:`pyro_hvae.SMCBound` steps through them.

    Args:
        model, guide: objects with methods ``init`` and ``step``; the model writes into ``state``, the guide reads it.
            Names of sites differ from step to step, and the programs call nothing but ``pyro.sample`` with particles in
            the leftmost dim.  Where they are modules, so are the results, with their parameters.

    Raises:
        TypeError: for objects without these methods.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> class Walk:
        ...     def init(self, state):
        ...         self.t, state["z"] = 0, pyro.sample("z0", dist.Normal(0.0, 1.0))
        ...     def step(self, state, y):
        ...         self.t += 1
        ...         state["z"] = pyro.sample(f"z{self.t}", dist.Normal(state["z"], 1.0))
        ...         pyro.sample(f"y{self.t}", dist.Normal(state["z"], 1.0), obs=y)
        >>> class Proposal:
        ...     def init(self, state):
        ...         self.t, _ = 0, pyro.sample("z0", dist.Normal(0.0, 1.0))
        ...     def step(self, state, y):
        ...         self.t += 1
        ...         pyro.sample(f"z{self.t}", dist.Normal((state["z"] + y) / 2, 0.8))
        >>> model, guide = unroll(Walk(), Proposal())
        >>> import pyro_hvae as ph
        >>> ph.SMCBound(8).per_datum(model, guide, torch.zeros(5)).shape
        torch.Size([])
    """
    for which, program in (("model", model), ("guide", guide)):
        missing = [name for name in ("init", "step") if not callable(getattr(program, name, None))]
        if missing:
            raise TypeError(
                f"the {which} {type(program).__name__} has no {' and no '.join(missing)}, as SMCFilter needs"
            )
    return Unrolled(model), Unrolled(guide, model)


class Unrolled(PyroModule):
    """A program by the convention of ``SMCFilter``, run over a whole sequence; see :func:`unroll`."""

    def __init__(self, program: Any, model: Any = None) -> None:
        super().__init__("" if model is None else "guide")
        if isinstance(program, nn.Module):
            self.program = program
        self._held = (program,) if model is None else (program, model)

    def forward(self, data: Any, *args: Any, visit: Callable[[Unrolled], Any] | None = None, **kwargs: Any) -> Any:
        if visit is not None:
            return visit(self)
        state: dict[Any, Tensor] = {}
        entered: set[str] = set()

        def entered_before(site: Any) -> bool:
            again = site_is_subsample(site) and site["name"] in entered
            if site_is_subsample(site):
                entered.add(site["name"])
            return again

        own = self.segments(data, *args, **kwargs)
        updates = own if len(self._held) == 1 else list(_segments(self._held[1], data, args, kwargs))
        for segment, update in zip(own, updates, strict=True):
            with poutine.block(hide_fn=entered_before):  # each step makes its plates anew
                if segment is update:
                    segment(state)
                    continue
                with poutine.trace() as tape:
                    segment(MappingProxyType(state))
            with poutine.block():  # the model updates the state, out of sight of what is around the guide
                poutine.replay(update, trace=tape.trace)(state)
        return None

    def segments(self, data: Any, *args: Any, **kwargs: Any) -> list[Segment]:
        """Return the parts of the program in their order, functions of the state of the particles."""
        return list(_segments(self._held[0], data, args, kwargs))


def _segments(program: Any, data: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[Segment]:
    if not isinstance(data, (Tensor, Sequence)) or not len(data):
        raise TypeError(
            f"data is a tensor with time as its first dim or a sequence of steps, got {type(data).__name__}"
        )
    yield lambda state: program.init(state, *args, **kwargs)
    for given in data:
        yield _step(program, given)


def _step(program: Any, given: Any) -> Segment:
    if isinstance(given, dict):
        return lambda state: program.step(state, **given)
    return lambda state: program.step(state, *(given if isinstance(given, tuple) else (given,)))
