r"""State-space models: a Markov chain in time under a sequence of observations.

.. math:: p(z_{1:T}, x_{1:T}) = p(z_1)\prod_{t=2}^T p(z_t|z_{t-1}, h_t)\prod_{t=1}^T p(x_t|z_t, h_t)

:class:`StateSpace` is one Pyro program with two sites in the plate over sequences: ``z`` of shape (N, T, \*latent) and
``x`` of shape (N, T, \*event), so that its cost is two sites however long the sequences are, and draws in a tree have a
dim of time.  Densities are evaluated at all steps at once, draws step by step.

**Ragged minibatches.** ``lengths`` (N,) are the numbers of steps.  Steps after the end are padding: draws are 0 there,
and neither program counts them.  Values of the padding reach nothing.

**Missing data.** ``mask`` is True where observed, of shape (N, T) for whole steps or of the shape of x.  Masked entries
are dropped from the likelihood, and guides and histories see 0 there.

**Context.** (N, T, c) over time, or (N, c) the same at each step; each kernel gets it as its second argument.

**Histories.** With ``history`` the transition and the emission get, joined to the context, what came before:
``"previous"`` is the last observation (autoregressive emissions); a recurrent network over [x_{t-1}, z_{t-1}] makes
the variational recurrent network of A Recurrent Latent Variable Model for Sequential Data (Chung et al., 2015).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae.chains.arguments import batch_size
from pyro_hvae.chains.base import Chain, Node
from pyro_hvae.chains.history import History, check_rnn, flatten
from pyro_hvae.chains.markov import MarkovSequence
from pyro_hvae.chains.missing import fill_value
from pyro_hvae.chains.weights import register
from pyro_hvae.kernels.base import join

__all__ = ["StateSpace"]


class StateSpace(Chain):
    """State-space model p(z_1) prod p(z_t | z_{t-1}) prod p(x_t | z_t).

    Args:
        initial: kernel of z_1, called with parent None.
        transition: kernel of z_t, called with z_{t-1}.
        emission: kernel of x_t, called with z_t.
        history: None; ``"previous"`` to give transition and emission x_{t-1}; or a recurrent network of torch over
            [x_{t-1}, z_{t-1}] to give them its output (LSTM, GRU or RNN, input width D + d).
        name, plate: as in the chains.

    Raises:
        TypeError: for kernels that are no modules, or a history of another kind.
        ValueError: on a call, for shapes that do not fit.

    Example:
        >>> from pyro_hvae.kernels import Bernoulli, LinearGaussian
        >>> _ = torch.manual_seed(0)
        >>> model = StateSpace(
        ...     initial=LinearGaussian(0, 2), transition=LinearGaussian(2, 2), emission=Bernoulli(nn.Linear(2, 5))
        ... )
        >>> model(size=3, steps=7).shape
        torch.Size([3, 7, 5])
    """

    def __init__(
        self,
        *,
        initial: nn.Module,
        transition: nn.Module,
        emission: nn.Module,
        history: nn.RNNBase | str | None = None,
        name: str = "model",
        plate: str = "data",
    ) -> None:
        super().__init__(name, plate, {"initial": initial, "transition": transition, "emission": emission})
        if isinstance(history, str) and history != "previous":
            raise ValueError(f"history is None, 'previous' or a recurrent network, got {history!r}")
        self.reads_history = history is not None
        if history is not None and not isinstance(history, str):
            check_rnn("history", history)
            self.history = history

    @property
    def memory(self) -> nn.RNNBase | None:
        """The recurrent network of the history, if there is one."""
        return getattr(self, "history", None)

    def forward(
        self,
        x: Tensor | None = None,
        context: Any = None,
        lengths: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        size: int | None = None,
        steps: int | None = None,
        data_size: int | None = None,
        visit: Callable[[StateSpace], Any] | None = None,
    ) -> Any:
        """Run the program: draw sequences, or condition on x if it is not None.

        Args:
            x: data (N, T, *event), or None to draw it.
            context: covariates (N, T, c) or (N, c).
            lengths: number of steps of each sequence, (N,); T by default.
            mask: True = observed, (N, T) or of the shape of x.
            size, steps: N and T, where x and context do not say them.
            data_size: number of sequences of the data set of which x is a minibatch.
            visit: run this function of the chain instead, inside of the module's call, where parameters register.

        Returns:
            The observations (N, T, *event), drawn, or x.
        """
        if visit is not None:
            return visit(self)
        self.refuse_global("is evaluated after its call, when they are gone. Use plain parameters.")
        data = self.bind(x, context, lengths, mask, size=size, steps=steps)
        if x is None and self.reads_history:
            return self._draw_jointly(data)
        register(self)
        with self.data_plate(data.size, data_size, data.like.device):
            z = pyro.sample("z", data.prior())
            emission, value = data.emission(z)
            return pyro.sample("x", emission, obs=value)

    def bind(
        self,
        x: Tensor | None,
        context: Any = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        size: int | None = None,
        steps: int | None = None,
    ) -> BoundSequences:
        """Return the model with its data; raises on arguments that do not fit."""
        return BoundSequences(self, x, context, lengths, mask, size=size, steps=steps)

    def stepwise(
        self,
        x: Tensor,
        context: Any = None,
        lengths: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        data_size: int | None = None,
    ) -> list[Node]:
        """List the factors p(z_t | z_{t-1}) and p(x_t | z_t), for particles (:class:`pyro_hvae.SMCBound`).

        Args: those of the program.  Draws are called ``z1``, ..., ``zT``.
        """
        self.refuse_global()
        data = self.bind(x, context, lengths, mask)
        nodes: list[Node] = []
        for t in range(data.steps):
            before = (f"z{t}",) if t else ()
            memory = data.memory(nodes, t, "history")
            nodes.append(("factor", f"z{t + 1}", (*before, *memory, f"z{t + 1}"), data.transition_density(t)))
            nodes.append(("factor", f"x{t + 1}", (*memory, f"z{t + 1}"), data.emission_density(t)))
        return nodes

    def _draw_jointly(self, data: BoundSequences) -> Tensor:
        raise ValueError(
            f"{self.name!r} reads earlier observations, so its latents can't be drawn before its data: use "
            "chains.simulate(model, size=, steps=) or chains.forecast(...), which draw both step by step, or pass x"
        )

    def _path(self) -> list[str]:
        return ["z", "x"]


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
        self.like = x if x is not None else context if isinstance(context, Tensor) else _reference(model)
        self.valid = valid_steps(lengths, self.size, self.steps, self.like.device)
        self.observed = observed_entries(model.name, x, mask, self.valid)
        self.history: History | None = None
        if model.reads_history and x is not None:
            self.history = History(model.memory, flatten(self.seen(), _reference(model).dtype))

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

    def _masked(
        self, distribution: TorchDistribution, x: Tensor | None, observed: Tensor | None, dims: tuple[str, ...]
    ) -> tuple[TorchDistribution, Tensor | None]:
        """Make the time a dim of the event, and drop what is not observed."""
        event, lead = distribution.event_shape, len(dims)
        if x is not None and x.shape[lead:] != event:
            raise ValueError(
                f"the emission of {self.model.name!r} gives events of shape {tuple(event)}, but an observation has "
                f"shape {tuple(x.shape[lead:])} (data {tuple(x.shape)}, ({', '.join(dims)}, *event)). Reshape the "
                "data, or set the width and event_dim of the kernel."
            )
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


def _reference(module: nn.Module) -> Tensor:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor
    return torch.empty(())
