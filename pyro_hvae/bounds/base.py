"""Base classes of objectives and bounds: Pyro's entry points, the module form, values per datum, refusals."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from pyro_hvae.problem import Problem, Run, Structure, problem_of
from pyro_hvae.problem.checks import check_particles
from pyro_hvae.problem.isolation import RUNNING, evaluating, isolated
from pyro_hvae.problem.parameters import check_trained, make_registrable

__all__ = ["Bound", "Estimate", "Evaluable", "Evaluation", "Objective", "Treatment"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Estimate:
    """The estimate that an objective computes from one run.

    Attributes:
        value: the estimate per datum, in nats, shape of the datum's plates.
        surrogate: a tensor of the same shape with the gradient to follow; ``value`` itself where it is the same.
        scale: N/B, applied to the sum over the data.
        shared: a term of the whole data set, not of a datum (the draws of global latents).
        run: the run behind it, an object with ``model_trace`` and ``guide_trace``.
    """

    value: Tensor
    surrogate: Tensor
    scale: float = 1.0
    shared: Tensor | None = None
    run: Any = field(default=None, repr=False)

    def loss(self, per_datum: Tensor) -> Tensor:
        """Return minus the scaled sum over the data."""
        summed = per_datum.sum()
        if self.scale != 1.0:
            summed = summed * self.scale
        if self.shared is not None:
            summed = summed + self.shared
        return -summed


@dataclass(frozen=True)
class Evaluation:
    """Value and terms of a bound from the same draws, without gradient, in nats; each of the shape of the plates.

    Attributes:
        value: the bound's estimate.
        terms: its parts, and diagnostics of its weights, by name.
        structure: of the pair; None where programs are not run as a whole.
        scale: N/B, applied to the sum over the data.
        shared: a term of the whole data set, not of a datum.
    """

    value: Tensor
    terms: dict[str, Tensor]
    structure: Structure | None = None
    scale: float = 1.0
    shared: Tensor | None = None

    def total(self) -> Tensor:
        """Return the bound of the whole data set, 0-dim: the scaled sum over the data."""
        summed = self.value.sum() * self.scale
        return summed if self.shared is None else summed + self.shared


@dataclass(frozen=True)
class Treatment:
    """How a bound handles one site: ``"analytic"``, ``"Monte Carlo"`` or ``"summed out"``, why, by which gradient."""

    how: str
    why: str
    gradient: str


class ObjectiveModule(ELBOModule):
    """An objective and its pair as a module: parameters are the pair's, the output is the loss.

    Each call with gradients counts as a step of objectives that follow the step.
    """

    elbo: Objective

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        problem = Problem(self.model, self.guide, args, kwargs, training=True, registering=False)
        loss = self.elbo.differentiable_loss(problem)
        if torch.is_grad_enabled():
            self.elbo.advance()
        return loss


class Objective(ELBO, nn.Module, metaclass=abc.ABCMeta):
    """Objective to train a pair: three entry points for Pyro, a module for torch.

    Subclasses define :meth:`estimate`.  ``loss``, ``differentiable_loss`` and ``loss_and_grads`` are the negative
    estimate, summed over the data and scaled by N/B, as in Pyro's ELBOs; none synchronises with the device.  Each takes
    ``(model, guide, *args, **kwargs)``, or a bound :class:`~pyro_hvae.problem.Problem`.

    State that an objective keeps from step to step is in its buffers.
    """

    num_particles: int

    is_bound: ClassVar[bool] = False
    """Whether the value estimates a bound on log p(x) (from either side)."""

    from_above: ClassVar[bool] = False
    """Whether the value estimates log p(x) from above, so that training makes it small."""

    trains: ClassVar[tuple[str, ...]] = ("model", "guide")
    """The programs whose parameters the objective moves."""

    def __init__(self, num_particles: int = 1) -> None:
        check_particles(num_particles)
        nn.Module.__init__(self)
        ELBO.__init__(self, num_particles=num_particles, vectorize_particles=True)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"

    def _arguments(self) -> dict[str, Any]:
        return {"num_particles": self.num_particles}

    @abc.abstractmethod
    def estimate(self, problem: Problem) -> Estimate:
        """Run a problem, and return the estimate from this run."""

    def prepare(self, model: Any, guide: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Make parameters that depend on the pair; objectives with parameters of their own override this."""
        return self

    def advance(self) -> None:
        """Count a step of training; objectives that follow the step override this."""

    def restart(self) -> None:
        """Reset the state of earlier training; objectives that keep state from step to step override this."""

    def __call__(self, model: nn.Module, guide: nn.Module) -> ObjectiveModule:
        """Return the objective of a pair as a module: its parameters are the pair's, its output is the loss.

        Raises:
            TypeError: if a program is not an ``nn.Module``, and so has no parameters to give to an optimiser.
        """
        for which, program in (("model", model), ("guide", guide)):
            if not isinstance(program, nn.Module):
                raise TypeError(
                    f"the {which} {getattr(program, '__qualname__', program)!r} is no nn.Module, so the "
                    "objective would not hold its parameters; pass a module (a pyro.nn.PyroModule whose forward "
                    "is the program), or train by pyro.infer.SVI with this objective as its loss"
                )
        return ObjectiveModule(model, guide, self)

    def differentiable_loss(self, model: Any, guide: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss as a 0-dim tensor (nats, summed over the data set), with its gradient.

        Modules run in their present mode.
        """
        return self._differentiable(problem_of(model, guide, args, kwargs, training=True), "module")[0]

    def loss(self, model: Any, guide: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss as a 0-dim tensor without a gradient, with modules in evaluation mode.

        As with Pyro's own ELBOs, parameters that the programs make stay in Pyro's store, and generators advance.
        """
        with torch.no_grad():
            estimate = self.estimate(problem_of(model, guide, args, kwargs))
            return estimate.loss(estimate.value)

    def loss_and_grads(self, model: Any, guide: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Accumulate the gradient of the loss in the parameters, count a step, and return the loss.

        Raises:
            RuntimeError: on one of several processes, whose gradients this route does not average.
        """
        refuse_many_processes()
        with RUNNING:
            loss, run = self._differentiable(problem_of(model, guide, args, kwargs, training=True), "store")
            make_registrable(run.guide_trace, run.model_trace)
            if loss.requires_grad:
                loss.backward(retain_graph=self.retain_graph)
            self.advance()
        return loss.detach()

    def _differentiable(self, problem: Problem, route: str) -> tuple[Tensor, Any]:
        with RUNNING:  # an estimate elsewhere may hold the same parameters constant for a moment
            estimate = self.estimate(problem)
            surrogate = estimate.loss(estimate.surrogate)
            loss = surrogate
            if estimate.surrogate is not estimate.value:
                loss = estimate.loss(estimate.value).detach() + (surrogate - surrogate.detach())
            if torch.is_grad_enabled():
                self._check_trained(problem, estimate.run, surrogate, route)
        return loss, estimate.run

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        """Return the traces of one run, for Pyro's base class."""
        run = Problem(model, guide, args, kwargs).run()
        return run.model_trace, run.guide_trace

    def _check_trained(self, problem: Problem, run: Any, loss: Tensor, route: str) -> None:
        facts, key = problem.knowledge.facts, ("trained", route, self.trains)
        if key not in facts:
            traces = (run.guide_trace, run.model_trace)

            def again() -> Tensor:
                with isolated(problem.model, problem.guide):
                    estimate = self.estimate(problem)
                return estimate.loss(estimate.surrogate)

            check_trained(problem, traces, loss, route=route, trains=self.trains, again=again)
            facts[key] = True


def refuse_many_processes() -> None:
    """Raise where ``torch.distributed`` runs on more than one process."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"pyro.infer.SVI on one of {distributed.get_world_size()} processes: its gradients are not averaged, so "
            "their parameters would differ without an error; use pyro_hvae.fit(..., fabric=...), or call "
            "DistributedDataParallel(bound(model, guide)) and a torch optimiser"
        )


class Evaluable(Objective):
    """An objective that has a value and terms per datum."""

    @abc.abstractmethod
    def evaluate(self, problem: Problem) -> Evaluation:
        """Return value and terms from the same draws; nats, shape of the plates."""

    @evaluating()
    def per_datum(self, model: Any, guide: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Return the estimate for each datum, in nats, without gradient.

        Returns:
            Tensor of the shape of the plates common to all sites of the pair, ``()`` if there are none.
        """
        with torch.no_grad():
            return self.evaluate(problem_of(model, guide, args, kwargs)).value

    @evaluating()
    def terms(self, model: Any, guide: Any = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the parts of the estimate for each datum, in nats, without gradient."""
        with torch.no_grad():
            return self.evaluate(problem_of(model, guide, args, kwargs)).terms


class Bound(Evaluable):
    """An estimate of a bound on log p(x), per datum."""

    is_bound = True

    gradients: ClassVar[tuple[str, ...]] = ("pathwise",)
    """The gradient estimators that are derived for this bound."""

    def __init__(self, num_particles: int = 1, gradient: str = "pathwise") -> None:
        super().__init__(num_particles)
        if not isinstance(gradient, str) or gradient not in self.gradients:
            raise ValueError(
                f"{type(self).__name__} has no gradient {gradient!r}; it has {', '.join(self.gradients)}"
            )
        self.gradient = gradient

    @property
    def num_draws(self) -> int:
        """Number of draws of one evaluation."""
        return self.num_particles

    def _arguments(self) -> dict[str, Any]:
        arguments = super()._arguments()
        return arguments | {"gradient": self.gradient} if len(self.gradients) > 1 else arguments

    def refusals(self, structure: Structure) -> list[str]:
        """Return the reasons why this bound can't be computed for a pair, one sentence each; empty if it can."""
        sites = structure.sites
        pathwise_at = [n for n in structure.drawn if not sites[n].has_rsample and not sites[n].enumerated_in_guide]
        if structure.enumerated_in_guide and self.gradient in ("stl", "dreg") and torch.is_grad_enabled():
            return [
                f"the guide enumerates {list(structure.enumerated_in_guide)}, and the {self.gradient!r} gradient is "
                "not derived for that: use gradient='pathwise'"
            ]
        in_groups = [name for name in structure.drawn if sites[name].drawn_in_groups and not sites[name].has_rsample]
        if in_groups and torch.is_grad_enabled():
            return [
                f"site(s) {in_groups} draw num_samples values of a discrete variable, for which no gradient is "
                "derived: remove num_samples to enumerate all values"
            ]
        if not pathwise_at or self.gradient in ("score", "vimco") or not torch.is_grad_enabled():
            return []  # a value needs no reparameterisation
        working = [name for name in self.gradients if name in ("score", "vimco")]
        advice = (
            f"use gradient={working[0]!r}" if working else 'use TraceELBO(gradient="score") or IWELBO(gradient="vimco")'
        )
        return [
            f"site(s) {pathwise_at} have no reparameterised draws, so the {self.gradient!r} gradient of "
            f"{type(self).__name__} would be wrong: {advice}, or sum the variable out in the model with "
            'infer={"enumerate": "parallel"}'
        ]

    def treatment(self, name: str, structure: Structure, dependencies: Any) -> Treatment:
        """Return how this bound handles a site, for :func:`pyro_hvae.explain`."""
        site = structure.sites[name]
        if site.role == "enumerated":
            return Treatment("summed out", 'marked infer={"enumerate": "parallel"}', "exact")
        if site.enumerated_in_guide:
            return Treatment("enumerated", "marked in the guide: an exact expectation over its values", "exact")
        if site.role == "observed":
            return Treatment("Monte Carlo", "log-likelihood at the guide's draws", "pathwise")
        gradient = self.gradient
        if gradient in ("score", "vimco") and site.has_rsample:
            gradient = "pathwise"
        return Treatment("Monte Carlo", "log p - log q at the guide's draws", gradient)

    def draw(self, problem: Problem, num_particles: int | None = None, once: frozenset[str] = frozenset()) -> Run:
        """Run the pair, or refuse it.

        Raises:
            ValueError: with the first of :meth:`refusals`.
        """
        run = problem.run(self.num_draws if num_particles is None else num_particles, once=once)
        if torch.is_grad_enabled() or run.structure.subsampled:
            self.check(run.structure)
        return run

    def check(self, structure: Structure) -> None:
        """Raise the first of :meth:`refusals`, if there is one."""
        for refusal in self.refusals(structure):
            raise ValueError(refusal)
