r"""Exact log p(x) of state-space models: the Kalman filter and the forward algorithm.

.. math:: \log p(x_{1:T}) = \sum_t \log p(x_t | x_{1:t-1})

Both go forwards once and keep p(z_t | x_{1:t}), a Gaussian or a table.  Masked entries and steps after the end of a
sequence are no observations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_hvae.chains.bound_sequences import BoundSequences
from pyro_hvae.kernels import LinearGaussian

__all__ = ["log_marginal"]


def log_marginal(data: BoundSequences) -> Tensor:
    """Return log p(x) of each sequence, nats (N,).

    Raises:
        ValueError: for a model that has no exact filter, no data, or data of another shape than the emission's.
    """
    model = data.model
    if data.x is None:
        raise ValueError(f"log p(x) of {model.name!r} needs data: pass x of shape (N, T, ...)")
    kernels = {"initial": model.initial, "transition": model.transition, "emission": model.emission}
    if data.history is not None and data.history.rnn is not None:
        raise ValueError(f"{model.name!r} has a recurrent history, which no exact filter can carry: use method='smc'")
    if all(type(kernel) is LinearGaussian for kernel in kernels.values()):
        return _kalman(data)
    if data.first.has_enumerate_support and not data.first.event_shape:
        return _forward(data)
    found = ", ".join(f"{name} {type(kernel).__name__}" for name, kernel in kernels.items())
    raise ValueError(
        f"log p(x) is exact for LinearGaussian kernels, or discrete states with event_dim 0; {model.name!r} has "
        f"{found}. Estimate it: log_evidence(..., method='smc'), or 'importance'"
    )


def _kalman(data: BoundSequences) -> Tensor:
    model, x = data.model, data.x
    assert x is not None
    width = model.initial.out_features
    noise, spread = model.transition.covariance, model.emission.covariance
    data.check_event(torch.Size((len(spread),)), x, ("N", "T"))  # a width of 1 would be broadcast
    step, read = model.transition.weight[:, :width], model.emission.weight[:, :width]
    zero = x.new_zeros(data.size, width, dtype=step.dtype)
    mean = data.at(0, None, None).mean.expand(data.size, width)
    covariance = model.initial.covariance.expand(data.size, width, width)
    total = x.new_zeros(data.size, dtype=step.dtype)
    observed = data.observed
    if observed is not None:
        observed = (observed if observed.dim() == 3 else observed.unsqueeze(-1)).expand(x.shape)
    seen = data.seen().to(step.dtype)
    for t in range(data.steps):
        if t:
            mean = mean @ step.mT + data.at(t, zero, None).mean
            covariance = step @ covariance @ step.mT + noise
        offset = model.distribution("emission", model.emission, zero, data.covariates(t, None)).mean
        gain, residual, own = read, seen[:, t] - mean @ read.mT - offset, spread
        if observed is not None:  # a masked entry becomes a standard normal one, of which the density is taken off
            at = observed[:, t]
            gain = read * at.unsqueeze(-1)
            own = torch.where(at.unsqueeze(-1) & at.unsqueeze(-2), spread, torch.eye(len(spread)).to(spread))
            residual = torch.where(at, residual, 0.0)
            total = total + 0.5 * math.log(2 * math.pi) * (~at).sum(-1)
        joint = covariance @ gain.mT
        predicted = torch.distributions.MultivariateNormal(
            torch.zeros_like(residual), covariance_matrix=gain @ joint + own, validate_args=False
        )
        total = total + predicted.log_prob(residual)
        weights = torch.cholesky_solve(joint.mT, predicted.scale_tril).mT  # (N, d, D)
        mean = mean + (weights @ residual.unsqueeze(-1)).squeeze(-1)
        rest = torch.eye(width).to(covariance) - weights @ gain
        covariance = rest @ covariance @ rest.mT + weights @ own @ weights.mT
    return total


def _forward(data: BoundSequences) -> Tensor:
    states = data.first.enumerate_support(expand=False).reshape(-1, 1)
    every = states.expand(-1, data.size)  # (J, N)
    log_p = data.first.log_prob(every)
    for t in range(data.steps):
        if t:
            moves = data.at(t, every.unsqueeze(1), None).log_prob(every)  # (from, to, N)
            log_p = (log_p.unsqueeze(1) + moves).logsumexp(0)
        log_p = log_p + data.emission_density(t)(every)
    return log_p.logsumexp(0)
