"""A state-space model with its data: lengths, masks, context and history, and its conditionals."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae.chains.arguments import batch_size
from pyro_hvae.chains.base import Node
from pyro_hvae.chains.history import History, flatten
from pyro_hvae.chains.markov import MarkovSequence
from pyro_hvae.chains.missing import fill_value
from pyro_hvae.kernels.base import join

__all__ = ["BoundSequences", "observed_entries", "reference", "valid_steps"]


class BoundSequences:
    """A state-space model with its data: its conditionals (:class:`~pyro_hvae.chains.markov.Conditionals`)."""

    def __init__(
        self,
        model: Any,
        x: Tensor | None,
        context: Any,
        lengths: Tensor | None,
        mask: Tensor | None,
        *,
        size: int | None = None,
        steps: int | None = None,
    ) -> None:
        self.model, self.x, self.mask = model, x, mask
        self.size = batch_size(model.name, x, context, None, size)
        over_time = isinstance(context, Tensor) and context.dim() >= 3
        found = x.shape[1] if x is not None and x.dim() > 1 else context.shape[1] if over_time else steps
        if found is None or found < 1:
            raise ValueError(
                f"{model.name!r} can't tell how many steps to draw: pass steps=, or x of shape (N, T, ...)."
            )
        self.steps = int(found)
        if over_time and context.shape[1] != self.steps:
            raise ValueError(f"context has {context.shape[1]} steps where {self.steps} are expected.")
        self.context = context.unsqueeze(1).expand(-1, self.steps, -1) if _static(context) else context
        self.like = x if x is not None else context if isinstance(context, Tensor) else reference(model)
        self.valid = valid_steps(lengths, self.size, self.steps, self.like.device)
        self.observed = observed_entries(model.name, x, mask, self.valid)
        self.history: History | None = None
        if model.reads_history and x is not None:
            self.history = History(model.memory, flatten(self.seen(), reference(model).dtype))

    def seen(self) -> Tensor:
        """Return the data with zeros where they are masked or padding."""
        assert self.x is not None
        if self.observed is None:
            return self.x
        observed = self.observed.reshape(self.observed.shape + (1,) * (self.x.dim() - self.observed.dim()))
        return torch.where(observed, self.x, torch.zeros_like(self.x))

    def memory(self, nodes: list[Node], t: int, name: str) -> tuple[str, ...]:
        """Append the node of the history's state before step t, if there is one; return its name as a dependency."""
        history = self.history
        if history is None or history.rnn is None or not t:
            return ()
        known, before = (f"{name}{t - 1}",) if t > 1 else (), f"z{t}"

        def state(*values: Tensor) -> Tensor:
            start = values[0] if len(values) == 2 else history.start()
            return history.advance(t - 1, values[-1], start)  # type: ignore[return-value]

        nodes.append(("value", f"{name}{t}", (*known, before), state))
        return (f"{name}{t}",)

    def context_at(self, t: int) -> Any:
        """Return the context of step t, of features that are taken apart once: an index a step would cost more."""
        return self._contexts[t] if isinstance(self.context, Tensor) else self.context

    @cached_property
    def _contexts(self) -> tuple[Tensor, ...]:
        return self.context.unbind(1)

    def covariates(self, t: int, state: Tensor | None) -> Any:
        """Return the context of step t, with the features of the history."""
        context = self.context_at(t)
        if self.history is None:
            return context
        features = self.history.features(t, self.history.start() if state is None else state)
        return features if context is None else join(context, features)

    # -- conditionals of z

    def at(self, t: int, before: Tensor | None, state: Any) -> TorchDistribution:
        model = self.model
        if before is None:
            return model.distribution("initial", model.initial, None, self.context_at(0))
        return model.distribution("transition", model.transition, before, self.covariates(t, state))

    def advance(self, t: int, value: Tensor, state: Any) -> Any:
        if self.history is None:
            return None
        return self.history.advance(t, value, self.history.start() if state is None else state)

    def joint(self, values: Tensor) -> list[tuple[int, TorchDistribution]]:
        model, first = self.model, self.context
        if isinstance(first, Tensor):
            first = first[:, :1]
        parts = [(1, model.distribution("initial", model.initial, None, first))]
        if self.steps > 1:
            context = self.all_covariates(values)
            before = values.narrow(values.dim() - len(self.first.event_shape) - 1, 0, self.steps - 1)
            after = context[..., 1:, :] if isinstance(context, Tensor) else context
            parts.append((self.steps - 1, model.distribution("transition", model.transition, before, after)))
        return parts

    def all_covariates(self, values: Tensor) -> Any:
        if self.history is None:
            return self.context
        features = self.history.all_features(values)
        return features if self.context is None else join(self.context, features)

    @cached_property
    def first(self) -> TorchDistribution:
        """The distribution of the first draw."""
        return self.at(0, None, None)

    def prior(self) -> MarkovSequence:
        """Return p(z_1, ..., z_T)."""
        return MarkovSequence(self, self.steps, self.valid, torch.Size((self.size,)), self.first)

    # -- observations

    def emission(self, z: Tensor) -> tuple[TorchDistribution, Tensor | None]:
        """Return p(x_1, ..., x_T | z) and the data, filled where they are masked."""
        model = self.model
        context = self.all_covariates(z)
        distribution = model.distribution("emission", model.emission, z, context)
        return self._masked(distribution, self.x, self.observed, ("N", "T"))

    def transition_density(self, t: int) -> Callable[..., Tensor]:
        def log_density(*values: Tensor) -> Tensor:
            value, before = values[-1], values[0] if t else None
            state = values[1] if len(values) == 3 else None
            return self._counted(t, self.at(t, before, state).log_prob(value))

        return log_density

    def emission_density(self, t: int) -> Callable[..., Tensor]:
        def log_likelihood(*values: Tensor) -> Tensor:
            model = self.model
            state = values[0] if len(values) == 2 else None
            context = self.covariates(t, state)
            distribution = model.distribution("emission", model.emission, values[-1], context)
            assert self.x is not None
            observed = None if self.observed is None else self.observed[:, t]
            masked, data = self._masked(distribution, self.x[:, t], observed, ("N",))
            return masked.log_prob(data)

        return log_likelihood

    def _counted(self, t: int, value: Tensor) -> Tensor:
        if self.valid is None:
            return value
        return torch.where(self.valid[:, t], value, torch.zeros((), dtype=value.dtype, device=value.device))

    def check_event(self, event: torch.Size, x: Tensor, dims: tuple[str, ...]) -> None:
        """Refuse data whose dims after ``dims`` are not the emission's event.

        Raises:
            ValueError: with both shapes.
        """
        found = x.shape[len(dims) :]
        if found != event:
            raise ValueError(
                f"the emission of {self.model.name!r} gives events of shape {tuple(event)}, but an observation has "
                f"shape {tuple(found)} (data {tuple(x.shape)}, ({', '.join(dims)}, *event)). Reshape the data, or set "
                "the width and event_dim of the kernel."
            )

    def _masked(
        self, distribution: TorchDistribution, x: Tensor | None, observed: Tensor | None, dims: tuple[str, ...]
    ) -> tuple[TorchDistribution, Tensor | None]:
        """Make the time a dim of the event, and drop what is not observed."""
        lead = len(dims)
        if x is not None:
            self.check_event(distribution.event_shape, x, dims)
        if observed is None:
            return distribution.to_event(lead - 1), x
        base: Any = distribution
        reinterpreted = 0
        if observed.dim() > lead:
            while isinstance(base, torch.distributions.Independent):
                reinterpreted += base.reinterpreted_batch_ndims
                base = base.base_dist
            if base.event_dim:
                raise ValueError(
                    f"the emission of {self.model.name!r} ({type(base).__name__}) does not factorise over the last "
                    f"{base.event_dim} dim(s) of its event, so single entries can't be masked. Pass a mask of shape "
                    "(N, T)."
                )
        if x is not None:
            leaf: Any = base
            while isinstance(leaf, torch.distributions.Independent):
                leaf = leaf.base_dist
            over = observed.reshape(observed.shape + (1,) * (x.dim() - observed.dim()))
            x = torch.where(over, x, fill_value("x", leaf, x).to(x.dtype))
        return base.mask(observed).to_event(reinterpreted + lead - 1), x


