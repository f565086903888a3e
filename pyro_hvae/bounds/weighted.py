"""Bounds that are functions of log-weights alone."""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from pyro_hvae.bounds.base import Bound, Estimate
from pyro_hvae.bounds.gradients import GRADIENTS, averaged, check_holdable, leave_one_out, score
from pyro_hvae.problem import Problem, Run

__all__ = ["WeightBound", "softmax_of", "weighted_mean"]


class WeightBound(Bound):
    """A bound that is a function of the log-weights alone."""

    num_repeats: int = 1

    @abc.abstractmethod
    def reduce(self, log_weights: Tensor) -> Tensor:
        """Reduce the particles, dim 0, to the estimate."""

    def weights_of(self, run: Run) -> Tensor:
        """Return the log-weights of the bound, ``(K, *plates)``."""
        return run.log_weights

    def estimate(self, problem: Problem) -> Estimate:
        run = self.draw(problem)
        weights = self.weights_of(run)
        value = averaged(weights, self.reduce, self.num_repeats)
        return Estimate(value, self.surrogate(problem, run, weights, value), run.scale, run=run)

    def surrogate(self, problem: Problem, run: Run, weights: Tensor, value: Tensor) -> Tensor:
        """Return the tensor whose gradient estimates that of the bound."""
        if not torch.is_grad_enabled() or self.gradient == "pathwise":
            return value
        if self.gradient in ("stl", "dreg"):
            check_holdable(problem, run, self.gradient)
        if self.gradient in ("score", "vimco"):
            return score(run, weights, self.reduce, self.num_repeats, self.leave_one_out)
        return GRADIENTS[self.gradient](run, weights, self.reduce, self.num_repeats)

    def leave_one_out(self, log_weights: Tensor) -> Tensor:
        """Return the bound less its value without each draw; shape of the weights."""
        return leave_one_out(log_weights, self.reduce)


def weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    """Sum weights times values along dim 0; a weight of zero drops its value, infinite ones included."""
    return (weights * torch.where(weights > 0, values, torch.zeros_like(values))).sum(0)


def softmax_of(log_weights: Tensor) -> Tensor:
    """Return normalised weights along dim 0; equal ones where all are zero."""
    empty = (log_weights == -math.inf).all(0, keepdim=True)
    return log_weights.masked_fill(empty, 0.0).softmax(0)
