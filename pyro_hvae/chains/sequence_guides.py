r"""Guides of a state-space model: the filter, which has seen the past, and the smoother, which has seen the future too.

.. math::
    \text{Filter:}\quad q(z_1|x_1)\prod_t q(z_t|z_{t-1}, x_{1:t}),\qquad
    \text{Smoother:}\quad q(z_1|x_{1:T})\prod_t q(z_t|z_{t-1}, x_{t:T})

Both read the data by a recurrent network of torch, forwards or backwards in time.  The exact posterior of a state-space
model without history has the form of the smoother.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_hvae.chains.base import Chain, Node
from pyro_hvae.chains.bound_sequences import BoundSequences, reference
from pyro_hvae.chains.history import check_rnn, flatten, run_rnn
from pyro_hvae.chains.sequences import StateSpace
from pyro_hvae.chains.weights import register
from pyro_hvae.kernels.base import join

__all__ = ["Filter", "Smoother"]


class SequenceGuide(Chain):
    """Base of the guides over sequences: kernels of the first and of later draws, and features of the data."""

    def __init__(
        self,
        *,
        initial: nn.Module,
        transition: nn.Module,
        rnn: nn.RNNBase | None,
        model: StateSpace | None = None,
        name: str = "guide",
        plate: str = "data",
    ) -> None:
        super().__init__(name, plate, {"initial": initial, "transition": transition})
        if rnn is not None:
            check_rnn("rnn", rnn)
            self.rnn = rnn
        if model is not None and not isinstance(model, StateSpace):
            raise TypeError(f"model is the StateSpace whose history the guide reads, got {type(model).__name__}.")
        self._held: tuple[StateSpace, ...] = () if model is None else (model,)

    @property
    def reads_history(self) -> bool:
        return bool(self._held) and self._held[0].reads_history

    @property
    def memory(self) -> nn.RNNBase | None:
        """The recurrent network of the model's history; the model owns its parameters."""
        return getattr(self._held[0], "history", None) if self._held else None

    def forward(
        self,
        x: Tensor,
        context: Any = None,
        lengths: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        data_size: int | None = None,
        visit: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Draw the latents given x; arguments as those of :class:`StateSpace`.

        Returns:
            z (..., N, T, *latent), 0 after the end of a sequence.
        """
        if visit is not None:
            return visit(self)
        self.refuse_global("is evaluated after its call, when they are gone. Use plain parameters.")
        naming: Any = nullcontext()
        if self.reads_history and self._pyro_context.active:
            naming = self._held[0]._pyro_context
        with naming:
            data = BoundGuide(self, x, context, lengths, mask)
            register(self)
            with self.data_plate(data.size, data_size, x.device):
                return pyro.sample("z", data.prior())

    def stepwise(
        self,
        x: Tensor,
        context: Any = None,
        lengths: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        data_size: int | None = None,
    ) -> list[Node]:
        """List the draws ``z1``, ..., ``zT``, for particles (:class:`pyro_hvae.SMCBound`).

        Args: those of the program.
        """
        self.refuse_global()
        data = BoundGuide(self, x, context, lengths, mask)
        nodes: list[Node] = []
        for t in range(data.steps):
            before = (f"z{t}",) if t else ()
            memory = data.memory(nodes, t, "memory")
            nodes.append(("draw", f"z{t + 1}", (*before, *memory), data.proposal(t)))
        return nodes

    def features(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Return what each step has seen of the data (N, T, D), zero where missing: (N, T, F)."""
        raise NotImplementedError

    def _path(self) -> list[str]:
        return ["x", "z"]


class Filter(SequenceGuide):
    """Guide q(z_1 | x_1) prod q(z_t | z_{t-1}, x_{1:t}): each draw has seen the past.

    Args:
        initial: kernel of z_1, called with parent None and the features e_1 as its context.
        transition: kernel of z_t, called with z_{t-1} and the features e_t.
        rnn: recurrent network over x (and the context, if there is one) whose output at t is e_t; None for e_t = x_t.
        model: a model with a history, which the kernels then get as well, joined to the features.
        name, plate: as in the chains.

    Example:
        >>> from pyro_hvae.kernels import Gaussian
        >>> _ = torch.manual_seed(0)
        >>> guide = Filter(
        ...     initial=Gaussian(nn.Linear(8, 4)),
        ...     transition=Gaussian(nn.Linear(2 + 8, 4)),
        ...     rnn=nn.GRU(5, 8, batch_first=True),
        ... )
        >>> guide(torch.zeros(3, 7, 5)).shape
        torch.Size([3, 7, 2])
    """

    def __init__(
        self, *, initial: nn.Module, transition: nn.Module, rnn: nn.RNNBase | None = None, **options: Any
    ) -> None:
        super().__init__(initial=initial, transition=transition, rnn=rnn, **options)

    def features(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return run_rnn(self.rnn, x)[0] if "rnn" in self._modules else x


class Smoother(SequenceGuide):
    """Guide q(z_1 | x_{1:T}) prod q(z_t | z_{t-1}, x_{t:T}): each draw has seen the future, from its own step on.

    Args:
        initial: kernel of z_1, called with parent None and the features e_1 as its context.
        transition: kernel of z_t, called with z_{t-1} and the features e_t.
        rnn: recurrent network over x (and the context, if there is one), run backwards from the end of each sequence.
        model: a model with a history, which the kernels then get as well, joined to the features.
        name, plate: as in the chains.

    Reference:
        Structured Inference Networks for Nonlinear State Space Models (Krishnan, Shalit and Sontag, 2017).

    Example:
        >>> from pyro_hvae.kernels import Gaussian
        >>> _ = torch.manual_seed(0)
        >>> guide = Smoother(
        ...     initial=Gaussian(nn.Linear(8, 4)),
        ...     transition=Gaussian(nn.Linear(2 + 8, 4)),
        ...     rnn=nn.GRU(5, 8, batch_first=True),
        ... )
        >>> guide(torch.zeros(3, 7, 5), lengths=torch.tensor([7, 2, 4])).shape
        torch.Size([3, 7, 2])
    """

    def __init__(self, *, initial: nn.Module, transition: nn.Module, rnn: nn.RNNBase, **options: Any) -> None:
        super().__init__(initial=initial, transition=transition, rnn=rnn, **options)

    def features(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if valid is None:
            return run_rnn(self.rnn, x.flip(1))[0].flip(1)
        steps = torch.arange(x.shape[1], device=x.device)
        index = valid.sum(1, keepdim=True) - 1 - steps  # each sequence from its own end
        index = torch.where(index >= 0, index, steps).unsqueeze(-1)
        backwards = run_rnn(self.rnn, x.gather(1, index.expand(-1, -1, x.shape[-1])))[0]
        return backwards.gather(1, index.expand(-1, -1, backwards.shape[-1]))


class BoundGuide(BoundSequences):
    """A guide with its data; the features of the data take the place of the context."""

    def __init__(self, guide: SequenceGuide, x: Tensor, context: Any, lengths: Tensor | None, mask: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{guide.name!r} takes data as a torch.Tensor, got {type(x).__name__}.")
        super().__init__(guide, x, context, lengths, mask)
        seen = flatten(self.seen(), reference(guide).dtype)
        context = self.context
        features = guide.features(seen if context is None else join(seen, context), self.valid)
        self.context = features if context is None else join(context, features)

    def proposal(self, t: int) -> Callable[..., Any]:
        """Return the distribution of z_t as a function of z_{t-1} and the history's state, as particles need it."""

        def distribution(*values: Tensor) -> Any:
            conditional = self.at(t, values[0] if t else None, values[1] if len(values) == 2 else None)
            return conditional if self.valid is None else _Ended(conditional, self.valid[:, t])

        return distribution


class _Ended:
    """A distribution whose draws are 0 and have no density for data that have ended."""

    def __init__(self, distribution: Any, valid: Tensor) -> None:
        self.distribution, self.valid = distribution, valid
        self.batch_shape, self.has_rsample = distribution.batch_shape, distribution.has_rsample

    def expand(self, shape: tuple[int, ...]) -> _Ended:
        return _Ended(self.distribution.expand(shape), self.valid)

    def rsample(self) -> Tensor:
        return self._ended(self.distribution.rsample(), len(self.distribution.event_shape))

    def sample(self) -> Tensor:
        return self._ended(self.distribution.sample(), len(self.distribution.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self._ended(self.distribution.log_prob(value), 0)

    def _ended(self, value: Tensor, event_dim: int) -> Tensor:
        valid = self.valid.reshape(self.valid.shape + (1,) * event_dim)
        return torch.where(valid, value, torch.zeros((), dtype=value.dtype, device=value.device))
