"""Requirements of :class:`~pyro_hvae.bounds.DiffusionELBO` on a pair and its arguments: access to single layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_hvae.problem.checks import check_observation

__all__ = [
    "Nest",
    "Reversible",
    "ReversibleModel",
    "check_capable",
    "check_data",
    "check_same_process",
    "data_of",
    "given_context",
    "layer_times",
]


class Reversible(Protocol):
    """A guide with closed-form marginals q(z_t|x) and reversed steps q(z_s|z_t, x) at times 0 <= s < t <= 1.

    ``num_layers`` is the number of layers; None is continuous time.  Calling it with ``visit=f`` returns ``f(self)``
    from inside of the module's call, where its parameters register.

    Its optional method ``time(index)`` gives the times of layers 1, ..., T, as numbers or tensors; without it they are
    equally spaced from 0 to 1.  An optional ``noise`` names the kind of noise; that of the model is compared with it.
    An optional method ``given(context)`` returns the process of data with this context, where noise depends on it.
    """

    num_layers: int | None

    def __call__(self, *args: Any, visit: Callable[[Any], Any]) -> Any: ...
    def marginal(self, t: Tensor, x: Tensor) -> Distribution: ...
    def posterior(self, s: Tensor, t: Tensor, z_t: Tensor, x: Tensor) -> Distribution: ...


class Nest(Protocol):
    """A program that nests a reversible chain, or its model, as the prior of one of the program's latents.

    Its method ``around(f, ...)``, with the program's arguments, runs its own sites, and calls f with the nested chain.
    A guide gives f its draws besides, of which the last is the value of the nested chain; in a model f returns this
    value.
    """

    nested: Any

    def __call__(self, *args: Any, visit: Callable[[Any], Any]) -> Any: ...
    def around(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...


class ReversibleModel(Protocol):
    """The model of such a chain.

    Its optional method ``matching(s, t, z_t, x, context)`` gives the layers' divergences in a numerically stable closed
    form (and, for ``s=None``, their rate in continuous time).
    """

    def __call__(self, *args: Any, visit: Callable[[Any], Any]) -> Any: ...
    def prior(self, like: Tensor) -> Distribution: ...
    def transition(self, s: Tensor, t: Tensor, z_t: Tensor, context: Any = None) -> Distribution: ...
    def likelihood(self, z_1: Tensor, context: Any = None) -> Distribution: ...


def check_capable(model: Any, guide: Any) -> None:
    """Refuse programs without the methods that the bound calls.

    Raises:
        TypeError: naming what is missing, and the bounds that read any pair.
    """
    nests = [getattr(program, "nested", None) is not None for program in (model, guide)]
    if nests[0] != nests[1]:
        raise TypeError(
            f"a diffusion is nested in the {'model' if nests[0] else 'guide'} alone, and the other program is a "
            f"{type(guide if nests[0] else model).__name__}: nest the denoising chain in the model, and its noising "
            "process in the guide, as models.latent_diffusion does"
        )
    for which, program, needed in (
        ("guide", _reversible(guide), ("marginal", "posterior", "num_layers")),
        ("model", _reversible(model), ("prior", "transition", "likelihood")),
    ):
        missing = [name for name in needed if not hasattr(program, name)]
        if missing:
            raise TypeError(
                f"DiffusionELBO needs a chain with closed-form marginals, and the {which} "
                f"{type(program).__name__} has no {', '.join(missing)}: use LayerwiseELBO or TraceELBO, which "
                "read any pair"
            )


def _reversible(program: Any) -> Any:
    """Return the chain that is nested in a program, or the program."""
    nested = getattr(program, "nested", None)
    return program if nested is None else nested


def layer_times(q: Any, index: Any) -> Any:
    """Return the times of layers ``index``, each in 1, ..., T."""
    if hasattr(q, "time"):
        return q.time(index)
    return (index - 1) / (q.num_layers - 1) if q.num_layers > 1 else index


def given_context(q: Any, context: Any) -> Any:
    """Return a process, or a noise schedule, of data with this context; one that does not depend on it is the same."""
    return q.given(context) if hasattr(q, "given") else q


def check_same_process(p: Any, q: Any, context: Any = None) -> None:
    """Refuse a model and a guide of different diffusions: other noise, noise schedules, or numbers of layers.

    Two schedule objects are compared at five times, which synchronises with their device; one shared object is not
    compared. A program without ``schedule`` or ``num_layers`` is not checked for it.

    Args:
        p: the model, as ``visit`` gets it.
        q: the guide, as ``visit`` gets it.
        context: of the call, for schedules that depend on it.

    Raises:
        ValueError: naming both sides and what to write.
    """
    layers = [getattr(program, "num_layers", q.num_layers) for program in (p, q)]
    if layers[0] != layers[1]:
        raise ValueError(
            f"the model has num_layers={layers[0]} and the guide num_layers={layers[1]}; DiffusionELBO needs one "
            "process for both. Build both with vdm(..., num_layers=...), or write "
            "Diffusion(model.schedule, model.num_layers)"
        )
    kinds = [getattr(program, "noise", None) for program in (p, q)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise ValueError(
            f"the model's noise is {kinds[0]} and the guide's {kinds[1]}; DiffusionELBO needs one process for both. "
            "Build both with models.vdm or models.discrete_diffusion"
        )
    schedules = [getattr(program, "schedule", None) for program in (p, q)]
    if schedules[0] is schedules[1] or None in schedules:
        return
    with torch.no_grad():
        model_gamma, guide_gamma = (_gammas(given_context(schedule, context)) for schedule in schedules)
    same = model_gamma.shape == guide_gamma.shape
    if not same or not torch.allclose(model_gamma, guide_gamma, rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"the model's schedule ({schedules[0]!r}) is {_listed(model_gamma)} at t = 0, 1/4, ..., 1, and the guide's "
            f"({schedules[1]!r}) {_listed(guide_gamma)}; DiffusionELBO needs one process for both. Build both with "
            "vdm(..., schedule=...) or discrete_diffusion(..., schedule=...), or write Diffusion(model.schedule, "
            "model.num_layers) or DiscreteDiffusion(model.corruption, model.num_layers)"
        )


def _gammas(schedule: Any) -> Tensor:
    """Return a schedule at five times from 0 to 1, on the CPU in float64."""
    like = next((t for t in (*schedule.parameters(), *schedule.buffers()) if t.is_floating_point()), torch.empty(()))
    times = torch.linspace(0.0, 1.0, 5, dtype=like.dtype, device=like.device)
    gammas = schedule.layers(times) if hasattr(schedule, "layers") else list(schedule(times))
    return torch.stack(gammas).double().cpu()


def _listed(gamma: Tensor) -> str:
    first = gamma.reshape(len(gamma), -1)[:, 0].tolist()
    entry = "" if gamma.dim() == 1 else f" for the first of entries of shape {tuple(gamma.shape[1:])}"
    return "[" + ", ".join(f"{value:.4g}" for value in first) + "]" + entry


def check_data(p: Any, x: Tensor, context: Any, mask: Tensor | None) -> None:
    """Check the data after a visit failed.

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
    """Return x, context, mask and data_size of a call.

    Raises:
        TypeError: for other arguments, or data that are no tensor.
    """
    unknown = sorted(set(kwargs) - {"x", "context", "mask", "data_size"})
    if unknown or len(args) > 1:
        raise TypeError(
            f"a diffusion is called with (x, *, context, mask, data_size); got {len(args)} positional, {unknown}"
        )
    x = args[0] if args else kwargs.get("x")
    if not isinstance(x, Tensor):
        raise TypeError(f"DiffusionELBO needs data x as a tensor, got {type(x).__name__}")
    return x, kwargs.get("context"), kwargs.get("mask"), kwargs.get("data_size")
