r"""Particles down a diffusion that is conditioned on an observation, by twists.

.. math:: \hat p(y):\quad w_T = \psi_T(z_T),\qquad
          w_{t-1} = \frac{p(z_{t-1}|z_t)\,\psi_{t-1}(z_{t-1})}{q(z_{t-1}|z_t,y)\,\psi_t(z_t)},\qquad
          w_0 = \frac{p(x|z_1)\,p(y|x)}{q(x|z_1,y)\,\psi_1(z_1)}.

The twists cancel but for the order in which the likelihood enters, so :math:`\mathrm E\,\hat p(y) = p(y)` whatever they
are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_hvae.bounds.particles import Filtered, Resampling, run_particles
from pyro_hvae.bounds.stepwise import Node, Stage

__all__ = ["Conditionable", "Twist", "Twisted", "twisted_particles"]


class Twisted(Protocol):
    """A twist at values of z_t: its logarithm (...), the chain's estimate of x, and the proposal's."""

    @property
    def log_psi(self) -> Tensor: ...
    @property
    def estimate(self) -> Tensor: ...
    @property
    def shifted(self) -> Tensor: ...


class Twist(Protocol):
    """The twists of a chain by a likelihood of x, and its layers with an estimate of x given.

    ``example(*shape)`` is an argument of the likelihood with these leading dims, and ``argument(x)`` that of a draw.
    """

    def at(self, t: Tensor, z: Tensor) -> Twisted: ...
    def layer(self, s: Tensor, t: Tensor, z: Tensor, estimate: Tensor) -> Distribution: ...
    def last(self, t: Tensor, z: Tensor, estimate: Tensor) -> Distribution: ...
    def example(self, *shape: int) -> Tensor: ...
    def argument(self, x: Tensor) -> Tensor: ...


class Conditionable(Protocol):
    """A generative chain of denoising layers that gives twists.

    Calling it with ``visit=f`` returns ``f(self)`` from inside of the module's call, where its parameters register.
    """

    num_layers: int | None

    def __call__(self, *, visit: Callable[[Any], Any]) -> Any: ...
    def time(self, index: Any) -> Any: ...
    def reference(self) -> Tensor: ...
    def prior(self, like: Tensor) -> Distribution: ...
    def twisted(
        self, log_likelihood: Callable[[Tensor], Tensor], context: Any, *, cg_iterations: int, denoiser_error: float
    ) -> Twist: ...


class _Names(NamedTuple):
    """Names of the values of one layer."""

    z: str
    log_psi: str
    estimate: str
    shifted: str


def twisted_particles(
    chain: Conditionable,
    twist: Twist,
    log_likelihood: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    resampling: Resampling,
) -> Filtered:
    """Run K particles for each datum from z_T to x; ``last["x"]`` has the draws.

    Args:
        chain: of T layers.
        twist: of the chain.
        log_likelihood: log p(y|x) of a draw's ``argument``, (K, *plates).
        shape: (K, *plates).
        resampling: how particles are resampled.
    """
    assert chain.num_layers is not None
    like = chain.reference()
    times = chain.time(torch.arange(1, chain.num_layers + 1, dtype=like.dtype, device=like.device))
    names = [_Names(f"z{i}", f"psi{i}", f"estimate{i}", f"shifted{i}") for i in range(1, chain.num_layers + 1)]
    top = len(names) - 1
    stages = [_first(chain.prior(like), twist, times[top], names[top])]
    for i in range(top, 0, -1):
        stages.append(_layer(twist, (times[i - 1], times[i]), names[i], names[i - 1]))
    stages.append(_last(twist, log_likelihood, times[0], names[0]))
    return run_particles(stages, shape, resampling)


def _first(prior: Distribution, twist: Twist, t: Tensor, own: _Names) -> Stage:
    draw: Node = ("draw", own.z, (), lambda: prior)
    density: Node = ("factor", "prior", (own.z,), prior.log_prob)
    enters: Node = ("factor", "twist", (own.log_psi,), lambda psi: psi)
    return Stage(draw, [], [*_values(twist, t, own), density, enters])


def _layer(twist: Twist, times: tuple[Tensor, Tensor], above: _Names, own: _Names) -> Stage:
    s, t = times
    draw: Node = ("draw", own.z, (above.z, above.shifted), lambda z, shifted: twist.layer(s, t, z, shifted))

    def density(z: Tensor, estimate: Tensor, value: Tensor) -> Tensor:
        return twist.layer(s, t, z, estimate).log_prob(value)

    layer: Node = ("factor", "layer", (above.z, above.estimate, own.z), density)
    enters: Node = ("factor", "twist", (own.log_psi, above.log_psi), torch.sub)
    return Stage(draw, [], [*_values(twist, s, own), layer, enters], list(above))


def _last(twist: Twist, log_likelihood: Callable[[Tensor], Tensor], t: Tensor, above: _Names) -> Stage:
    draw: Node = ("draw", "x", (above.z, above.shifted), lambda z, shifted: twist.last(t, z, shifted))

    def density(z: Tensor, estimate: Tensor, x: Tensor) -> Tensor:
        return twist.last(t, z, estimate).log_prob(x)

    def likelihood(x: Tensor, psi: Tensor) -> Tensor:
        return log_likelihood(twist.argument(x)) - psi

    layer: Node = ("factor", "layer", (above.z, above.estimate, "x"), density)
    enters: Node = ("factor", "likelihood", ("x", above.log_psi), likelihood)
    return Stage(draw, [], [layer, enters], list(above))


def _values(twist: Twist, t: Tensor, own: _Names) -> list[Node]:
    """Return the nodes of a layer's twist, which is computed once."""
    computed: list[Twisted] = []

    def log_psi(z: Tensor) -> Tensor:
        computed[:] = [twist.at(t, z)]
        return computed[0].log_psi

    return [
        ("value", own.log_psi, (own.z,), log_psi),
        ("value", own.estimate, (), lambda: computed[0].estimate),
        ("value", own.shifted, (), lambda: computed.pop().shifted),
    ]
