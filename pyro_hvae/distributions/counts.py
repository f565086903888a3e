r"""Poisson and negative binomial, with log-probabilities that are accurate for parameters in float32.

torch adds and subtracts logarithms of gamma functions of the order of n log n, whose sum is of the order of log n. In
float32 a Poisson of rate 1e6 is wrong by a nat, and a negative binomial of r = 1e8 by a hundred. Here the sum is taken
in float64 and returned in the dtype of the parameters. Parameters in float64 get torch's own accuracy, about 1e-7 nats
at 1e8; devices without float64 get torch's own result.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["NegativeBinomial", "Poisson"]


class Poisson(dist.Poisson):
    r"""Poisson distribution, with a log-probability that is accurate in float32 at every rate.

    Args:
        rate: :math:`\lambda \ge 0`, any shape, in counts.
        is_sparse: as in Pyro, for values that are mostly zero.

    Raises:
        ValueError: from ``log_prob``, with validation on, for values that are no counts.

    Example:
        >>> Poisson(torch.tensor(1e6, dtype=torch.float32)).log_prob(torch.tensor(1_000_500.0))
        tensor(-7.9519)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return logarithm of the probability of each count, in nats; shape: ``value`` broadcast with the batch."""
        if self._validate_args:
            self._validate_sample(value)

        def log_prob(rate: Tensor, value: Tensor) -> Tensor:
            return dist.Poisson(rate, is_sparse=self.is_sparse, validate_args=False).log_prob(value)

        return _in_float64(log_prob, self.rate, value)


class NegativeBinomial(dist.NegativeBinomial):
    r"""Negative binomial distribution, with a log-probability that is accurate in float32 at every r.

    Args:
        total_count: r >= 0, any shape; the Poisson distribution is the limit of large r at a fixed mean.
        probs: success probabilities in [0, 1); or else
        logits: l, their log-odds. The mean is r exp(l).

    Raises:
        ValueError: from ``log_prob``, with validation on, for values that are no counts.

    Example:
        >>> r = torch.tensor(1e8, dtype=torch.float32)
        >>> NegativeBinomial(r, logits=(10 / r).log()).log_prob(torch.tensor(7.0))
        tensor(-2.4071)
        >>> Poisson(torch.tensor(10.0)).log_prob(torch.tensor(7.0))
        tensor(-2.4071)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return logarithm of the probability of each count, in nats; shape: ``value`` broadcast with the batch."""
        if self._validate_args:
            self._validate_sample(value)
        name = "logits" if "logits" in self.__dict__ else "probs"

        def log_prob(total_count: Tensor, parameter: Tensor, value: Tensor) -> Tensor:
            return dist.NegativeBinomial(total_count, **{name: parameter}, validate_args=False).log_prob(value)

        return _in_float64(log_prob, self.total_count, getattr(self, name), value)


def _in_float64(log_prob: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Call ``log_prob`` on the arguments in float64, where the device has it; return the first argument's dtype."""
    dtype, device = arguments[0].dtype, arguments[0].device
    if device.type != "mps":
        arguments = tuple(argument.to(torch.float64) for argument in arguments)
    return log_prob(*arguments).to(dtype)
