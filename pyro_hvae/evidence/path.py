r"""The path from a base distribution to the posterior, on the real line.

Latents u are on the real line: :math:`z = T(u)` by the transform of each site's support, whose log-determinant enters
both ends.  Between the base :math:`q` (the guide or the prior) and the joint,

.. math:: \log f_\beta(u) = (1-\beta)\,\log q(T(u)|x) + \beta\,\log p(x, T(u)) + \log|\det T'(u)|.

All densities are per chain and datum.  Discrete latents keep their values, and have no determinant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_hvae import devices
from pyro_hvae.evidence.singular import undefined_where_singular
from pyro_hvae.evidence.support import require_finite, values_of
from pyro_hvae.problem import Layout, Plate, Problem, Run, total
from pyro_hvae.problem.draws import place

__all__ = ["Path", "State", "tempered"]

State = dict[str, Tensor]
"""Latents of all chains, by site: ``(K, dims of all plates, *event)``; without the first dim if K = 1.

Continuous ones are unconstrained; discrete ones are as they are.
"""


class Path:
    """Densities between a base and a joint, per chain and datum.

    Args:
        problem: the model with the base as its guide (:meth:`pyro_hvae.problem.Problem.prior` for the prior), and data.
        num_chains: K.

    Attributes:
        transforms: of the continuous sites that the chains move, from the real line.
        discrete: names of the discrete ones.

    Raises:
        ValueError: for a model without latents, one with a discrete latent whose values can't be enumerated, a base
            that enumerates sites or draws auxiliary ones that are not the latents in other coordinates, or a
            subsampled plate that does not enclose all sites.
    """

    def __init__(self, problem: Problem, num_chains: int) -> None:
        structure = problem.structure
        self.problem, self.num_chains = problem, num_chains
        self.plates, self.layout = structure.common, Layout(structure.max_plate_nesting, num_chains)
        if not structure.drawn:
            raise ValueError("the model has no latent site to anneal: its evidence is exact")
        structure.require_whole("the evidence")
        if structure.enumerated_in_guide:
            raise ValueError(
                f"the guide enumerates site(s) {list(structure.enumerated_in_guide)}, so that its density at the other "
                'latents is a sum, along which chains can\'t be moved: anneal from the prior (base="prior") with '
                'these sites marked infer={"enumerate": "parallel"} in the model instead'
            )
        nodes = problem.template.nodes
        self.discrete = tuple(name for name in structure.latent if nodes[name]["fn"].support.is_discrete)
        if structure.auxiliary and not self._one_to_one():
            raise ValueError(
                f"the base draws auxiliary site(s) {list(structure.auxiliary)} that are not the latents in other "
                "coordinates, datum by datum, so that annealing can't move through them: anneal from the prior "
                '(base="prior"), or write the guide on the latents themselves'
            )
        for name in self.discrete:
            require_finite(name, nodes[name]["fn"])
        moved = structure.auxiliary or tuple(name for name in structure.latent if name not in self.discrete)
        self.transforms = {name: biject_to(nodes[name]["fn"].support) for name in moved}
        self._base: Run | None = None  # whose guide's distributions hold for all states

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites of a state."""
        return (*self.transforms, *self.discrete)

    def require_continuous(self, what: str) -> None:
        """Refuse discrete latents.

        Args:
            what: the subject of the message.

        Raises:
            ValueError: naming the first.
        """
        if self.discrete:
            raise ValueError(
                f"site '{self.discrete[0]}' is discrete, and {what} moves on the real line: use anneal or "
                "evidence_sandwich, which have Gibbs moves for discrete sites, or sum it out in the model with "
                'infer={"enumerate": "parallel"}'
            )

    def _one_to_one(self) -> bool:
        """Whether the base computes the continuous latents from as many draws as they have unconstrained elements."""
        structure = self.problem.structure
        model_trace, guide_trace = self.problem.look()
        continuous = [name for name in structure.latent if name not in self.discrete]
        nodes = [model_trace.nodes[name] for name in continuous]
        free = sum(biject_to(node["fn"].support).inverse_shape(node["value"].shape).numel() for node in nodes)
        drawn = sum(guide_trace.nodes[name]["value"].numel() for name in structure.auxiliary)
        return (
            all(structure.sites[name].guide_distribution == "Delta" for name in continuous)
            and all(set(structure.common) <= set(structure.sites[name].plates) for name in structure.auxiliary)
            and free == drawn
        )

    def start(self) -> State:
        """Draw independent states from the base."""
        with torch.no_grad():
            run = undefined_where_singular(lambda: self.problem.run(self.num_chains))
        self._settle(run)
        return self.unconstrain(run.values)

    def of_run(self, run: Run) -> State:
        """Return the states of a run of as many particles as there are chains, with their gradients."""
        self._settle(run)
        return {
            name: transform.inv(self.layout.padded(run.values[name], self.problem.template.nodes[name]["fn"].event_dim))
            for name, transform in self.transforms.items()
        }

    def shared_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of parameters of a site's coordinates that all data share; it broadcasts against a state."""
        shape = self.transforms[name].inverse_shape(self.problem.template.nodes[name]["fn"].shape())
        padded = [1] * (self.layout.nesting + self._event_dim(name) - len(shape)) + list(shape)
        for plate in self.plates:
            assert plate.dim is not None
            padded[self.layout.nesting + plate.dim] = 1
        return tuple(padded)

    def replace_dead(self, state: State, alive: Tensor | None = None) -> State:
        """Replace chains of zero density by copies of others of their datum.

        For starts and pilots only, since the copies change the weights.

        Args:
            alive: which chains to keep, ``(K, *plates)``; by default those where the joint is not zero.
        """
        alive = torch.isfinite(self.difference(state)) if alive is None else alive
        keep = alive | ~alive.any(0)
        order = torch.arange(len(alive), device=alive.device).reshape(-1, *(1,) * (alive.dim() - 1))
        alive_first = alive.to(torch.int8).argsort(dim=0, descending=True, stable=True)
        source = alive_first.gather(0, (order % alive.sum(0).clamp(min=1)).expand(alive.shape))
        return self.take(state, torch.where(keep, order, source))

    def take(self, state: State, index: Tensor) -> State:
        """Select for each chain and datum the state of the chain ``index``, ``(K, *plates)``."""
        if self.num_chains == 1:
            return state
        return {name: value.gather(0, self.spread(index, name).expand(value.shape)) for name, value in state.items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> State:
        """Map latent values, one for each chain, to a state.

        Raises:
            ValueError: if a site is missing, has another number of draws than there are chains, or values that are NaN
                or outside of the support on which the base draws it.
        """
        missing = sorted(set(self.sites) - set(values))
        if missing:
            raise ValueError(f"values lack site(s) {missing}; they have {sorted(values)}")
        state = {}
        for name in self.sites:
            fn = self.problem.template.nodes[name]["fn"]
            value = place(self.problem, name, values[name], self.num_chains).detach()
            value = self.layout.padded(value, fn.event_dim)
            if name in self.transforms:
                transform = self.transforms[name]
                state[name] = transform.inv(value)
                # Transforms clip: a value outside of the support is mapped back to another one.
                lost = ~((transform(state[name]) - value).abs() <= 1e-3 * (1 + value.abs()))
            else:
                state[name] = value.to(self.problem.template.nodes[name]["value"].dtype)
                lost = ~values_of(fn).contains(value)
            if devices.has_values(lost) and bool(lost.any()):
                raise ValueError(
                    f"site '{name}' has {int(lost.sum())} values that are NaN or outside of {fn.support}, where the "
                    f"base draws it: {value[lost][:3]}"
                )
        return state

    def constrain(self, state: State) -> dict[str, Tensor]:
        """Return the latents at a state, and the auxiliary draws of the base."""
        values = {
            name: place(self.problem, name, value, self.num_chains) for name, value in self.values(state).items()
        }
        computed = set(self.problem.structure.latent) - set(self.sites)
        if not computed:
            return values
        with torch.no_grad():
            run = self.problem.run(self.num_chains, values)
        return values | {name: run.values[name] for name in computed}

    def densities(self, state: State) -> tuple[Tensor, Tensor]:
        """Return (log base, log joint) on the real line, each ``(K, *plates)``."""
        values = self.values(state)
        log_q, log_p = self.terms(values, self.num_chains, self.plates)
        volume = self._log_volume(state, values)
        return log_q + volume, log_p + volume

    def terms(self, values: Mapping[str, Tensor], count: int, plates: Sequence[Plate]) -> tuple[Tensor, Tensor]:
        """Return (log base, log joint) of the sites' terms within some plates, each ``(count, *plates)``.

        Terms of sites outside of a plate are repeated along it.

        Args:
            values: of the sites, on their supports, ``count`` on the leftmost dim.
            plates: those of :attr:`plates`, and others.
        """
        return undefined_where_singular(lambda: self._terms(values, count, plates))

    def _settle(self, run: Run) -> None:
        """Keep the guide's distributions of a run, where they do not depend on the draws."""
        if self.problem.separable:
            self._base = run

    def _terms(self, values: Mapping[str, Tensor], count: int, plates: Sequence[Plate]) -> tuple[Tensor, Tensor]:
        if self._base is not None and self._base.num_particles == count:
            run = self.problem.rerun(self._base, values)
        else:
            run = self.problem.run(count, values)
        if tuple(plates) != run.plates:
            run = run.over(tuple(plates))
        computed = set(self.problem.structure.latent) - set(self.sites)
        log_q = sum(term for name, term in run.log_q.items() if name not in computed)
        log_p = total(run.log_p)
        for name in computed:
            log_p = log_p - run.log_q[name]  # minus the log-determinant of the base's map to it
        assert isinstance(log_q, Tensor)
        return run.shaped(log_q), run.shaped(log_p)

    def difference(self, state: State) -> Tensor:
        """Return log joint less log base, the derivative of log f in beta."""
        with torch.no_grad():
            log_q, log_p = self.densities(state)
        return log_p - log_q

    def gradient(self, state: State, beta: float) -> tuple[Tensor, State]:
        """Return log f at beta, and its gradient in every continuous latent."""
        leaves = {name: state[name].detach().requires_grad_() for name in self.transforms}
        with torch.enable_grad():
            log_f = tempered(*self.densities({**state, **leaves}), beta)
            slopes = torch.autograd.grad(log_f.sum(), list(leaves.values()))
        return log_f.detach(), dict(zip(leaves, slopes, strict=True))

    def per_datum(self, state: State) -> Tensor:
        """Sum a quantity of the states' shapes for each chain and datum."""
        summed: Any = 0.0
        for name, value in state.items():
            summed = summed + self.layout.reduce(_sum_last(value, self._event_dim(name)), self.plates)
        return summed

    def spread(self, per_datum: Tensor, name: str) -> Tensor:
        """Reshape values per chain and datum so that they broadcast against a site's state."""
        return self.layout.spread(per_datum, self.plates, self._event_dim(name))

    def vector(self, value: Tensor, name: str) -> Tensor:
        """Flatten a site's state for each chain and datum: ``(K, *plates, elements)``."""
        return self.layout.vector(value, self.plates, self._event_dim(name))

    def unvector(self, vector: Tensor, name: str) -> Tensor:
        """Undo :meth:`vector`."""
        return self.layout.unvector(vector, self.plates, self._event_dim(name), self.shared_shape(name))

    def values(self, state: State) -> dict[str, Tensor]:
        """Return the sites' values on their supports, in the dims of the state."""
        moved = {name: transform(state[name]) for name, transform in self.transforms.items()}
        return {name: moved[name] if name in moved else state[name] for name in self.sites}

    def _log_volume(self, state: State, values: Mapping[str, Tensor]) -> Any:
        """Return log |det T'(u)|, ``(K, *plates)``; 0 without continuous latents."""
        summed: Any = 0.0
        for name, transform in self.transforms.items():
            change = transform.log_abs_det_jacobian(state[name], values[name])
            events = change.dim() - (state[name].dim() - self._event_dim(name))
            summed = summed + self.layout.reduce(_sum_last(change, events), self.plates)
        return summed

    def _event_dim(self, name: str) -> int:
        """Return the number of event dims of a latent in a state."""
        event_dim = self.problem.template.nodes[name]["fn"].event_dim
        if name in self.discrete:
            return event_dim
        transform = self.transforms[name]
        return event_dim + transform.domain.event_dim - transform.codomain.event_dim


def tempered(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Return log f at beta; at an end the other density is ignored, also where it is zero."""
    return log_q if beta == 0 else log_p if beta == 1 else (1 - beta) * log_q + beta * log_p


def _sum_last(value: Tensor, dims: int) -> Tensor:
    return value.sum(tuple(range(-dims, 0))) if dims > 0 else value
