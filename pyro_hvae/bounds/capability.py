"""What :class:`~pyro_hvae.bounds.DiffusionELBO` asks of a pair and of its arguments: programs whose layers can be
looked at one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_hvae.bounds.base import Program
from pyro_hvae.traces.validation import check_observation

__all__ = ["Reversible", "ReversibleModel", "check_capable", "check_data", "data_of"]


class Reversible(Protocol):
    """A guide whose marginals and reversed steps are known: q(z_t|x) and q(z_s|z_t, x) at times 0 <= s < t <= 1.

    ``num_layers`` layers stand at ``schedule``-like times of :meth:`times`; None is continuous time.  Calling it with
    ``visit=f`` returns ``f(self)`` from inside of the module's call, where its parameters register.
    """

    num_layers: int | None

    def __call__(self, *args: Any, visit: Callable[[Any], Any]) -> Any: ...
    def marginal(self, t: Tensor, x: Tensor) -> Distribution: ...
    def posterior(self, s: Tensor, t: Tensor, z_t: Tensor, x: Tensor) -> Distribution: ...


class ReversibleModel(Protocol):
    """The model of such a chain.  A method ``matching(s, t, z_t, noise, context)``, if there is one, gives the layers'
    divergences in a closed form that loses no digits (and, for ``s=None``, their rate in continuous time)."""

    def __call__(self, *args: Any, visit: Callable[[Any], Any]) -> Any: ...
    def prior(self, like: Tensor) -> Distribution: ...
    def transition(self, s: Tensor, t: Tensor, z_t: Tensor, context: Any = None) -> Distribution: ...
    def likelihood(self, z_1: Tensor, context: Any = None) -> Distribution: ...


def check_capable(model: Program, guide: Program) -> None:
    """Refuse programs without what the bound asks for.

    Raises:
        TypeError: naming what is missing, and the bounds that read any pair.
    """
    for which, program, needed in (
        ("guide", guide, ("marginal", "posterior", "num_layers")),
        ("model", model, ("prior", "transition", "likelihood")),
    ):
        missing = [name for name in needed if not hasattr(program, name)]
        if missing:
            raise TypeError(
                f"DiffusionELBO needs a chain whose marginals are known, and the {which} "
                f"{type(program).__name__} has no {', '.join(missing)}: use LayerwiseELBO or TraceELBO, which "
                "read any pair"
            )


def check_data(p: Any, x: Tensor, context: Any, mask: Tensor | None) -> None:
    """What is wrong with data on which a visit failed, if it is the data.

    Raises:
        ValueError: for data of another shape than the chain's, with NaN, or outside of the likelihood's support.
    """
    prior = p.prior(x)
    if x.shape[1:] != prior.event_shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, that is, data of shape {tuple(x.shape[1:])}; the chain's are of shape "
            f"{tuple(prior.event_shape)}"
        )
    with torch.no_grad():
        prior = prior.expand(x.shape[:1])
        check_observation("x", prior, x, mask)
        check_observation("x", p.likelihood(prior.sample(), context), x, mask)


def data_of(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Any, Tensor | None, int | None]:
    """x, context, mask and data_size of a call.

    Raises:
        TypeError: for other arguments, or data that are no tensor.
    """
    known = {"x", "context", "mask", "data_size"}
    unknown = sorted(set(kwargs) - known)
    if unknown or len(args) > 1:
        raise TypeError(
            f"a diffusion is called with (x, *, context, mask, data_size); got {len(args)} positional, {unknown}"
        )
    x = args[0] if args else kwargs.get("x")
    if not isinstance(x, Tensor):
        raise TypeError(f"DiffusionELBO needs data x as a tensor, got {type(x).__name__}")
    return x, kwargs.get("context"), kwargs.get("mask"), kwargs.get("data_size")
