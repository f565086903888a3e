"""Maps from the real line onto supports, without coordinates that have no effect."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

__all__ = ["PackedCholesky", "below_diagonal", "inner_support", "transform_onto"]


class PackedCholesky(Transform):
    r"""Map a vector of n(n+1)/2 numbers to a lower triangular matrix, or to the positive definite :math:`LL'`.

    The diagonal of L is the exponential of the first n numbers.

    Args:
        product: return :math:`LL'`, of which the Jacobian is :math:`2^n \prod_i L_{ii}^{n-i+1}` with that of L.

    Example:
        >>> PackedCholesky(product=True)(torch.tensor([0.0, 0.0, 2.0]))
        tensor([[1., 2.],
                [2., 5.]])
    """

    bijective = True
    domain = constraints.real_vector

    def __init__(self, product: bool = False) -> None:
        super().__init__()
        self.product = product
        self.codomain = constraints.positive_definite if product else constraints.lower_cholesky

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedCholesky) and other.product == self.product

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        size = _side(x.shape[-1])
        factor = torch.diag_embed(x[..., :size].exp()) + below_diagonal(x[..., size:], size)
        return factor @ factor.mT if self.product else factor

    def _inverse(self, y: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(y) if self.product else y
        size = y.shape[-1]
        rows, columns = torch.tril_indices(size, size, -1)
        return torch.cat([factor.diagonal(dim1=-2, dim2=-1).log(), factor[..., rows, columns]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        size = _side(x.shape[-1])
        log_diagonal = x[..., :size]
        if not self.product:
            return log_diagonal.sum(-1)
        powers = torch.arange(size, 0, -1, dtype=x.dtype, device=x.device) + 1
        return (powers * log_diagonal).sum(-1) + size * math.log(2.0)

    def forward_shape(self, shape: Any) -> torch.Size:
        size = _side(shape[-1])
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


def below_diagonal(values: Tensor, size: int) -> Tensor:
    """Return a matrix with n(n-1)/2 values below its diagonal, and zeros elsewhere."""
    rows, columns = torch.tril_indices(size, size, -1, device=values.device)
    matrix = values.new_zeros(*values.shape[:-1], size * size)
    return matrix.index_add(-1, rows * size + columns, values).reshape(*values.shape[:-1], size, size)


def _side(count: int) -> int:
    return (math.isqrt(8 * count + 1) - 1) // 2


def inner_support(fn: Any) -> Any:
    """Return the support of a distribution; that of its components where it is a mixture."""
    support = fn.support
    while type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint
    return support


def transform_onto(support: Any) -> Any:
    """Return the bijection from the real line onto a continuous support.

    Raises:
        NotImplementedError: for a support without one.
    """
    base = support
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    if base is constraints.positive_definite or type(base).__name__ == "_PositiveDefinite":
        return PackedCholesky(product=True)
    if type(base).__name__ == "_LowerCholesky":
        return PackedCholesky()
    return biject_to(support)
