r"""The path from a base distribution to the posterior, on the real line, and moves that leave its points invariant.

Latents u live on the real line: :math:`z = T(u)` by the transform of each site's support, whose log-determinant enters
both ends.  Between the base :math:`q` (the guide or the prior) and the joint,

.. math:: \log f_\beta(u) = (1-\beta)\,\log q(T(u)|x) + \beta\,\log p(x, T(u)) + \log|\det T'(u)|.

Chains and data are moved at once: a move is accepted or not for each chain and datum on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_hvae.traces import Evaluator, Reading, prior_guide, read

__all__ = ["Path", "Program", "State", "hamiltonian"]

Program = Callable[..., Any]
State = dict[str, Tensor]


class Path:
    """Densities between a base and a joint, per chain and datum.

    Args:
        model: a Pyro program, called with ``args`` and ``kwargs``.
        base: the program to start from; the model's prior if None.
        num_chains: K, the leftmost dim of every state.

    Raises:
        ValueError: for a model without latents, one with discrete latents, or a subsampled plate that does not enclose
            all sites.
    """

    def __init__(
        self, model: Program, base: Program | None, args: tuple, kwargs: Mapping[str, Any], num_chains: int
    ) -> None:
        self.num_chains = num_chains
        self.model = model
        self.base = prior_guide(model) if base is None else base
        self.args, self.kwargs = args, dict(kwargs)
        self.evaluate = Evaluator(model, self.base, args, self.kwargs, num_particles=num_chains)
        found = self.evaluate.structure
        if not found.drawn:
            raise ValueError("the model has no latent site, so there is nothing to anneal: its evidence is exact")
        if found.auxiliary and not self._one_to_one():
            raise ValueError(
                f"the base draws auxiliary site(s) {list(found.auxiliary)} that are not the latents in other "
                "coordinates, datum by datum, so that annealing can't move through them: anneal from the prior "
                '(base="prior"), or write the guide on the latents themselves'
            )
        partial = [plate.name for plate in found.subsampled if plate not in found.common]
        if partial:
            raise ValueError(f"plate(s) {partial} are subsampled and do not enclose all sites: pass the whole data")
        self.transforms = {}
        for name in found.auxiliary or found.drawn:
            support = self.evaluate.template.nodes[name]["fn"].support
            if support.is_discrete:
                raise ValueError(
                    f"site '{name}' is discrete, and the transitions move on the real line: sum it out in the "
                    'model with infer={"enumerate": "parallel"}'
                )
            self.transforms[name] = biject_to(support)

    def _one_to_one(self) -> bool:
        """Whether the base draws as many numbers as the latents have, and computes the latents from them."""
        found = self.evaluate.structure
        with torch.no_grad():
            model_trace = read(self.model, self.base, self.args, self.kwargs).model_trace
        nodes = [model_trace.nodes[name] for name in found.latent]
        free = sum(biject_to(node["fn"].support).inverse_shape(node["value"].shape).numel() for node in nodes)
        drawn = sum(self.evaluate.template.nodes[name]["value"].numel() for name in found.auxiliary)
        return (
            all(found.sites[name].guide_distribution == "Delta" for name in found.latent)
            and all(set(found.common) <= set(found.sites[name].plates) for name in found.auxiliary)
            and free == drawn
        )

    def start(self) -> State:
        """Independent draws of the base."""
        with torch.no_grad():
            reading = read(self.model, self.base, self.args, self.kwargs, num_particles=self.num_chains)
        return self.unconstrain(reading.values)

    def revived(self, state: State, alive: Tensor | None = None) -> State:
        """Put dead chains, by default those where the joint is zero, where others of their datum are.

        That is for starts and pilots, whose chains have no weights that it would spoil.
        """
        alive = torch.isfinite(self.difference(state)) if alive is None else alive
        if bool(alive.all()) or not bool(alive.any(0).all()):
            return state
        order = torch.arange(len(alive), device=alive.device).reshape(-1, *(1,) * (alive.dim() - 1))
        ranked = alive.to(torch.int8).argsort(dim=0, descending=True, stable=True)  # those alive first
        index = torch.where(alive, order, ranked.gather(0, order % alive.sum(0)))
        return self.picked(state, index)

    def picked(self, state: State, index: Tensor) -> State:
        """For each chain and datum the state of the chain that ``index`` says, ``(K, *plates)``."""
        return {
            name: value.gather(0, self.spread(index, name, value).expand(value.shape)) for name, value in state.items()
        }

    def unconstrain(self, values: Mapping[str, Tensor]) -> State:
        """States at given latent values, one for each chain.

        Raises:
            ValueError: if a site is missing, has another number of draws than there are chains, or values that are NaN
                or outside of the support on which the base draws it.
        """
        missing = sorted(set(self.transforms) - set(values))
        if missing:
            raise ValueError(f"no value was given for site(s) {missing}; given: {sorted(values)}")
        state = {}
        for name, transform in self.transforms.items():
            placed = self.evaluate.place(name, values[name]).detach()
            state[name] = transform.inv(placed)
            # Transforms clip, so a value from elsewhere comes back as another one.
            lost = ~((transform(state[name]) - placed).abs() <= 1e-3 * (1 + placed.abs()))
            if bool(lost.any()):
                raise ValueError(
                    f"site '{name}' has {int(lost.sum())} values that are NaN or outside of "
                    f"{self.evaluate.template.nodes[name]['fn'].support}, where the base draws it: {placed[lost][:3]}"
                )
        return state

    def constrain(self, state: State) -> dict[str, Tensor]:
        """The latents at a state, and what the base draws instead of them."""
        values = {name: transform(state[name]) for name, transform in self.transforms.items()}
        if not self.evaluate.structure.auxiliary:
            return values
        with torch.no_grad():
            found = self.evaluate(values).values
        return values | {name: found[name] for name in self.evaluate.structure.latent}

    def densities(self, state: State) -> tuple[Tensor, Tensor, Reading]:
        """(log base, log joint) on the real line, each ``(K, *plates)``."""
        values = {name: transform(state[name]) for name, transform in self.transforms.items()}
        reading = self.evaluate(values)
        volume: Any = 0.0
        for name, transform in self.transforms.items():
            change = transform.log_abs_det_jacobian(state[name], values[name])
            extra = change.dim() - (state[name].dim() - self._event_dim(name))
            volume = volume + reading.reduce(change.sum(tuple(range(-extra, 0))) if extra > 0 else change)
        log_q = sum(reading.log_q[name] for name in self.transforms) + volume
        log_p = sum(reading.log_p.values()) + volume
        for name in set(reading.log_q) - set(self.transforms):
            log_p = log_p - reading.log_q[name]  # computed by the base: minus the log-determinant of the map to it
        shape = reading.log_weights.shape
        return log_q.expand(shape), log_p.expand(shape), reading

    def difference(self, state: State) -> Tensor:
        """log joint less log base, the derivative of log f in beta."""
        with torch.no_grad():
            log_q, log_p, _ = self.densities(state)
        return log_p - log_q

    def gradient(self, state: State, beta: float) -> tuple[Tensor, State]:
        """log f at beta, and its gradient in every latent."""
        leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
        with torch.enable_grad():
            log_q, log_p, _ = self.densities(leaves)
            # At an end the other density has no say, not even where it is zero.
            log_f = log_q if beta == 0 else log_p if beta == 1 else (1 - beta) * log_q + beta * log_p
            slopes = torch.autograd.grad(log_f.sum(), list(leaves.values()))
        return log_f.detach(), dict(zip(leaves, slopes, strict=True))

    def per_datum(self, state: State) -> Tensor:
        """Sum a quantity of the states' shapes for each chain and datum."""
        total: Any = 0.0
        for name, value in state.items():
            event_dim = self._event_dim(name)
            total = total + self._reduce(value.sum(tuple(range(-event_dim, 0))) if event_dim else value)
        return total

    def spread(self, per_datum: Tensor, name: str, like: Tensor) -> Tensor:
        """Values per chain and datum, laid out to broadcast against a site's state."""
        nesting = self.evaluate.structure.max_plate_nesting
        shape = [1] * (nesting + 1)
        shape[0] = self.num_chains
        for plate, size in zip(self.evaluate.structure.common, per_datum.shape[1:], strict=True):
            shape[plate.dim] = size  # type: ignore[index]
        laid = per_datum.reshape(shape if self.num_chains > 1 else shape[1:])
        return laid.reshape(laid.shape + (1,) * self._event_dim(name)) if like.dim() else laid.reshape(())

    def _event_dim(self, name: str) -> int:
        transform = self.transforms[name]
        event_dim = self.evaluate.template.nodes[name]["fn"].event_dim
        return event_dim + transform.domain.event_dim - transform.codomain.event_dim

    def _reduce(self, value: Tensor) -> Tensor:
        nesting = self.evaluate.structure.max_plate_nesting
        rank = nesting + (self.num_chains > 1)
        value = value.reshape((1,) * (rank - value.dim()) + value.shape)
        keep = {plate.dim for plate in self.evaluate.structure.common}
        keep |= {-rank} if self.num_chains > 1 else set()
        dims = [dim for dim in range(-value.dim(), 0) if dim not in keep]
        value = value.sum(dims) if dims else value
        return value if self.num_chains > 1 else value.unsqueeze(0)