def valid_steps(lengths: Tensor | None, size: int, steps: int, device: Any) -> Tensor | None:
    """Return which steps are before the end of each sequence, (N, T); None where all are.

    Raises:
        ValueError: for lengths of another shape or type, or outside of 1..T (checked on the CPU only, since a check
            waits for the device).
    """
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.shape != (size,) or lengths.is_floating_point():
        given = f"{lengths.dtype} of shape {tuple(lengths.shape)}" if isinstance(lengths, Tensor) else repr(lengths)
        raise ValueError(
            f"lengths holds the number of steps of each sequence, integers of shape ({size},); got {given}."
        )
    if lengths.device.type == "cpu" and not bool(((lengths >= 1) & (lengths <= steps)).all()):
        raise ValueError(f"every length must be between 1 and the {steps} steps of the data, got {lengths.tolist()}.")
    return torch.arange(steps, device=device) < lengths.to(device).unsqueeze(-1)


def observed_entries(name: str, x: Tensor | None, mask: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Return which entries are observed and before the end, (N, T) or of the shape of x; None where all are."""
    if mask is None:
        return valid
    if x is None:
        raise ValueError(f"{name!r} takes a mask together with data: pass x.")
    if mask.dtype != torch.bool or mask.shape not in (x.shape, x.shape[:2]):
        raise ValueError(
            f"mask must be boolean (True = observed), of the shape of x {tuple(x.shape)} or {tuple(x.shape[:2])}; got "
            f"{mask.dtype} of shape {tuple(mask.shape)}."
        )
    if valid is None:
        return mask
    return mask & valid.reshape(valid.shape + (1,) * (mask.dim() - 2))


def _static(context: Any) -> bool:
    return isinstance(context, Tensor) and context.dim() == 2


def reference(module: nn.Module) -> Tensor:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor
    return torch.empty(())
