"""A table's likelihood: one kernel a column, over what one network yields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_hvae import distributions
from pyro_hvae.kernels.base import Kernel

__all__ = ["Columns"]


class Columns(Kernel):
    r"""Independent columns given features of the parent: h = net(parent), then a kernel of h for each column.

    .. math:: p(x \mid z) = \prod_j p_j(x_j \mid h),\qquad h = \mathrm{net}(z)

    An event is a row (D,) of floating-point numbers; categories are 0., 1., ...  Since the columns are independent
    given z, entries can be masked one by one: a masked entry changes neither values nor gradients.

    Args:
        net: network from the parent (and the context) to features (..., h); ``None`` passes the parent on.
        columns: kernels by column name.  A key may be a tuple of names, for a kernel over several columns at once,
            which runs faster than one for each.
        order: names of all columns in the order of the entries of x; by default the order of ``columns``.

    Raises:
        ValueError: for no column, a name given twice, an ``order`` with other names, or at the call for a kernel whose
            event is not a vector with an entry for each of its names.
        TypeError: for a kernel that is not a module, or at the call gives no Pyro distribution.

    Example:
        >>> from pyro_hvae.kernels import Bernoulli, Categorical, Gaussian
        >>> _ = torch.manual_seed(0)
        >>> kernel = Columns(nn.Sequential(nn.Linear(2, 8), nn.Tanh()), {
        ...     ("height", "weight"): Gaussian(nn.Linear(8, 2 * 2)),
        ...     "smokes": Bernoulli(nn.Linear(8, 1)),
        ...     "region": Categorical(nn.Linear(8, 3), num_categories=3),
        ... })
        >>> kernel(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        net: nn.Module | None,
        columns: Mapping[Any, nn.Module],
        *,
        order: Sequence[str] | None = None,
    ) -> None:
        super().__init__(net, 1)
        self._blocks: list[tuple[str, tuple[str, ...]]] = []
        for key, kernel in columns.items():
            names = key if isinstance(key, tuple) else (key,)
            if not isinstance(kernel, nn.Module):
                raise TypeError(f"column {key!r} needs a kernel, got {type(kernel).__name__}.")
            child = f"column_{len(self._blocks)}"  # a column's name may be no name of an attribute
            self._blocks.append((child, names))
            setattr(self, child, kernel)
        laid = [name for _, names in self._blocks for name in names]
        if not laid or len(set(laid)) < len(laid):
            raise ValueError(f"Columns needs at least one column, and each name once; got {laid}.")
        self.names = tuple(laid if order is None else order)
        if sorted(map(str, self.names)) != sorted(map(str, laid)):
            raise ValueError(f"order must hold the names of the columns {laid}, got {list(self.names)}.")
        self._order = [laid.index(name) for name in self.names]

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        if self._modules.get("net") is not None:
            features = self.parameters_of(parent, context)
        elif parent is None or context is not None:
            raise ValueError("Columns without a network takes a parent and no context: give it a network.")
        else:
            features = parent
        parts = [_columns_of(names, getattr(self, child)(features)) for child, names in self._blocks]
        return distributions.Columns(parts, self._order).to_event(1)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.names))


def _columns_of(names: tuple[str, ...], part: Any) -> TorchDistribution:
    """Return the distribution of a kernel's columns with them as the last batch dim."""
    if not isinstance(part, TorchDistributionMixin):
        raise TypeError(f"the kernel of {names} must return a Pyro distribution, got {type(part).__name__}.")
    if part.event_shape != (len(names),):
        raise ValueError(
            f"the kernel of {names} gives events of shape {tuple(part.event_shape)}, where {len(names)} column(s) need "
            f"({len(names)},): set the width of its network, and event_dim=1."
        )
    base: Any = part
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    if base.event_shape:
        raise ValueError(
            f"the kernel of {names} gives {type(base).__name__}, which does not factorise over its columns, so single "
            "entries can't be masked: use a kernel with independent entries."
        )
    return base
