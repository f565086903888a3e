"""What all bounds share: Pyro's three entry points, the module form, values per datum, and the refusals."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from pyro_hvae.bounds.gradients import GRADIENTS, averaged, check_holdable
from pyro_hvae.traces import Reading, Structure, read
from pyro_hvae.traces.parameters import check_trained, make_registrable
from pyro_hvae.traces.running import known, unregistered
from pyro_hvae.traces.validation import check_particles

__all__ = ["Bound", "Estimate", "Objective", "Treatment", "WeightBound"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Estimate:
    """What an objective computes from one run.

    Attributes:
        value: the estimate per datum, in nats, shape of the datum's plates.
        surrogate: a tensor of the same shape with the gradient to follow; ``value`` itself where it is the same.
        scale: N/B, applied to the sum over the data.
        shared: a term that belongs to the whole data set rather than to a datum (the draws of global latents).
    """

    value: Tensor
    surrogate: Tensor
    scale: float = 1.0
    shared: Tensor | None = None


@dataclass(frozen=True)
class Treatment:
    """How a bound handles one site: ``"analytic"``, ``"Monte Carlo"`` or ``"summed out"``, why, by which gradient."""

    how: str
    why: str
    gradient: str


class ObjectiveModule(ELBOModule):
    """An objective and its pair as a module: parameters are the pair's, the output is the loss."""

    elbo: Objective

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with unregistered():
            return self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)


class Objective(ELBO, metaclass=abc.ABCMeta):
    """Something to train a pair with: three entry points for Pyro, a module for torch.

    Subclasses give :meth:`estimate`.  ``loss``, ``differentiable_loss`` and ``loss_and_grads`` are the negative
    estimate, summed over the data and scaled by N/B, as Pyro's own ELBOs have it; none waits for the device.
    """

    is_bound: ClassVar[bool] = False
    """Whether the value estimates a bound on log p(x) (from either side)."""

    trains: ClassVar[tuple[str, ...]] = ("model", "guide")
    """The programs whose parameters the objective moves."""

    def __init__(self, num_particles: int = 1) -> None:
        check_particles(num_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=True)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({shown})"

    def _arguments(self) -> dict[str, Any]:
        return {"num_particles": self.num_particles}

    @abc.abstractmethod
    def estimate(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Estimate, Reading]:
        """One run: the estimate and the reading it came from."""

    def __call__(self, model: nn.Module, guide: nn.Module) -> ObjectiveModule:
        """The objective of a pair of modules as a module: its parameters are theirs, its output the loss.

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

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a 0-dim tensor (nats, summed over the data set), with its gradient."""
        return self._differentiable(model, guide, args, kwargs, route="module")[0]

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a 0-dim tensor without a gradient."""
        with torch.no_grad():
            return self._negative(self.estimate(model, guide, args, kwargs)[0])

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Accumulate the gradient of the loss in the parameters, and return the loss.

        Raises:
            RuntimeError: on one of several processes, which nothing on this route would keep in step.
        """
        refuse_many_processes()
        loss, reading = self._differentiable(model, guide, args, kwargs, route="store")
        make_registrable(reading.guide_trace, reading.model_trace)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach()

    def _differentiable(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], *, route: str
    ) -> tuple[Tensor, Reading]:
        estimate, reading = self.estimate(model, guide, args, kwargs)
        surrogate = self._negative(Estimate(estimate.surrogate, estimate.surrogate, estimate.scale, estimate.shared))
        loss = surrogate
        if estimate.surrogate is not estimate.value:
            loss = self._negative(estimate).detach() + (surrogate - surrogate.detach())
        if torch.is_grad_enabled():
            self._check_trained(model, guide, args, kwargs, reading, surrogate, route)
        return loss, reading

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The traces that Pyro's base class asks of an ELBO."""
        reading = read(model, guide, args, kwargs)
        return reading.model_trace, reading.guide_trace

    @staticmethod
    def _negative(estimate: Estimate) -> Tensor:
        total = estimate.value.sum()
        if estimate.scale != 1.0:
            total = total * estimate.scale
        if estimate.shared is not None:
            total = total + estimate.shared
        return -total

    def _check_trained(
        self,
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: Mapping[str, Any],
        reading: Reading,
        loss: Tensor,
        route: str,
    ) -> None:
        checked = known(model, guide).checked_routes
        key = (route, self.trains)
        if key not in checked:
            traces = (reading.guide_trace, reading.model_trace)
            check_trained(model, guide, traces, loss, route=route, arguments=(args, kwargs), trains=self.trains)
            checked.add(key)


