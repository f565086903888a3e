"""Sequences drawn step by step: from the start, or on from the end of data."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_hvae.chains.bound_sequences import reference
from pyro_hvae.chains.history import History
from pyro_hvae.chains.sequence_guides import SequenceGuide
from pyro_hvae.chains.sequences import StateSpace
from pyro_hvae.kernels.base import join
from pyro_hvae.modules import evaluation_mode

__all__ = ["forecast", "simulate"]


def simulate(
    model: StateSpace, *, size: int, steps: int, context: Tensor | None = None, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw latents and observations of whole sequences, without gradient and in evaluation mode.

    Unlike a call of the model it also draws from models with a history.

    Args:
        size, steps: N and T.
        context: covariates (N, T, c) or (N, c).
        width: number of entries of one observation; needed where the history is ``"previous"``.

    Returns:
        z (N, T, *latent) and x (N, T, *event).

    Raises:
        ValueError: without a width that is needed.

    Example:
        >>> from pyro_hvae.kernels import Bernoulli, LinearGaussian
        >>> _ = torch.manual_seed(0)
        >>> model = StateSpace(
        ...     initial=LinearGaussian(0, 2),
        ...     transition=LinearGaussian(2 + 5, 2),
        ...     emission=Bernoulli(torch.nn.Linear(2 + 5, 5)),
        ...     history="previous",
        ... )
        >>> [tuple(value.shape) for value in simulate(model, size=3, steps=7, width=5)]
        [(3, 7, 2), (3, 7, 5)]
    """
    with torch.no_grad(), evaluation_mode(model), pyro.poutine.block():
        data = model.bind(None, context, size=size, steps=steps)
        previous = None
        if model.reads_history and model.memory is None:
            if width is None:
                raise ValueError(
                    "the first step reads a previous observation of zeros: pass width=, its number of entries."
                )
            previous = reference(model).new_zeros(size, width)
        return _continue(model, data.context, steps, (None, previous, None), size)


def forecast(
    model: StateSpace,
    guide: SequenceGuide,
    x: Tensor,
    *,
    steps: int,
    num_draws: int = 100,
    context: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Draw what follows data: the latents of the data from the guide, then the model's steps on from the last of them.

    Args:
        x: data (N, T, *event).
        steps: number of steps ahead, counted from the end of each sequence.
        num_draws: S.
        context: covariates (N, T + steps, c) or (N, c); those of the steps ahead come after the T of the data.
        lengths, mask: as in the model.

    Returns:
        Draws (S, N, steps, *event), without gradient and in evaluation mode.

    Raises:
        ValueError: for counts below 1, or a context that does not reach ahead.

    Example:
        >>> from pyro_hvae.models import deep_markov
        >>> _ = torch.manual_seed(0)
        >>> model, guide = deep_markov(5, 2, hidden=4)
        >>> forecast(model, guide, torch.zeros(3, 7, 5), steps=4, num_draws=10).shape
        torch.Size([10, 3, 4, 5])
    """
    if steps < 1 or num_draws < 1:
        raise ValueError(f"steps and num_draws must be at least 1, got {steps} and {num_draws}.")
    past = future = context
    if isinstance(context, Tensor) and context.dim() >= 3:
        if context.shape[1] != x.shape[1] + steps:
            raise ValueError(
                f"context has {context.shape[1]} steps; a forecast needs those of the data and those ahead, "
                f"{x.shape[1]} + {steps}."
            )
        past, future = context[:, : x.shape[1]], context[:, x.shape[1] :]
    elif context is not None:
        future = context.unsqueeze(1).expand(-1, steps, -1)
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(guide), pyro.poutine.block():
        with pyro.plate("_draws", num_draws, dim=-2):
            z = guide(x, past, lengths, mask=mask)
        data = model.bind(x, past, lengths, mask)
        last = (x.new_full((len(x),), x.shape[1], dtype=torch.long) if lengths is None else lengths) - 1
        rows = torch.arange(len(x), device=x.device)
        previous = state = None
        if data.history is not None:
            previous, state = data.history.x[rows, last].expand(num_draws, -1, -1), _last_state(data.history, z, last)
        return _continue(model, future, steps, (z[:, rows, last], previous, state), len(x))[1]


def _last_state(history: History, z: Tensor, last: Tensor) -> Tensor | None:
    """Return the state of the history after the last step of each sequence."""
    state = history.start()
    if state is None:
        return None
    state = state.expand(*z.shape[:2], -1)
    for t in range(z.shape[2]):
        after = history.advance(t, z[:, :, t], state)
        assert after is not None
        state = torch.where((t <= last).unsqueeze(-1), after, state)
    return state


def _continue(
    model: StateSpace, context: Tensor | None, steps: int, start: tuple[Any, ...], size: int
) -> tuple[Tensor, Tensor]:
    """Draw z and x, (..., N, steps, *event), on from z, x_{t-1} and the history's state; z is None at the start."""
    z, previous, state = start
    history = History(model.memory, reference(model).new_zeros(size, 1, 0)) if model.reads_history else None
    if history is not None and state is None:
        state = history.start()
    drawn: list[tuple[Tensor, Tensor]] = []
    for t in range(steps):
        covariates = own = None if context is None else context[:, t]
        if history is not None:
            features = history.read(previous, state)
            covariates = features if own is None else join(own, features)
        if z is None:
            z = model.distribution("initial", model.initial, None, own).expand((size,)).sample()
        else:
            z = model.distribution("transition", model.transition, z, covariates).sample()
        emission = model.distribution("emission", model.emission, z, covariates)
        x = emission.sample()
        drawn.append((z, x))
        if history is not None:
            previous = x.reshape(*emission.batch_shape, -1).to(reference(model).dtype)
            state = history.after(previous, z, state)
    lead = len(emission.batch_shape)
    return torch.stack([z for z, _ in drawn], lead), torch.stack([x for _, x in drawn], lead)