def hamiltonian(
    path: Path,
    state: State,
    beta: float,
    step_size: float | Tensor,
    num_steps: int,
    scales: State | None = None,
) -> tuple[State, Tensor]:
    r"""One HMC move that leaves f at beta invariant (``num_steps=1`` is MALA).

    Args:
        step_size: of the leapfrog integrator, > 0; a number, or one for each datum, of the shape of its plates.
        num_steps: leapfrog steps, >= 1.
        scales: of the coordinates, by site, in the shape of the state without the chains (a diagonal mass matrix);
            one by default.

    The step size is multiplied by a uniform draw from [0.7, 1.3], one a datum, so that no trajectory is a period.

    Returns:
        The new state, and the acceptance probability per chain and datum.

    Reference:
        MCMC Using Hamiltonian Dynamics (Neal, 2011).
    """
    momentum = {name: torch.randn_like(value) for name, value in state.items()}
    log_f, slope = path.gradient(state, beta)
    energy = log_f - 0.5 * path.per_datum({name: p**2 for name, p in momentum.items()})
    jitter = 0.7 + 0.6 * torch.rand_like(log_f[0])
    steps = {}
    for name, value in state.items():
        steps[name] = path.spread((step_size * jitter).expand(log_f.shape), name, value)
        if scales is not None:
            steps[name] = steps[name] * scales[name]
    position = state
    for _ in range(num_steps):
        momentum = {name: p + 0.5 * steps[name] * slope[name] for name, p in momentum.items()}
        position = {name: u + steps[name] * momentum[name] for name, u in position.items()}
        log_f, slope = path.gradient(position, beta)
        momentum = {name: p + 0.5 * steps[name] * slope[name] for name, p in momentum.items()}
    proposed = log_f - 0.5 * path.per_datum({name: p**2 for name, p in momentum.items()})
    # A leap out of the region of finite density is a rejection; so is one from there, where no ratio exists.
    ratio = torch.where(torch.isfinite(proposed), proposed - energy, torch.full_like(energy, -math.inf))
    ratio = torch.where(torch.isnan(ratio), torch.full_like(ratio, -math.inf), ratio)
    accept = torch.rand_like(ratio).log() < ratio
    moved = {
        name: torch.where(path.spread(accept, name, value), position[name], value) for name, value in state.items()
    }
    return moved, ratio.clamp(max=0.0).exp()
