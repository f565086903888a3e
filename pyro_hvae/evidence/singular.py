"""Factorisations of matrices that fail for some chains, without an error for the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["undefined_where_singular"]

R = TypeVar("R")


def undefined_where_singular(evaluate: Callable[[], R]) -> R:
    """Return the result of an evaluation of all chains; where a program's factorisation fails, the result is NaN.

    A covariance that a program computes from its latents may lose its positive definiteness at the state of one chain.
    ``torch.linalg`` then raises for the whole batch.  The evaluation is repeated with factorisations that give NaN for
    such a matrix: moves reject a proposal of undefined density.

    Warns:
        UserWarning: where a factorisation failed.
    """
    try:
        return evaluate()
    except torch.linalg.LinAlgError:
        warnings.warn(
            "a matrix that the programs factorise is not positive definite, or singular, at the state of at least one "
            "chain; its density counts as undefined there, and moves to such states are rejected",
            UserWarning,
            stacklevel=2,
        )
        with _NaNWhereSingular():
            return evaluate()


class _NaNWhereSingular(TorchFunctionMode):
    """Replace factorisations by those that report a failure for each matrix, and put NaN there."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CHECKED:
            result, info = _CHECKED[func](*args, **kwargs)
            failed = (info != 0).reshape(info.shape + (1,) * (result.dim() - info.dim()))
            return torch.where(failed, torch.nan, result)
        return func(*args, **kwargs)


def _cholesky(value: Tensor, upper: bool = False, **options: Any) -> Any:
    return torch.linalg.cholesky_ex(value, upper=upper)


_CHECKED: dict[Any, Callable[..., Any]] = {
    torch.linalg.cholesky: _cholesky,
    torch.cholesky: _cholesky,
    Tensor.cholesky: _cholesky,
    torch.linalg.inv: torch.linalg.inv_ex,
    torch.inverse: torch.linalg.inv_ex,
    Tensor.inverse: torch.linalg.inv_ex,
    torch.linalg.solve: torch.linalg.solve_ex,
}
