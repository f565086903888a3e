r"""What a step of a sequence knows of the steps before: the last observation, or the state of a recurrent network.

:math:`h_t = (x_{t-1})`, or :math:`h_t = \mathrm{rnn}(h_{t-1}, [x_{t-1}, z_{t-1}])`, with zeros before the first step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["History", "flatten", "run_rnn"]


class History:
    """The features h_t of one minibatch.

    Args:
        rnn: an ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` over [x_{t-1}, z_{t-1}], or None for x_{t-1} alone.
        x: flattened observations (N, T, D), zero where they are missing.
    """

    def __init__(self, rnn: nn.RNNBase | None, x: Tensor) -> None:
        self.rnn, self.x = rnn, x

    def start(self) -> Tensor | None:
        """Return the state before the first step: a vector that holds h and what the network remembers besides."""
        if self.rnn is None:
            return None
        layers = self.rnn.num_layers * (2 if isinstance(self.rnn, nn.LSTM) else 1)
        return self.x.new_zeros(self.x.shape[0], layers * self.rnn.hidden_size)

    def features(self, t: int, state: Tensor | None) -> Tensor:
        """Return h_t, (..., N, H)."""
        return self.read(self.x[:, t - 1] if t else torch.zeros_like(self.x[:, 0]), state)

    def read(self, previous: Tensor, state: Tensor | None) -> Tensor:
        """Return h_t given x_{t-1} (..., N, D) and the state."""
        if self.rnn is None:
            return previous
        assert state is not None
        size = self.rnn.hidden_size
        last = self.rnn.num_layers - 1
        return state[..., last * size : (last + 1) * size]

    def advance(self, t: int, value: Tensor, state: Tensor | None) -> Tensor | None:
        """Return the state after step t, with the draw z_t (..., N, d)."""
        return self.after(self.x[:, t], value, state)

    def after(self, observed: Tensor, value: Tensor, state: Tensor | None) -> Tensor | None:
        """Return the state after a step with x_t (..., N, D) and z_t (..., N, d)."""
        rnn = self.rnn
        if rnn is None:
            return None
        assert state is not None
        inputs = torch.cat([observed.expand(*value.shape[:-1], -1), value], -1)
        lead = inputs.shape[:-1]
        flat = state.expand(*lead, -1).reshape(-1, state.shape[-1])
        pieces = flat.reshape(len(flat), -1, rnn.hidden_size).movedim(1, 0).contiguous()
        hidden: Any = pieces
        if isinstance(rnn, nn.LSTM):
            hidden = (pieces[: rnn.num_layers], pieces[rnn.num_layers :])
        _, after = run_rnn(rnn, inputs.reshape(-1, 1, inputs.shape[-1]), hidden)
        stacked = torch.cat(after) if isinstance(rnn, nn.LSTM) else after
        return stacked.movedim(0, 1).reshape(*lead, -1)

    def all_features(self, values: Tensor) -> Tensor:
        """Return h_1, ..., h_T given the whole sequence of draws (..., N, T, d), shape (..., N, T, H)."""
        before = torch.cat([torch.zeros_like(self.x[:, :1]), self.x[:, :-1]], 1)
        if self.rnn is None:
            return before
        inputs = torch.cat([self.x.expand(*values.shape[:-1], -1), values], -1)
        lead = inputs.shape[:-2]
        output, _ = run_rnn(self.rnn, inputs.reshape(-1, *inputs.shape[-2:]))
        output = output.reshape(*lead, *output.shape[-2:])
        return torch.cat([torch.zeros_like(output[..., :1, :]), output[..., :-1, :]], -2)


def run_rnn(rnn: nn.RNNBase, inputs: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
    """Run a network over (B, T, D), whichever of the two the layout of the network is."""
    if rnn.batch_first:
        return rnn(inputs, hidden)
    output, after = rnn(inputs.transpose(0, 1), hidden)
    return output.transpose(0, 1), after


def check_rnn(what: str, rnn: Any) -> None:
    """Refuse a network that does not run forwards over sequences.

    Raises:
        TypeError, ValueError: saying what to pass.
    """
    if not isinstance(rnn, nn.RNNBase):
        raise TypeError(f"{what} is an nn.RNN, nn.GRU or nn.LSTM over steps, got {type(rnn).__name__}")
    if rnn.bidirectional or rnn.proj_size:
        raise ValueError(f"{what} must have bidirectional=False and proj_size=0: Smoother runs it backwards by itself")


def flatten(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return observations (N, T, *event) as vectors (N, T, D) of floats."""
    return x.reshape(*x.shape[:2], -1).to(dtype)
