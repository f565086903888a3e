"""A row of a table as one event: independent columns, each block of them from a family of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Columns"]


class Columns(TorchDistribution):
    r"""Independent columns of different families, side by side along the last batch dim.

    .. math:: \log p(x) = \sum_j \log p_j(x_j),\qquad \mathrm{log\_prob}(x) = (\log p_1(x_1), \dots, \log p_D(x_D))

    As with ``Normal``, each column is an entry of the batch: ``Columns(parts).to_event(1)`` is the distribution of a
    row, and ``Columns(parts).mask(m).to_event(1)`` that of its observed entries.  Values are floating-point numbers;
    categories are 0., 1., ...

    Args:
        parts: distributions with an event shape of (), and batch shapes (..., w) whose leading dims broadcast; the sum
            of the widths w is D.
        order: position, among the entries of the parts laid side by side, of each entry of x; by default theirs.

    Raises:
        ValueError: for no parts, a part with an event of its own or without a last dim, or an ``order`` that is no
            permutation.

    Example:
        >>> import pyro.distributions as dist
        >>> row = Columns([dist.Normal(torch.zeros(2), 1.0), dist.Categorical(logits=torch.zeros(1, 4))])
        >>> row.log_prob(torch.tensor([[0.0, 1.0, 3.0]]))
        tensor([[-0.9189, -1.4189, -1.3863]])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, parts: Sequence[TorchDistribution], order: Sequence[int] | None = None, *, validate_args: Any = None
    ) -> None:
        if not parts:
            raise ValueError("Columns needs at least one distribution.")
        for part in parts:
            if part.event_shape or not part.batch_shape:
                raise ValueError(
                    f"each part of Columns has an event shape of () and its columns as the last batch dim, got "
                    f"{type(part).__name__} of batch shape {tuple(part.batch_shape)} and event shape "
                    f"{tuple(part.event_shape)}."
                )
        lead = torch.broadcast_shapes(*(part.batch_shape[:-1] for part in parts))
        self.parts = [part.expand(lead + part.batch_shape[-1:]) for part in parts]
        self.widths = [part.batch_shape[-1] for part in parts]
        width = sum(self.widths)
        self.order = None if order is None or list(order) == list(range(width)) else list(order)
        if self.order is not None and sorted(self.order) != list(range(width)):
            raise ValueError(f"order must be a permutation of 0, ..., {width - 1}, got {self.order}.")
        super().__init__((*lead, width), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Supports of the entries side by side, in the order of x."""
        if self.order is None:
            return constraints.cat([part.support for part in self.parts], -1, self.widths)
        return _Reordered(constraints.cat([part.support for part in self.parts], -1, self.widths), self.order)

    @property
    def has_rsample(self) -> bool:
        return all(part.has_rsample for part in self.parts)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Columns:
        batch_shape = torch.Size(batch_shape)
        if batch_shape[-1:] != self.batch_shape[-1:]:
            raise ValueError(
                f"the last batch dim holds the {sum(self.widths)} columns, so it can't be expanded to shape "
                f"{tuple(batch_shape)}."
            )
        new = self._get_checked_instance(Columns, _instance)
        new.parts = [part.expand(batch_shape[:-1] + part.batch_shape[-1:]) for part in self.parts]
        new.widths, new.order = self.widths, self.order
        TorchDistribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log-density or log-probability of each entry, nats (..., D)."""
        if self._validate_args:
            self._validate_sample(value)
        pieces = zip(self.parts, self.split(value))
        return self.joined([part.log_prob(piece) for part, piece in pieces])

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw rows, differentiable in the parameters; shape: ``sample_shape`` + (..., D)."""
        return self._values([part.rsample(sample_shape) for part in self.parts])

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw rows; shape: ``sample_shape`` + (..., D)."""
        with torch.no_grad():
            return self._values([part.sample(sample_shape) for part in self.parts])

    @property
    def mean(self) -> Tensor:
        """Means of the entries (..., D); NaN where the values are categories."""
        return self._values([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        """Variances of the entries (..., D); NaN where the values are categories."""
        return self._values([part.variance for part in self.parts])

    def split(self, value: Tensor) -> list[Tensor]:
        """Split the entries of (..., D) by part, (..., w) each."""
        if self.order is not None:
            value = value[..., _inverse(self.order)]
        return list(value.split(self.widths, -1))

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """Join entries by part to (..., D), in the order of x."""
        lead = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
        joined = torch.cat([piece.expand(lead + piece.shape[-1:]) for piece in pieces], -1)
        return joined if self.order is None else joined[..., self.order]

    def _values(self, pieces: Sequence[Tensor]) -> Tensor:
        dtype = next((piece.dtype for piece in pieces if piece.is_floating_point()), None)
        if dtype is None:
            dtype = _parameter_dtype(self.parts[0])
        return self.joined([piece.to(dtype) for piece in pieces])


class _Reordered(constraints.Constraint):
    """Support of the parts side by side, for values in another order."""

    event_dim = 0

    def __init__(self, base: constraints.Constraint, order: Sequence[int]) -> None:
        self.base, self.order = base, list(order)
        self.is_discrete = bool(base.is_discrete)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each entry lies in the support of its column."""
        return self.base.check(value[..., _inverse(self.order)])[..., self.order]


def _inverse(order: Sequence[int]) -> list[int]:
    inverse = [0] * len(order)
    for position, origin in enumerate(order):
        inverse[origin] = position
    return inverse


def _parameter_dtype(part: Any) -> torch.dtype:
    """Return dtype of the parameters of a distribution whose values are integers."""
    while part is not None:
        for value in vars(part).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.dtype
        part = getattr(part, "base_dist", None)
    return torch.get_default_dtype()
