"""Densities whose scores jump, through which a gradient can't be passed on."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pyro_hvae import devices
from pyro_hvae.evidence.kernels import AnnealingKernels, Point
from pyro_hvae.evidence.path import Path, State

__all__ = ["RoughDensityWarning", "roughness", "warn_if_rough"]

_LIMIT = 0.1
_STEPS = (1e-2, 1e-3)
"""Lengths of the steps along which scores are compared, in standard deviations of the base."""


class RoughDensityWarning(UserWarning):
    """Warning: the scores of a pair jump, as those of networks with ReLU do, and gradients through steps are biased."""


def warn_if_rough(path: Path) -> None:
    """Warn of a pair whose scores jump, at draws of the base; the generators stay as they are."""
    with torch.random.fork_rng():
        missed = roughness(path)
    if missed > _LIMIT:
        warnings.warn(
            f"the scores of this pair jump: their second derivatives miss {missed:.0%} of how they change along a "
            "short step. Gradients of AnnealedBound, which pass through the chains' steps, are biased then (its value "
            "is not), and long training makes it worse. Write networks with smooth activations (SiLU, GELU, softplus, "
            "tanh) instead of ReLU, and smooth densities; or train for few epochs, and keep the best by validation",
            RoughDensityWarning,
            stacklevel=4,
        )


def roughness(path: Path) -> float:
    r"""Return the share of the change of a pair's scores that second derivatives miss; 0 where a density has no values.

    For steps v, :math:`\sqrt{\sum\|\nabla f(u+v)-\nabla f(u-v)-2\nabla^2f(u)v\|^2/\sum\|\nabla f(u+v)-\nabla
    f(u-v)\|^2}` over draws u of the base and f the two ends of the path.  Of smooth densities it falls with the square
    of the step, and where scores jump it rises to 1; the least of two lengths is returned.
    """
    start = path.start()
    if not all(devices.has_values(value) for value in start.values()):
        return 0.0
    way = {name: value.std(0) * torch.randn_like(value) for name, value in start.items()}
    linear = _linear(path, start, way)
    return min(_missed(path, start, way, linear, length) for length in _STEPS)


def _missed(path: Path, start: State, way: State, linear: list[Tensor], length: float) -> float:
    """Return the share for steps of so many standard deviations along ``way``."""
    changed, missed = 0.0, 0.0
    with torch.no_grad():
        ahead, behind = (
            _scores(AnnealingKernels.point(path, {n: u + sign * length * way[n] for n, u in start.items()}))
            for sign in (1.0, -1.0)
        )
    for after, before, slope in zip(ahead, behind, linear, strict=True):
        change = after.double() - before.double()
        changed += float((change**2).sum())
        missed += float(((change - 2.0 * length * slope.double()) ** 2).sum())
    return (missed / changed) ** 0.5 if 0.0 < changed < torch.inf and missed < torch.inf else 0.0


def _scores(at: Point) -> list[Tensor]:
    return [*at.score_q.values(), *at.score_p.values()]


def _linear(path: Path, start: State, way: State) -> list[Tensor]:
    """Return the change of each score by its derivative: of the two densities, products of Hessian and ``way``."""
    found: list[Tensor] = []
    with torch.enable_grad():
        at = AnnealingKernels.point(path, {name: value.detach() for name, value in start.items()})
        leaves = list(at.state.values())
        for scores in (at.score_q, at.score_p):
            along = torch.stack([(score * way[name]).sum() for name, score in scores.items()]).sum()
            if not along.requires_grad:
                found += [torch.zeros_like(value) for value in leaves]
                continue
            found += torch.autograd.grad(along, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return found
