"""Maps from the real line onto supports, without coordinates that have no effect."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

__all__ = ["PackedCholesky", "Skew", "TriangularAffine", "below_diagonal", "inner_support", "transform_onto"]


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


class Skew(Transform):
    r"""Bend the real line: :math:`y = \frac{\sinh(\delta(\operatorname{asinh} x + \epsilon)) - \sinh \delta\epsilon}
    {\delta\cosh\delta\epsilon}`.

    The point 0 and the slope there are kept, so that the median and the scale of what is bent stay.  The sign of
    :math:`\epsilon` is the side of the longer tail; :math:`\delta > 1` makes both tails heavier.

    Args:
        skew: :math:`\epsilon`.
        tail: :math:`\delta > 0`; 1 and a skew of 0 leave all as it is.

    Reference: Sinh-arcsinh distributions (Jones and Pewsey, 2009); their :math:`\delta` is the inverse of this.

    Example:
        >>> Skew(torch.tensor(0.0), torch.tensor(1.0))(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-1.,  0.,  2.])
        >>> Skew(torch.tensor(1.0), torch.tensor(1.0))(torch.tensor([-1.0, 0.0, 1.0])).round(decimals=2)
        tensor([-0.6800,  0.0000,  1.3200])
    """

    bijective = True
    domain = codomain = constraints.real

    def __init__(self, skew: Tensor, tail: Tensor) -> None:
        super().__init__()
        self.skew, self.tail = skew, tail

    def _call(self, x: Tensor) -> Tensor:
        start = self.tail * self.skew
        return ((self.tail * x.asinh() + start).sinh() - start.sinh()) / (self.tail * start.cosh())

    def _inverse(self, y: Tensor) -> Tensor:
        start = self.tail * self.skew
        return ((start.sinh() + self.tail * start.cosh() * y).asinh() / self.tail - self.skew).sinh()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        start = self.tail * self.skew
        bent = _log_cosh(self.tail * x.asinh() + start) - _log_cosh(start)
        return bent - 0.5 * x.square().log1p()


class TriangularAffine(Transform):
    """Map a vector x to loc + L x, with a lower triangular L of positive diagonal for each element of a batch.

    Args:
        loc: (..., n).
        factor: L, (..., n, n).

    Example:
        >>> TriangularAffine(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))(torch.ones(2))
        tensor([3., 2.])
    """

    bijective = True
    domain = codomain = constraints.real_vector

    def __init__(self, loc: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.loc, self.factor = loc, factor

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + (self.factor @ x.unsqueeze(-1)).squeeze(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, (y - self.loc).unsqueeze(-1), upper=False).squeeze(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(x.shape[:-1])


def _log_cosh(x: Tensor) -> Tensor:
    return x.abs() + torch.nn.functional.softplus(-2.0 * x.abs()) - math.log(2.0)


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
