r"""Ordinal noise on categories that have an order, such as grey levels: an entry walks to its neighbours.

The entry goes one level up and one level down at the same rate, and stays where a step would leave the alphabet.  With
R the generator of this walk (a birth-death process with reflecting ends) and a time :math:`\tau(t)` that increases,

.. math:: q(z_t|z_s) = \bigl[e^{(\tau_t-\tau_s)R}\bigr]_{z_s z_t},\qquad q(z_t|x) = \bigl[e^{\tau_t R}\bigr]_{x z_t},

which compose.  R has the cosines :math:`\cos(\pi k(i+\tfrac12)/C)` as eigenvectors, with the eigenvalues
:math:`-\lambda_k`, :math:`\lambda_k = 2 - 2\cos(\pi k/C)`.  The schedule gives what the slowest of them has lost,
:math:`e^{-\lambda_1\tau_t} = a_t = 1 - b_t`.  For C = 2 this is uniform noise.  Far from the ends the noise has the
variance :math:`2\tau`, and the standard deviation is near :math:`C\sqrt{2b}/\pi` levels while b is small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_hvae.diffusion.corruption import Uniform
from pyro_hvae.diffusion.replacement import PowerReplacement, ReplacementSchedule

__all__ = ["Ordinal"]

_RESOLVED = 1e-12  # what a sum of cosines in double precision still has digits of
_EARLIEST, _LATEST = -1e-35, math.log(1e-9)  # log a within which rates are computed


class Ordinal(Uniform):
    r"""Each entry walks to its neighbours at random; in the end it is uniform on the alphabet.

    The discretised Gaussian noise of D3PM has a step matrix with entries proportional to
    :math:`\exp(-4(i-j)^2/((C-1)^2\beta))` off the diagonal, and what is left on the diagonal.  It is symmetric, as that
    of the walk is, so that both end in the uniform distribution.  Products of D3PM's steps have no closed form; those
    of very many short steps, of which only the moves to neighbours are left, tend to the walk.

    In continuous time an entry z of z_t turns back into its neighbour i at the rate :math:`\beta U_i` under the guide
    and :math:`\beta V_i` under the model, :math:`\beta = b'/(\lambda_1 a)`, and the rate of the divergence is

    .. math:: \beta\sum_{i = z\pm1} U_i\log\frac{U_i}{V_i} - U_i + V_i,\qquad
        U_i = \frac{q(z_t=i|x)}{q(z_t=z|x)},\quad V_i = \frac{\sum_x\pi(x)\,q(z_t=i|x)}{\sum_x\pi(x)\,q(z_t=z|x)}.

    All of it is computed in double precision, whatever the dtype of the data; probabilities below 1e-12 by Debye's
    expansion of the Bessel functions, whose relative error is below 0.01.  A time takes a matrix of C x C.

    Args:
        num_categories: C, of which neighbours are alike.
        schedule: b(t), the loss of the slowest mode; default ``PowerReplacement(2.0)``, under which the noise's
            standard deviation grows in proportion to t.  Where b(1) < 1 the bound has a term of prior matching.

    Raises:
        ValueError: for C < 2, or a schedule that does not fit.
        TypeError: for another kind of schedule.

    References:
        Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021; D3PM), appendix A.2, for
        the discretised Gaussian; A Continuous Time Framework for Discrete Denoising Models (Campbell et al., 2022) for
        rates.

    Example:
        >>> noise = Ordinal(5)
        >>> noise.marginal(torch.tensor(0.3), torch.tensor([0, 2]), 1).base_dist.probs.round(decimals=3)
        tensor([[0.8030, 0.1740, 0.0210, 0.0020, 0.0000],
                [0.0210, 0.1550, 0.6480, 0.1550, 0.0210]])
    """

    def __init__(self, num_categories: int, schedule: ReplacementSchedule | None = None) -> None:
        super().__init__(num_categories, PowerReplacement(2.0) if schedule is None else schedule)

    def log_marginal(self, t: Tensor, logp: Tensor) -> Tensor:
        return self._walked(self._log_kept(None, t), logp.double()).to(logp.dtype)

    def log_step(self, s: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return _rows(_log_moves(self._log_kept(s, t), self.num_states), z, self.num_states).to(t.dtype)

    def divergence(self, s: Tensor | None, t: Tensor, z: Tensor, x: Tensor, logp: Tensor) -> Tensor:
        s = None if s is None else s.double()
        return super().divergence(s, t.double(), z, x, logp.double()).to(logp.dtype)

    def _rate(self, t: Tensor, z: Tensor, known: Tensor, logp: Tensor) -> Tensor:
        log_kept = self._log_kept(None, t).clamp(_LATEST, _EARLIEST)
        log_q, log_p = self._walked(log_kept, known), self._walked(log_kept, logp)
        at, total = z.long().unsqueeze(-1), torch.zeros_like(log_p[..., 0])
        for beside in (at - 1, at + 1):
            index = beside.clamp(0, self.num_states - 1)  # at an end the entry itself, whose term is zero
            log_u, log_v = (torch.gather(log, -1, index) - torch.gather(log, -1, at) for log in (log_q, log_p))
            ratio = log_u - log_v  # u log(u/v) - u + v, without cancellation where u and v are near
            more, less = ratio.clamp(min=0.0), ratio.clamp(max=0.0)
            term = log_u.exp() * (more + torch.expm1(-more)) + log_v.exp() * (less * less.exp() - torch.expm1(less))
            total = total + term.squeeze(-1)
        speed = self.schedule.derivative(t) / (_slowest(self.num_states) * log_kept.exp())
        return (speed.squeeze(-1) if speed.dim() else speed) * total

    def _log_kept(self, s: Tensor | None, t: Tensor) -> Tensor:
        """Return log a(t) - log a(s), or log a(t); double precision."""
        t = t.double()
        if s is None:
            kept, lost = self.schedule.kept(t), self.schedule(t)
        else:
            before = self.schedule.kept(s.double())
            kept, lost = self.schedule.kept(t) / before, (self.schedule(t) - self.schedule(s.double())) / before
        return torch.where(lost < 0.5, torch.log1p(-lost), kept.log())

    def _walked(self, log_kept: Tensor, logp: Tensor) -> Tensor:
        """Return log-probabilities of the states after the walk, (..., *event, C), from those before."""
        count = self.num_states
        moves = _log_moves(log_kept, count)
        levels = torch.arange(count, device=logp.device)
        near, far = _distances(levels.unsqueeze(-1), levels, count)
        by_datum = moves.dim() == 1 or moves.shape[-2] == 1  # one matrix for all entries of a datum
        single = (moves.squeeze(-2) if by_datum and moves.dim() > 1 else moves).exp()
        matrix, before = single[..., near] + single[..., far], logp.exp()
        after = before @ matrix if by_datum else (before.unsqueeze(-2) @ matrix).squeeze(-2)
        held = after > torch.finfo(after.dtype).tiny
        # where sums underflow: at least the term of staying, and that of the most probable state
        top, first = logp.max(-1, keepdim=True)
        staying = logp + torch.logaddexp(moves[..., near.diagonal()], moves[..., far.diagonal()])
        least = torch.maximum(staying, top + _rows(moves, first.squeeze(-1), count))
        return torch.where(held, torch.where(held, after, 1.0).log(), least)


def _slowest(count: int) -> float:
    """Return the rate of the slowest mode of the walk on C levels."""
    return 4.0 * math.sin(math.pi / (2 * count)) ** 2


def _log_moves(log_kept: Tensor, count: int) -> Tensor:
    """Return log-probabilities of moves by d = 0, ..., C on a circle of 2C places, (..., C + 1).

    A walk with reflecting ends is one on the circle, of which the places i and 2C - 1 - i are the level i.

    Args:
        log_kept: log of what the slowest mode keeps, (..., 1) or ().
        count: C.
    """
    log_kept = log_kept.clamp(min=-1e4)  # exp(0 * -inf) is no number
    place = torch.arange(count + 1, device=log_kept.device)
    moves = place.double()
    rates = torch.sin(0.5 * math.pi * moves / count) ** 2
    weights = torch.where((place == 0) | (place == count), 0.5, 1.0) / count
    waves = torch.cos(math.pi * (place.unsqueeze(-1) * place % (2 * count)).double() / count)
    sums = (torch.exp(rates / rates[1] * log_kept) * weights) @ waves
    variance = -2.0 * log_kept / _slowest(count)
    tail = torch.logaddexp(_log_bessel(moves, variance), _log_bessel(2 * count - moves, variance))
    return torch.where(sums > _RESOLVED, sums.log(), tail)


def _log_bessel(moves: Tensor, variance: Tensor) -> Tensor:
    """Return log of exp(-v) I_d(v), the probability of a move by d on a line, by two terms of Debye's expansion."""
    length = (moves**2 + variance**2).sqrt()
    correction = torch.log1p((3 - 5 * (moves / length) ** 2) / (24 * length))
    main = moves**2 / (length + variance) + moves * (variance / (moves + length)).log()
    return main - 0.5 * (2 * math.pi * length).log() + correction


def _distances(first: Tensor, second: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return how far apart two levels are on the circle of 2C places, and a level and the other's reflection."""
    over = first + second + 1
    return (first - second).abs(), torch.minimum(over, 2 * count - over)


def _rows(moves: Tensor, z: Tensor, count: int) -> Tensor:
    """Return log-probabilities of all levels after a walk from z (..., *event), (..., *event, C)."""
    near, far = _distances(z.long().unsqueeze(-1), torch.arange(count, device=z.device), count)
    if moves.dim() == 1:
        return torch.logaddexp(moves[near], moves[far])
    lead = torch.broadcast_shapes(moves.shape[:-1], z.shape)
    moves, near, far = (part.expand(*lead, part.shape[-1]) for part in (moves, near, far))
    return torch.logaddexp(torch.gather(moves, -1, near), torch.gather(moves, -1, far))