def refuse_many_processes() -> None:
    """Raise where ``torch.distributed`` runs on more than one process."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"pyro.infer.SVI on one of {distributed.get_world_size()} processes: its gradients are not averaged, so "
            "the processes would drift apart without an error; use pyro_hvae.fit(..., fabric=...), or call "
            "DistributedDataParallel(bound(model, guide)) and a torch optimiser"
        )


class Bound(Objective):
    """An estimate of a bound on log p(x), per datum."""

    is_bound = True

    gradients: ClassVar[tuple[str, ...]] = ("pathwise",)
    """The gradient estimators that are derived for this bound."""

    def __init__(self, num_particles: int = 1, gradient: str = "pathwise") -> None:
        super().__init__(num_particles)
        if gradient not in self.gradients:
            raise ValueError(
                f"{type(self).__name__} has no gradient {gradient!r}; derived for it: {', '.join(self.gradients)}"
            )
        self.gradient = gradient

    @property
    def num_draws(self) -> int:
        """How often one evaluation runs the guide."""
        return self.num_particles

    def _arguments(self) -> dict[str, Any]:
        shown = super()._arguments()
        return shown | {"gradient": self.gradient} if len(self.gradients) > 1 else shown

    def per_datum(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The estimate for each datum, in nats, without gradient.

        Returns:
            Tensor of the shape of the plates common to all sites of the pair, ``()`` if there are none.
        """
        with torch.no_grad():
            return self.estimate(model, guide, args, kwargs)[0].value

    @abc.abstractmethod
    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The parts of the estimate for each datum, in nats, without gradient."""

    def refusals(self, structure: Structure) -> list[str]:
        """Why this bound can't be had for a pair, sentence by sentence; empty if it can."""
        pathwise_at = [name for name in structure.drawn if not structure.sites[name].has_rsample]
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
        """How this bound handles a site, for :func:`pyro_hvae.explain`."""
        site = structure.sites[name]
        if site.role == "enumerated":
            return Treatment("summed out", 'marked infer={"enumerate": "parallel"}', "exact")
        if site.role == "observed":
            return Treatment("Monte Carlo", "log-likelihood at the guide's draws", "pathwise")
        gradient = self.gradient
        if gradient in ("score", "vimco") and site.has_rsample:
            gradient = "pathwise"
        return Treatment("Monte Carlo", "log p - log q at the guide's draws", gradient)

    def read(self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], **options: Any) -> Reading:
        """Run the pair, or refuse it.

        Raises:
            ValueError: with the first of :meth:`refusals`.
        """
        reading = read(model, guide, args, kwargs, num_particles=self.num_draws, **options)
        if torch.is_grad_enabled() or reading.structure.subsampled:
            self.check(reading.structure)
        return reading

    def check(self, structure: Structure) -> None:
        for refusal in self.refusals(structure):
            raise ValueError(refusal)


class WeightBound(Bound):
    """A bound that is a function of the log-weights alone."""

    @abc.abstractmethod
    def reduce(self, log_weights: Tensor) -> Tensor:
        """Particles, on dimension 0, to the estimate."""

    num_repeats: int = 1

    def estimate(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Estimate, Reading]:
        reading = self.read(model, guide, args, kwargs)
        value = averaged(reading.log_weights, self.reduce, self.num_repeats)
        surrogate = value
        if torch.is_grad_enabled() and self.gradient != "pathwise":
            if self.gradient in ("stl", "dreg"):
                self._check_holdable(model, guide, reading)
            surrogate = GRADIENTS[self.gradient](reading, self.reduce, self.num_repeats)
        return Estimate(value, surrogate, reading.scale), reading

    def _check_holdable(self, model: Program, guide: Program, reading: Reading) -> None:
        checked = known(model, guide).checked_routes
        key = ("holdable", reading.structure.signature)
        if key not in checked:
            check_holdable(reading, self.gradient)
            checked.add(key)
