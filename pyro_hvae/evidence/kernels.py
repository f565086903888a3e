r"""Uncorrected Hamiltonian annealing as a forward and a backward chain, with parameters that are learned.

On the real line (:mod:`pyro_hvae.evidence.path`), with momenta r of unit variance, a step t = 1, ..., T of the forward
chain refreshes the momentum and makes one leapfrog step of :math:`\log f_{\beta_t}`,

.. math:: r'_t = \eta_t r_{t-1} + \sqrt{1-\eta_t^2}\,(\epsilon + m^F_t(u_{t-1})), \qquad
          (u_t, r_t) = \mathrm{leapfrog}_{\beta_t, h_t}(u_{t-1}, r'_t), \qquad r'_1 = \epsilon + m^F_1(u_0),

from :math:`u_0\sim q`.  The backward chain starts at the posterior, :math:`r_T\sim N(m^B_{T}(u_T), c^2_T)`, inverts
each leapfrog step exactly, and draws :math:`r_{t-1}` from
:math:`N(\eta_t r'_t + \sqrt{1-\eta_t^2}\,(m^B_{t-1}(u_{t-1}) + d_tr'_t),\,(1-\eta_t^2)c_{t-1}^2)`.  Leapfrog steps
preserve volume (also with bounded scores, which keep them from diverging), so that the ratio of the two chains is

.. math:: \log w = \log p(x, u_T) - \log q(u_0) + \log N_B(r_T\mid u_T) - \log N_F(r'_1\mid u_0)
          + \sum_{t=2}^T\log\frac{N_B(r_{t-1}\mid r'_t, u_{t-1})}{N_F(r'_t\mid r_{t-1}, u_{t-1})}.

With corrections :math:`m = 0, d = 0, c = 1` this is uncorrected Hamiltonian annealing.  The corrections are, coordinate
by coordinate, affine in the two scores :math:`\nabla\log q` and :math:`\nabla\log p` at u, so that they apply to every
datum by its own scores, and two Gaussians with independent coordinates are joined exactly.  A network for each chain
may be added to them (:mod:`pyro_hvae.evidence.networks`), whose m and log c depend on state, scores and momentum.

Gradients in the corrections would be mostly noise, and two terms of zero mean take it away.  The forward ones lose
:math:`\nabla\log N_F`, the score of the chain that draws.  The backward ones lose a share of
:math:`\nabla\log N_B`, the chain's weight by the mean weight of the other chains, since
:math:`\mathrm E[w\,\nabla\log N_B] = 0`; where weights are equal nothing is left of it.

References: MCMC Variational Inference via Uncorrected Hamiltonian Annealing (Geffner and Domke, 2021); Sticking the
Landing (Roeder, Wu and Duvenaud, 2017) for the forward gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_hvae.evidence.networks import MomentumNetwork
from pyro_hvae.evidence.path import Path, State

__all__ = ["AnnealingKernels", "Point"]


_STEP = 0.25
"""Leapfrog steps to start with, in standard deviations of the base."""


_LARGEST = 20.0
"""Bound of the scores in standard coordinates."""


Held = tuple[str, ...]
"""Parameters without a gradient: corrections of the ``"forward"`` or ``"backward"`` chain, or the ``"shared"`` ones."""


class Point(NamedTuple):
    """A state with log-densities of base and joint, per chain and datum, and their gradients."""

    state: State
    log_q: Tensor
    log_p: Tensor
    score_q: State
    score_p: State


class AnnealingKernels(nn.Module):
    """Parameters of both chains for the sites of a path, shared by all data.

    Masses start at the inverse variances of the base's draws, and steps at a quarter of its standard deviations.

    Args:
        path: of the problem, with two or more chains; gives the sites, their shapes and the base's draws.
        num_temperatures: T.
        correction: whether the chains' momenta are corrected by the scores.
        hidden: widths of the networks that correct them too; empty for none.
    """

    def __init__(self, path: Path, num_temperatures: int, *, correction: bool, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        path.require_continuous("learned annealing")
        self.num_temperatures, self.correction = num_temperatures, correction
        self.shapes = {name: path.shared_shape(name) for name in path.transforms}
        self.names = {name: f"site{number}" for number, name in enumerate(self.shapes)}
        steps, like = num_temperatures, next(iter(path.problem.template.nodes[n]["value"] for n in self.shapes))
        kind: dict[str, Any] = {"dtype": like.dtype if like.is_floating_point() else None, "device": like.device}
        self.increments = nn.Parameter(torch.zeros(steps + 1, **kind))
        self.log_step = nn.Parameter(torch.full((steps,), math.log(_STEP), **kind))
        self.damping = nn.Parameter(torch.full((steps,), 1.0, **kind))
        draws = path.start()
        for name, shape in self.shapes.items():
            variance = draws[name].var(0).clamp(min=1e-12).log()
            shared = [d for d, size in enumerate(shape) if size == 1 and d < variance.dim()]
            log_scale = 0.5 * (variance.mean(shared, keepdim=True) if shared else variance)
            site = nn.ParameterDict({"log_scale": log_scale.expand(shape).to(**kind)})
            if correction:
                for key in ("forward_q", "forward_p", "forward_shift", "backward_q", "backward_p", "backward_shift"):
                    site[key] = torch.zeros(steps, *shape, **kind)
                site["backward_momentum"] = torch.zeros(steps, *shape, **kind)
                site["backward_log_sd"] = torch.zeros(steps, *shape, **kind)
            self.add_module(self.names[name], site)
        self.networks = nn.ModuleDict()
        if hidden:
            self.networks["forward_chain"] = MomentumNetwork(path, steps, 1, hidden)
            self.networks["backward_chain"] = MomentumNetwork(path, steps, 2, hidden)

    @property
    def betas(self) -> Tensor:
        """Temperatures of the T steps, increasing within (0, 1)."""
        return self.increments.softmax(0).cumsum(0)[:-1]

    def site(self, name: str) -> Any:
        """Return the parameters of a site."""
        return getattr(self, self.names[name])

    @staticmethod
    def point(path: Path, state: State) -> Point:
        """Evaluate both densities and their gradients; differentiable where gradients are enabled."""
        outer = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = state if outer else {name: value.detach() for name, value in state.items()}
            leaves = {n: v if v.requires_grad else v.requires_grad_() for n, v in leaves.items()}
            log_q, log_p = path.densities(leaves)
            slopes = [
                torch.autograd.grad(
                    density.sum(),
                    list(leaves.values()),
                    create_graph=outer,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for density in (log_q, log_p)
            ]
        score_q, score_p = (dict(zip(leaves, one, strict=True)) for one in slopes)
        if outer:
            return Point(leaves, log_q, log_p, score_q, score_p)
        state = {name: value.detach() for name, value in leaves.items()}
        return Point(state, log_q.detach(), log_p.detach(), score_q, score_p)

    def forward(self, path: Path, state: State) -> tuple[Tensor, State]:
        """Run the forward chain from draws of the base; return log-weights ``(K, *plates)`` and the last state."""
        here = self.point(path, state)
        log_w = -here.log_q
        momentum: State = {}
        undone: Any = 0.0
        for t in range(self.num_temperatures):
            mean, sd = self._forward_mean(path, here, t, momentum), self._refreshed_sd(t)
            fresh = {name: m + sd * torch.randn_like(m) for name, m in mean.items()}
            log_w = log_w - self._log_forward(path, here, t, momentum, fresh, held=("forward",))
            if t:
                log_w = log_w + self._log_backward(path, here, t, momentum, fresh)
                undone = undone + self._undone(path, here, t, momentum, fresh)
            here, momentum = self._leapfrog(path, here, fresh, t, 1.0)
        last = self.num_temperatures
        log_w = log_w + here.log_p + self._log_backward(path, here, last, momentum, None)
        undone = undone + self._undone(path, here, last, momentum, None)
        if isinstance(undone, Tensor):
            log_w = log_w - share_of_others(log_w.detach()) * (undone - undone.detach())
        return log_w, here.state

    def backward_chain(self, path: Path, state: State) -> Tensor:
        """Run the backward chain from posterior draws; return the log-weights of its path, ``(K, *plates)``."""
        here = self.point(path, state)
        log_w = here.log_p
        fresh: State | None = None
        for t in range(self.num_temperatures, 0, -1):
            mean, log_sd = self._backward_mean(path, here, t, fresh)
            momentum = {name: m + log_sd[name].exp() * torch.randn_like(m) for name, m in mean.items()}
            log_w = log_w + self._log_normal(path, momentum, mean, log_sd)
            if fresh is not None:
                log_w = log_w - self._log_forward(path, here, t, momentum, fresh)
            here, fresh = self._leapfrog(path, here, momentum, t - 1, -1.0)
        assert fresh is not None
        return log_w - here.log_q - self._log_forward(path, here, 0, {}, fresh)

    def _leapfrog(self, path: Path, here: Point, momentum: State, t: int, sign: float) -> tuple[Point, State]:
        """Make one leapfrog step forwards or, with ``sign=-1``, its inverse."""
        beta = self.betas[t]
        size = sign * self.log_step[t].exp()

        def kicked(at: Point, momentum: State) -> State:
            return {
                name: r + 0.5 * size * ((1 - beta) * self._score(at, name, "q") + beta * self._score(at, name, "p"))
                for name, r in momentum.items()
            }

        half = kicked(here, momentum)
        moved = {name: size * self.site(name)["log_scale"].exp() * r for name, r in half.items()}
        there = self.point(path, {name: u + moved[name] for name, u in here.state.items()})
        return there, kicked(there, half)

    def _undone(self, path: Path, here: Point, t: int, momentum: State, fresh: State | None) -> Tensor | float:
        """Return log N_B of a step, with a gradient in the corrections of the backward chain alone."""
        if not (self.correction and torch.is_grad_enabled()):
            return 0.0

        def fixed(state: State) -> State:
            return {name: value.detach() for name, value in state.items()}

        still = Point(
            fixed(here.state), here.log_q.detach(), here.log_p.detach(), fixed(here.score_q), fixed(here.score_p)
        )
        return self._log_backward(
            path, still, t, fixed(momentum), None if fresh is None else fixed(fresh), held=("shared",)
        )

    def _keep(self, t: int, held: Held = ()) -> Tensor:
        """Return the share of the momentum that step t + 1 keeps; none at the first step."""
        damping = self.damping.detach() if "shared" in held else self.damping
        return damping[t].sigmoid() if t else torch.zeros_like(damping[0])

    def _refreshed_sd(self, t: int) -> Tensor:
        return (1 - self._keep(t) ** 2).sqrt()

    def _shift(self, here: Point, name: str, t: int, way: str, held: Held) -> Tensor | float:
        """Return the correction of a momentum: affine in the two scores."""
        if not self.correction:
            return 0.0
        by_q, by_p, shift = (
            value.detach() if way in held else value
            for value in (self.site(name)[f"{way}_{key}"][t] for key in ("q", "p", "shift"))
        )
        return by_q * self._score(here, name, "q", held) + by_p * self._score(here, name, "p", held) + shift

    def _score(self, at: Point, name: str, which: str, held: Held = ()) -> Tensor:
        """Return a score in standard coordinates, bounded so that steps in a steep tail do not diverge.

        A kick by any function of the position preserves volume and has an inverse, so that the weights stay exact.
        """
        score = at.score_q[name] if which == "q" else at.score_p[name]
        log_scale = self.site(name)["log_scale"]
        log_scale = log_scale.detach() if "shared" in held else log_scale
        return (log_scale.exp() * score).nan_to_num(nan=0.0).clamp(-_LARGEST, _LARGEST)

    def _by_network(self, path: Path, here: Point, t: int, momentum: State, way: str, held: Held) -> list[Any]:
        """Return the networks' shifts and changes of log sds by site, 0 without networks."""
        if not self.networks:
            return [dict.fromkeys(self.shapes, 0.0)] * 2
        scores = [{name: self._score(here, name, which, held) for name in self.shapes} for which in ("q", "p")]
        return self.networks[f"{way}_chain"](path, here.state, scores, momentum, t, held=way in held)

    def _forward_mean(self, path: Path, here: Point, t: int, momentum: State, held: Held = ()) -> State:
        keep, sd = self._keep(t), self._refreshed_sd(t)
        shift = self._by_network(path, here, t, momentum, "forward", held)[0]
        return {
            name: sd * (self._shift(here, name, t, "forward", held) + shift[name])
            + (keep * momentum[name] if t else torch.zeros_like(here.state[name]))
            for name in self.shapes
        }

    def _backward_mean(
        self, path: Path, here: Point, t: int, fresh: State | None, held: Held = ()
    ) -> tuple[State, State]:
        """Return mean and log sd of the momentum after step t, given that of step t + 1 refreshed."""
        last = fresh is None
        keep = torch.zeros_like(self.damping[0]) if last else self._keep(t, held)
        sd = (1 - keep**2).sqrt()
        shift, change = self._by_network(path, here, t - 1, fresh or {}, "backward", held)
        mean, log_sd = {}, {}
        for name in self.shapes:
            value = sd * (self._shift(here, name, t - 1, "backward", held) + shift[name])
            value = value + torch.zeros_like(here.state[name])
            log_sd[name] = sd.log() + change[name]
            if self.correction:
                log_sd[name] = log_sd[name] + self.site(name)["backward_log_sd"][t - 1]
            if fresh is not None:
                weight: Any = keep
                if self.correction:
                    weight = weight + sd * self.site(name)["backward_momentum"][t - 1]
                value = value + weight * fresh[name]
            mean[name] = value
        return mean, log_sd

    def _log_backward(
        self, path: Path, here: Point, t: int, momentum: State, fresh: State | None, *, held: Held = ()
    ) -> Tensor:
        mean, log_sd = self._backward_mean(path, here, t, fresh, held)
        return self._log_normal(path, momentum, mean, log_sd)

    def _log_forward(
        self, path: Path, here: Point, t: int, momentum: State, fresh: State, *, held: Held = ()
    ) -> Tensor:
        mean, sd = self._forward_mean(path, here, t, momentum, held), self._refreshed_sd(t)
        return self._log_normal(path, fresh, mean, dict.fromkeys(mean, sd.log()))

    @staticmethod
    def _log_normal(path: Path, value: State, mean: State, log_sd: State) -> Tensor:
        constant = 0.5 * math.log(2 * math.pi)
        terms = {name: (v - mean[name]) * (-log_sd[name]).exp() for name, v in value.items()}
        return path.per_datum({name: -0.5 * z**2 - log_sd[name] - constant for name, z in terms.items()})


def share_of_others(log_w: Tensor) -> Tensor:
    """Return each weight by the mean weight of the other chains, ``(K, *plates)``.

    0 where the effective sample size of the others is below half of their number, which does not depend on the chain
    itself: the share may be used with any function of zero mean under the weights.
    """
    count = len(log_w)
    if count < 2:
        return torch.zeros_like(log_w)
    relative = (log_w - log_w.amax(0)).exp()
    others = relative.sum(0) - relative
    even = others**2 > 0.5 * (count - 1) * ((relative**2).sum(0) - relative**2)
    return torch.where(even, (count - 1) * relative / others.clamp(min=torch.finfo(relative.dtype).tiny), 0.0)
