"""A bound by annealing whose path is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.arguments import check_count
from pyro_hvae.bounds.base import Bound, Estimate, Evaluation
from pyro_hvae.evidence.interval import Interval
from pyro_hvae.evidence.kernels import AnnealingKernels
from pyro_hvae.evidence.moves import Moves
from pyro_hvae.evidence.path import Path, State
from pyro_hvae.evidence.roughness import warn_if_rough
from pyro_hvae.evidence.sandwich import posterior_starts
from pyro_hvae.evidence.sides import DRAWS_ASSUMED, MOMENT_ASSUMED, NONE_ASSUMED, Sides, Weights
from pyro_hvae.problem import Problem, problem_of
from pyro_hvae.problem.draws import count_draws
from pyro_hvae.problem.isolation import evaluating
from pyro_hvae.weights import check_weights, log_mean_exp

__all__ = ["AnnealedBound"]

_DRAWS = 64
"""Draws of the guide from which the masses start."""


class AnnealedBound(Bound):
    r"""Evidence lower bound by uncorrected Hamiltonian annealing from the guide to the posterior.

    :math:`\mathrm E\log w\le\log p(x)` with the weights of :mod:`pyro_hvae.evidence.kernels`.  Temperatures, step
    sizes, masses, damping and the corrections of the momenta are parameters of the bound; the initial distribution is
    the guide.  All are trained together, with the model.  Latents are continuous, and moved on the real line;
    parameters are per coordinate and shared by all data.

    ``pyro_hvae.fit`` trains the bound's parameters.  In a loop of one's own call :meth:`prepare` before the optimiser
    is made, and give it the bound's parameters too; ``bound(model, guide).parameters()`` has all.

    Gradients pass through the chains' steps, so that they need second derivatives of both densities.  Where scores
    jump, as those of networks with ReLU do, gradients are biased and a warning says so; the bound's value stays right.

    Args:
        num_temperatures: T >= 1 steps, each with one gradient of log q and of log p.
        num_particles: K chains, whose log-weights are averaged.
        correction: whether the momenta of both chains are corrected by the scores; without, the bound is that of
            Geffner and Domke.
        hidden: widths of the hidden layers of two networks, one for each chain, that correct the momenta from the
            state, both scores and the momentum; for posteriors that are far from Gaussian.  Without them corrections
            are affine in the scores, coordinate by coordinate.

    Raises:
        ValueError: for counts below one, and when it is run, for discrete latents or a guide without reparameterised
            draws, or where :meth:`prepare` was not called.

    References:
        MCMC Variational Inference via Uncorrected Hamiltonian Annealing (Geffner and Domke, 2021); Monte Carlo
        Variational Auto-Encoders (Thin et al., 2021); Score-Based Diffusion Meets Annealed Importance Sampling
        (Doucet, Grathwohl, Matthews and Strathmann, 2022) for backward kernels that are learned.

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> _ = torch.manual_seed(0)
        >>> x, q = torch.tensor([0.0, 2.0]), guide(slope=0.3, scale=0.9)
        >>> bound = AnnealedBound(2, num_particles=16).prepare(model, q, x)
        >>> optimizer = torch.optim.Adam(bound.parameters(), lr=0.05)
        >>> before = bound.interval(model, q, x, num_chains=2000).width.mean()
        >>> for _ in range(60):
        ...     optimizer.zero_grad()
        ...     bound.differentiable_loss(model, q, x).backward()
        ...     optimizer.step()
        >>> bool(bound.interval(model, q, x, num_chains=2000).width.mean() < before)
        True
    """

    kernels: AnnealingKernels | None

    def __init__(
        self, num_temperatures: int, num_particles: int = 1, *, correction: bool = True, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__(num_particles)
        if num_temperatures < 1:
            raise ValueError(f"num_temperatures must be at least 1, got {num_temperatures}")
        if isinstance(hidden, str) or not isinstance(hidden, Sequence):
            raise ValueError(f"hidden must be a sequence of widths, got {hidden!r}")
        for width in hidden:
            check_count("every width in hidden", width)
        if hidden and not correction:
            raise ValueError(
                f"hidden={hidden!r} are widths of networks that correct the momenta: leave correction=True"
            )
        self.num_temperatures, self.correction, self.hidden = num_temperatures, correction, tuple(hidden)
        self.kernels = None

    def _arguments(self) -> dict[str, Any]:
        return {
            "num_temperatures": self.num_temperatures,
            "num_particles": self.num_particles,
            "correction": self.correction,
            **({"hidden": self.hidden} if self.hidden else {}),
        }

    @evaluating()
    def prepare(self, model: Any, guide: Any = None, *args: Any, **kwargs: Any) -> AnnealedBound:
        """Make the parameters for the latents of a pair; do nothing where they are made.

        Returns:
            This bound.

        Raises:
            ValueError: for latents that can't be annealed.
        """
        if self.kernels is None:
            problem = problem_of(model, guide, args, kwargs)
            problem.require_density("annealing")
            path = Path(problem, _DRAWS)
            self.kernels = AnnealingKernels(
                path, self.num_temperatures, correction=self.correction, hidden=self.hidden
            )
            warn_if_rough(path)
        return self

    def estimate(self, problem: Problem) -> Estimate:
        log_weights, run = self._forward(problem, self.num_particles)
        value = log_weights.mean(0)
        return Estimate(value, value, run.scale, run=run)

    def evaluate(self, problem: Problem) -> Evaluation:
        """Return the bound, and the part of it that the guide alone has, ``elbo``."""
        log_weights, run = self._forward(problem, self.num_particles)
        value = log_weights.mean(0)
        elbo = run.log_weights.mean(0)
        return Evaluation(value, {"elbo": elbo, "annealing": value - elbo}, run.structure, run.scale)

    def loss_and_grads(self, model: Any, guide: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse: Pyro's optimisers see the parameter store, which the bound's parameters are not in.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "pyro.infer.SVI would leave the parameters of AnnealedBound untrained, since they are not in Pyro's store: "
            "use pyro_hvae.fit(..., bound=...), or bound(model, guide) with a torch optimiser after bound.prepare(...)"
        )

    @evaluating()
    def interval(
        self,
        model: Any,
        guide: Any = None,
        *args: Any,
        delta: float = 0.05,
        num_chains: int = 64,
        posterior_samples: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Interval:
        """Bound log p(x) from both sides by the learned chains, as :func:`pyro_hvae.evidence_interval` does.

        Args:
            num_chains: K for each datum and side.
            posterior_samples: exact posterior draws by site, ``num_chains`` on the leftmost dim and independent, or
                one for each datum; then the upper side has no other assumption.

        Raises:
            ValueError: for fewer than 25 chains, or as :func:`pyro_hvae.evidence_sandwich`.
        """
        if num_chains < 25:
            raise ValueError(f"an interval needs num_chains >= 25, for k-hat of the weights, got {num_chains}")
        problem = problem_of(model, guide, args, kwargs)
        with torch.no_grad():
            # A chain that diverges has no finite state, and a weight of 0: a bound then stays on its side.
            forward = self._forward(problem, num_chains)[0].nan_to_num(nan=-torch.inf, neginf=-torch.inf)
            check_weights(forward)
            reverse = None
            if posterior_samples is not None:
                reverse = self._reverse(problem, num_chains, posterior_samples)
        sides = Sides.of(Weights(forward, reverse), delta)
        assumptions = {"lower": NONE_ASSUMED, "upper": MOMENT_ASSUMED if reverse is None else DRAWS_ASSUMED}
        return Interval(sides.lower, sides.upper, delta, assumptions, "learned annealing")

    @evaluating()
    def moves(
        self, model: Any, guide: Any = None, *args: Any, num_leapfrog: int = 5, num_moves: int = 1, **kwargs: Any
    ) -> Moves:
        """Return corrected moves at the learned temperatures, step sizes and masses.

        For :func:`pyro_hvae.evidence.anneal` and :func:`pyro_hvae.evidence_sandwich`, in the place of a pilot run.
        """
        problem = problem_of(model, guide, args, kwargs)
        kernels, path = self._kernels(), Path(problem, 2)
        with torch.no_grad():
            inner = kernels.betas.double()
            betas = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
            moves = Moves(path, betas, num_leapfrog=num_leapfrog, num_moves=num_moves)
            like = path.difference(path.start())[0]
            steps = kernels.log_step.exp()
            for step in [steps[0], *steps, steps[-1]]:
                moves.step_sizes.append(torch.ones_like(like) * step)
                moves.scales.append({name: kernels.site(name)["log_scale"].exp() for name in kernels.shapes})
        return moves

    def _kernels(self) -> AnnealingKernels:
        if self.kernels is None:
            raise ValueError(
                "AnnealedBound has no parameters yet: call bound.prepare(model, guide, *args) before the optimiser is "
                "made (pyro_hvae.fit does)"
            )
        return self.kernels

    def _forward(self, problem: Problem, num_chains: int) -> tuple[Tensor, Any]:
        kernels = self._kernels()
        path = self._path(problem, num_chains)
        run = self.draw(problem, num_chains)
        log_weights, _ = kernels(path, path.of_run(run))
        return log_weights, run

    def _reverse(self, problem: Problem, num_chains: int, samples: Mapping[str, Tensor]) -> Tensor:
        """Return logs of independent estimates of 1/p(x); chains from one draw are a single estimate."""
        path = self._path(problem, num_chains)
        starts: State = path.unconstrain(posterior_starts(samples, path))
        log_weights = (-self._kernels().backward_chain(path, starts)).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        check_weights(log_weights)
        single = count_draws(problem, {name: samples[name] for name in path.transforms}) == 1
        return log_mean_exp(log_weights)[None] if single else log_weights

    def _path(self, problem: Problem, num_chains: int) -> Path:
        path = Path(problem, num_chains)
        path.require_continuous("learned annealing")
        shapes = {name: path.shared_shape(name) for name in path.transforms}
        if shapes != self._kernels().shapes:
            raise ValueError(
                f"the bound was prepared for latents of shapes {self._kernels().shapes}, and is called with {shapes}: "
                "make an AnnealedBound for each model"
            )
        return path
