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
from typing import Any

import pyro
from torch import Tensor, nn

from pyro_hvae.chains.base import Chain, Node
from pyro_hvae.chains.bound_sequences import BoundSequences
from pyro_hvae.chains.exact import log_marginal
from pyro_hvae.chains.history import check_rnn
from pyro_hvae.chains.weights import register

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
        >>> import torch
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

    def log_marginal(
        self,
        x: Tensor,
        context: Any = None,
        lengths: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        data_size: int | None = None,
    ) -> Tensor:
        """Compute log p(x) exactly: by the Kalman filter, or over discrete states by the forward algorithm.

        Args: those of the program; ``data_size`` changes nothing.

        Returns:
            Nats (N,), differentiable in the parameters.

        Raises:
            ValueError: for kernels that are neither all :class:`~pyro_hvae.kernels.LinearGaussian` nor a chain of
                discrete states (with any emission), or for a recurrent history.

        Reference:
            A New Approach to Linear Filtering and Prediction Problems (Kalman, 1960); A Tutorial on Hidden Markov
            Models (Rabiner, 1989).

        Example:
            >>> import torch
            >>> from pyro_hvae.kernels import LinearGaussian
            >>> one = LinearGaussian(1, 1, weight=torch.ones(1, 1))
            >>> model = StateSpace(initial=LinearGaussian(0, 1), transition=one, emission=one)
            >>> model.log_marginal(torch.zeros(1, 1, 1)).detach()  # x_1 ~ N(0, 2)
            tensor([-1.2655])
        """
        self.refuse_global()
        return log_marginal(self.bind(x, context, lengths, mask))

    def _draw_jointly(self, data: BoundSequences) -> Tensor:
        raise ValueError(
            f"{self.name!r} reads earlier observations, so its latents can't be drawn before its data: use "
            "chains.simulate(model, size=, steps=) or chains.forecast(...), which draw both step by step, or pass x"
        )

    def _path(self) -> list[str]:
        return ["z", "x"]
