r"""Moves that leave a tempered density invariant, for every chain and datum at once.

Hamiltonian Monte Carlo for continuous latents given the discrete ones, then Gibbs moves for the discrete ones given the
continuous.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_hvae.evidence.gibbs import Gibbs
from pyro_hvae.evidence.path import Path, State

__all__ = ["Moves", "hamiltonian"]


def hamiltonian(
    path: Path,
    state: State,
    beta: float,
    step_size: float | Tensor,
    num_steps: int,
    scales: State | None = None,
) -> tuple[State, Tensor]:
    r"""Make one HMC move of the continuous latents that leaves f at beta invariant (``num_steps=1`` is MALA).

    Args:
        step_size: of the leapfrog integrator, > 0; a number, or one for each datum, of the shape of its plates.
        num_steps: leapfrog steps, >= 1.
        scales: of the coordinates, by site, in the shape of the state without the chains (a diagonal mass matrix);
            one by default.

    The step size is multiplied by a uniform draw from [0.7, 1.3] per datum, which avoids periodic trajectories.

    Returns:
        The new state, and the acceptance probability per chain and datum.

    Reference:
        MCMC Using Hamiltonian Dynamics (Neal, 2011).
    """
    start = {name: state[name] for name in path.transforms}
    momentum = {name: torch.randn_like(value) for name, value in start.items()}
    log_f, slope = path.gradient(state, beta)
    energy = log_f - 0.5 * path.per_datum({name: p**2 for name, p in momentum.items()})
    jitter = 0.7 + 0.6 * torch.rand_like(log_f[0])
    steps = {}
    for name in start:
        steps[name] = path.spread((step_size * jitter).expand(log_f.shape), name)
        if scales is not None:
            steps[name] = steps[name] * scales[name]
    position = start
    for _ in range(num_steps):
        momentum = {name: p + 0.5 * steps[name] * slope[name] for name, p in momentum.items()}
        position = {name: u + steps[name] * momentum[name] for name, u in position.items()}
        log_f, slope = path.gradient({**state, **position}, beta)
        momentum = {name: p + 0.5 * steps[name] * slope[name] for name, p in momentum.items()}
    proposed = log_f - 0.5 * path.per_datum({name: p**2 for name, p in momentum.items()})
    # A proposal of non-finite density is rejected, and so is any move from such a state, which has no ratio.
    ratio = torch.where(torch.isfinite(proposed), proposed - energy, torch.full_like(energy, -math.inf))
    ratio = torch.where(torch.isnan(ratio), torch.full_like(ratio, -math.inf), ratio)
    accept = torch.rand_like(ratio).log() < ratio
    moved = {
        name: torch.where(path.spread(accept, name), position[name], value) for name, value in start.items()
    }
    return {**state, **moved}, ratio.clamp(max=0.0).exp()


class Moves:
    """HMC or MALA, and Gibbs moves of discrete latents, at each temperature; tuned before the weighted run.

    Adapting a step size to the weighted chains would bias the weights.  A pilot run with separate chains sets, for each
    temperature and datum, the step size (target acceptance 0.8 for HMC, 0.57 for MALA) and the standard deviation of
    every coordinate, averaged over the preceding temperatures; its chains are discarded.

    Args:
        path: the path of densities.
        betas: temperatures.
        num_leapfrog: leapfrog steps a move; 1 is MALA.
        num_moves: moves at each temperature.
        step_size: of the pilot's first move, in standard deviations.
        gibbs: moves of the discrete latents of the same problem, if they are made.
    """

    def __init__(
        self,
        path: Path,
        betas: Tensor,
        *,
        num_leapfrog: int = 5,
        num_moves: int = 1,
        step_size: float = 0.5,
        gibbs: Gibbs | None = None,
    ) -> None:
        if num_leapfrog < 1 or num_moves < 1 or step_size <= 0:
            raise ValueError(
                "need num_leapfrog >= 1, num_moves >= 1 and step_size > 0, got "
                f"{num_leapfrog}, {num_moves}, {step_size}"
            )
        self.path = path
        self.betas = betas
        self.num_leapfrog, self.num_moves = num_leapfrog, num_moves
        self.first_step = step_size
        self.gibbs = Gibbs(path) if gibbs is None else gibbs.on(path)
        self.step_sizes: list[Tensor] = []
        self.scales: list[State] = []
        self._accepted: dict[int, Tensor] = {}

    def __call__(self, state: State, t: int) -> State:
        beta, rates = float(self.betas[t]), []
        for _ in range(self.num_moves):
            if self.path.transforms:
                state, accepted = hamiltonian(
                    self.path, state, beta, self.step_sizes[t], self.num_leapfrog, self.scales[t]
                )
                rates.append(accepted.mean())
            state = self.gibbs(state, beta)
        self._accepted[t] = torch.stack(rates).mean() if rates else torch.ones(())  # Gibbs moves are never rejected
        return state

    @property
    def acceptance(self) -> Tensor:
        """Mean acceptance probability at each temperature, ``(T + 1,)``; 0 where no move was made.

        Of the continuous latents; 1 without any.
        """
        return torch.tensor([float(self._accepted.get(t, 0.0)) for t in range(len(self.betas))], dtype=torch.float64)

    def on(self, path: Path) -> Moves:
        """Return the same moves for other chains of the same problem."""
        moved = Moves(
            path, self.betas, num_leapfrog=self.num_leapfrog, num_moves=self.num_moves, gibbs=self.gibbs
        )
        moved.step_sizes, moved.scales = self.step_sizes, self.scales
        return moved

    def tune(self, state: State) -> State:
        """Run a pilot from draws of the base; set step sizes and scales for each temperature."""
        target = 0.57 if self.num_leapfrog == 1 else 0.8
        # A quarter of a period decorrelates a Gaussian; a full period returns to the start.
        longest = math.log(0.5 * math.pi / self.num_leapfrog) if self.num_leapfrog > 1 else math.inf
        log_step = torch.full_like(self.path.difference(state)[0], math.log(self.first_step))
        if not self.path.transforms:
            self.step_sizes = [torch.full_like(log_step, math.nan) for _ in self.betas]
            self.scales = [{} for _ in self.betas]
            return state
        variances = {name: _variance(state[name]) for name in self.path.transforms}
        for t in range(len(self.betas)):
            if t < 2:  # draws of the base may have a zero joint; later states have not
                state = self.path.replace_dead(state)
            scales = {name: variance.sqrt() for name, variance in variances.items()}
            for attempt in range(30 if t == 0 else 2):
                state, accepted = hamiltonian(
                    self.path, state, float(self.betas[t]), log_step.exp(), self.num_leapfrog, scales
                )
                log_step = log_step + (0.5 if attempt < 10 else 0.2) * (accepted.mean(0) - target)
                log_step = log_step.clamp(max=longest)
            state = self.gibbs(state, float(self.betas[t]))
            for name in variances:
                variances[name] = 0.8 * variances[name] + 0.2 * _variance(state[name])
            self.step_sizes.append(log_step.exp())
            self.scales.append(scales)
        return state


def _variance(chains: Tensor) -> Tensor:
    """Return the variance over the chains, bounded below for equal chains."""
    return chains.var(0).clamp(min=1e-12)
