"""Checks of an observation and its likelihood, before particles run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_hvae.evidence.twisted import Twist
from pyro_hvae.problem.checks import check_observation

__all__ = ["check_likelihood", "check_programs"]


def check_programs(model: Any, y: Any, likelihood: Any) -> None:
    """Refuse a model without twists, a likelihood that is no module, and y that is no batch of finite numbers.

    Raises:
        TypeError: for objects of another kind.
        ValueError: for continuous time, no data, or values that are not finite.
    """
    if not callable(getattr(model, "twisted", None)):
        raise TypeError(
            f"condition needs a diffusion as the prior of x, a DenoisingChain or a DiscreteDenoisingChain, got "
            f"{type(model).__name__}; of a pair take the model, and of other chains write y as one more kernel"
        )
    if model.num_layers is None:
        raise ValueError(
            "a diffusion in continuous time has no layers to condition: build the chain with num_layers=, with the "
            "same denoiser"
        )
    if not isinstance(likelihood, nn.Module):
        raise TypeError(
            f"likelihood must be a kernel p(y|x), a torch.nn.Module whose forward(x) returns a distribution, got "
            f"{type(likelihood).__name__}; for example LinearGaussian(in_features, out_features, weight=..., scale=...)"
        )
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a torch.Tensor, got {type(y).__name__}; convert with torch.as_tensor")
    if not y.dim() or not len(y):
        raise ValueError(
            f"y must have at least one datum along its first dim, got shape {tuple(y.shape)}; write y.unsqueeze(0) for "
            "one datum"
        )
    if y.is_floating_point() and not bool(torch.isfinite(y).all()):
        first = tuple((~torch.isfinite(y)).nonzero()[0].tolist())
        raise ValueError(
            f"y is {y[first].item()} at index {first}: drop such data, or mask the entries in the likelihood's "
            "distribution and put any finite number in their place"
        )


def check_likelihood(likelihood: nn.Module, twist: Twist, y: Tensor) -> None:
    """Refuse likelihoods of other shapes, y outside of their support, and those without a gradient.

    Raises:
        TypeError: for a likelihood that returns no distribution.
        ValueError: for all else.
    """
    size, name = len(y), type(likelihood).__name__
    with torch.enable_grad():
        x = twist.example(size).requires_grad_()
        try:
            distribution = likelihood(x)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"the likelihood {name} failed on x of shape {tuple(x.shape)}, (N, *event_shape of the diffusion): "
                f"{error}"
            ) from error
        if not hasattr(distribution, "log_prob"):
            raise TypeError(f"the likelihood {name} must return a distribution, got {type(distribution).__name__}")
        shapes = tuple(distribution.batch_shape), tuple(distribution.event_shape)
        if shapes != ((size,), tuple(y.shape[1:])):
            raise ValueError(
                f"the likelihood {name} must have batch shape {(size,)} and the event shape of y "
                f"{tuple(y.shape[1:])}, got {shapes[0]} and {shapes[1]}: move the dims of one observation into the "
                "event by .to_event(...), or give y that shape"
            )
        check_observation("y", distribution, y)
        if not distribution.log_prob(y).requires_grad:
            raise ValueError(
                f"the likelihood {name} has no gradient with respect to x: write it by differentiable operations of x, "
                "without detach() or rounding"
            )
