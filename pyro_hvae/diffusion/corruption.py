r"""Noise on categories: what becomes of an entry x in {0, ..., C-1} by time t.

With b(t) the probability of having been replaced, a = 1 - b, and s < t,

.. math::
    q(z_t|x) &= a_t\,\delta_x + b_t\,\nu &&\text{marginal}\\
    q(z_t|z_s) &= \tfrac{a_t}{a_s}\,\delta_{z_s} + \tfrac{b_t-b_s}{a_s}\,\nu &&\text{step}\\
    q(z_s|z_t,x) &\propto q(z_t|z_s)\,q(z_s|x) &&\text{posterior}

for each entry alone, where :math:`\nu` is a further state, the mask C (:class:`Absorbing`), or the uniform distribution
on the C categories (:class:`Uniform`).  :class:`AnyOrder` masks one entry at a time, in a random order.

The model puts a distribution :math:`\pi` in the place of x, as that of a Gaussian diffusion puts :math:`\hat x`,

.. math:: p(z_s|z_t) = q(z_s|z_t, x\sim\pi) \propto q(z_t|z_s)\,[a_s\,\pi + b_s\,\nu],\qquad \pi = \pi(x_j|z_t),

for each entry j.  So :math:`\pi` is what the *other* entries of z_t say about x_j; what z_t's own entry says is
in the formula.

References: Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021); A Continuous Time
Framework for Discrete Denoising Models (Campbell et al., 2022); Autoregressive Diffusion Models (Hoogeboom et al.,
2022) for any order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae.diffusion.replacement import PowerReplacement, ReplacementSchedule, check_replacement
from pyro_hvae.distributions import Categorical, MaskedSubset, OneRevealed

__all__ = ["Absorbing", "AnyOrder", "Corruption", "Uniform", "log_one_hot"]


def log_one_hot(z: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return log of the one-hot vectors of integers z (...), (..., count): 0 at z and -inf elsewhere."""
    states = torch.arange(count, device=z.device)
    zero = torch.zeros((), dtype=dtype, device=z.device)
    return torch.where(z.long().unsqueeze(-1) == states, zero, -math.inf)


class Corruption(nn.Module):
    """Base of the noises on categories.

    Args:
        num_categories: C.
        schedule: b(t); default ``PowerReplacement(1.0)``.

    Raises:
        ValueError: for C < 2, or a schedule that does not fit.
        TypeError: for another kind of schedule.

    Attributes:
        num_states: number of values of an entry of z: C, and the mask if there is one.

    In the methods x and z are integers (..., *event), levels t have the leading dims or none, and
    ``logp`` are log-probabilities of the datum's entries, (..., *event, C).
    """

    complete = False
    num_states: int

    def __init__(self, num_categories: int, schedule: ReplacementSchedule | None = None) -> None:
        super().__init__()
        if isinstance(num_categories, bool) or not isinstance(num_categories, int) or num_categories < 2:
            raise ValueError(f"num_categories is the size of the alphabet, an integer >= 2; got {num_categories!r}")
        self.num_categories = num_categories
        self.schedule = PowerReplacement() if schedule is None else schedule
        check_replacement(self.schedule, complete=self.complete)

    @property
    def noise(self) -> str:
        """Description, by which a model and a guide are compared."""
        return f"{type(self).__name__}({self.num_categories})"

    def time(self, index: Any, num_layers: int) -> Any:
        """Return the times of layers ``index``, each in 1, ..., T: i / T."""
        return index / num_layers

    def check_layers(self, num_layers: int | None, event_shape: tuple[int, ...] | None = None) -> None:
        """Refuse numbers of layers that the noise does not have."""
        if num_layers is not None and num_layers < 1:
            raise ValueError(f"a diffusion has at least one layer, got num_layers={num_layers}")

    def prior(self, event_shape: tuple[int, ...], like: Tensor) -> TorchDistribution:
        """Return p(z_T)."""
        raise NotImplementedError

    def marginal(self, t: Tensor, x: Tensor, event_dim: int) -> TorchDistribution:
        """Return q(z_t | x)."""
        return _categorical(self.log_marginal(self._level(t, x, event_dim), self._known(x, t)), event_dim)

    def step(self, s: Tensor, t: Tensor, z: Tensor, event_dim: int) -> TorchDistribution:
        """Return q(z_t | z_s)."""
        s, t = self._level(s, z, event_dim), self._level(t, z, event_dim)
        return _categorical(self.log_step(s, t, z), event_dim)

    def posterior(self, s: Tensor, t: Tensor, z: Tensor, logp: Tensor, event_dim: int) -> TorchDistribution:
        """Return q(z_s | z_t, x ~ exp(logp)): the guide's for a one-hot ``logp``, the model's for a predicted one."""
        s, t = self._level(s, z, event_dim), self._level(t, z, event_dim)
        return _categorical(self.log_posterior(s, t, z, logp), event_dim)

    def last(self, t: Tensor, z: Tensor, logp: Tensor, event_dim: int) -> TorchDistribution:
        """Return p(x | z_t): the posterior at time 0, over the C categories."""
        t = self._level(t, z, event_dim)
        logits = self.log_posterior(torch.zeros_like(t), t, z, logp)[..., : self.num_categories]
        return _categorical(logits, event_dim)

    def divergence(self, s: Tensor | None, t: Tensor, z: Tensor, x: Tensor, logp: Tensor) -> Tensor:
        """Return KL(q(z_s|z_t,x) || p(z_s|z_t)) by entry, nats (..., *event); for ``s=None`` its rate at t."""
        raise NotImplementedError

    def log_marginal(self, t: Tensor, logp: Tensor) -> Tensor:
        """Return log-probabilities of z_t, (..., *event, S), for x ~ exp(logp); t is (..., 1, ..., 1)."""
        raise NotImplementedError

    def log_step(self, s: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Return log-probabilities of z_t given z_s = z."""
        raise NotImplementedError

    def log_posterior(self, s: Tensor, t: Tensor, z: Tensor, logp: Tensor) -> Tensor:
        """Return log-probabilities of z_s, up to a constant, given z_t = z and x ~ exp(logp)."""
        raise NotImplementedError

    def _known(self, x: Tensor, like: Tensor) -> Tensor:
        return log_one_hot(x, self.num_categories, like.dtype)

    @staticmethod
    def _level(t: Tensor, like: Tensor, event_dim: int) -> Tensor:
        """Reshape times so that they broadcast against (..., *event, S)."""
        return t.reshape(t.shape + (1,) * (event_dim + 1)) if t.dim() else t

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_categories}, {self.schedule!r})"


class Absorbing(Corruption):
    r"""Each entry is replaced by the mask, the state C, once and for good.

    Only a masked entry tells nothing of itself, so that the layers' divergences are those of predicting it:

    .. math:: \mathrm{KL} = \frac{b_t-b_s}{b_t}\sum_{j: z_{t,j} = C} -\log\pi(x_j|z_t),\qquad
              \text{rate } \frac{b'(t)}{b(t)}\sum_{j: z_{t,j} = C} -\log\pi(x_j|z_t).

    Args:
        num_categories: C.
        schedule: b(t), with b(1) = 1.

    Raises:
        ValueError: for C < 2, or a schedule that leaves entries as they are.

    Example:
        >>> noise = Absorbing(3)
        >>> noise.marginal(torch.tensor(0.25), torch.tensor([0, 2]), 1).base_dist.probs
        tensor([[0.7500, 0.0000, 0.0000, 0.2500],
                [0.0000, 0.0000, 0.7500, 0.2500]])
    """

    complete = True

    def __init__(self, num_categories: int, schedule: ReplacementSchedule | None = None) -> None:
        super().__init__(num_categories, schedule)
        self.num_states = num_categories + 1

    def prior(self, event_shape: tuple[int, ...], like: Tensor) -> TorchDistribution:
        masked = torch.full(event_shape, self.num_categories, device=like.device)
        return _categorical(log_one_hot(masked, self.num_states, like.dtype), len(event_shape))

    def log_marginal(self, t: Tensor, logp: Tensor) -> Tensor:
        return _beside(self.schedule.kept(t).log() + logp, self.schedule(t).log())

    def log_step(self, s: Tensor, t: Tensor, z: Tensor) -> Tensor:
        kept, lost = _step(self.schedule, s, t)
        shown = log_one_hot(z, self.num_categories, t.dtype)
        stays = log_one_hot(z, self.num_states, t.dtype)
        return torch.where((z == self.num_categories).unsqueeze(-1), stays, _beside(kept.log() + shown, lost.log()))

    def log_posterior(self, s: Tensor, t: Tensor, z: Tensor, logp: Tensor) -> Tensor:
        b_s, b_t = self.schedule(s), self.schedule(t)
        revealed = _beside(((b_t - b_s) / b_t).log() + logp, (b_s / b_t).log())
        shown = log_one_hot(z, self.num_states, logp.dtype)
        return torch.where((z == self.num_categories).unsqueeze(-1), revealed, shown)

    def divergence(self, s: Tensor | None, t: Tensor, z: Tensor, x: Tensor, logp: Tensor) -> Tensor:
        event_dim = z.dim() - t.dim()
        b_t = self.schedule(t).clamp(min=torch.finfo(t.dtype).tiny)  # nothing is masked at t = 0
        weight = self.schedule.derivative(t) / b_t if s is None else (b_t - self.schedule(s)) / b_t
        weight = weight.reshape(weight.shape + (1,) * event_dim)
        surprise = -_chosen(logp, x)
        return torch.where(z == self.num_categories, weight * surprise, torch.zeros_like(surprise))


class AnyOrder(Absorbing):
    r"""One entry is masked at a time, each of those left with the same probability: as many layers as entries, D.

    The orders of the path are uniform under both programs, so that a weight is
    :math:`\prod_i \pi(x_{\sigma_i}|x_{\sigma_{i+1}},\ldots,x_{\sigma_D})` for a random order :math:`\sigma`, and the
    bound is that of absorbing noise in continuous time,

    .. math:: \log p(x) \ge -\sum_{i=1}^D \mathrm E\,\frac1i\sum_{j: z_{i,j} = C} -\log\pi(x_j|z_i).

    With importance weights over orders it becomes tighter, and their k-hat says how much the orders disagree.

    Args:
        num_categories: C.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> noise = AnyOrder(3)
        >>> z = noise.marginal(torch.tensor(0.5), torch.tensor([0, 2, 1, 1]), 1).sample()
        >>> (z == 3).sum().item()
        2
    """

    def __init__(self, num_categories: int) -> None:
        super().__init__(num_categories)

    def check_layers(self, num_layers: int | None, event_shape: tuple[int, ...] | None = None) -> None:
        entries = None if event_shape is None else math.prod(event_shape)
        if num_layers is None or (entries is not None and num_layers != entries):
            raise ValueError(
                f"AnyOrder masks one entry a layer, so num_layers is the number of entries of a datum"
                f"{'' if entries is None else f', {entries}'}; got num_layers={num_layers}"
            )

    def marginal(self, t: Tensor, x: Tensor, event_dim: int) -> TorchDistribution:
        entries = math.prod(x.shape[x.dim() - event_dim :])
        return MaskedSubset(x.long(), (t * entries).round().long(), self.num_categories, event_dim)

    def step(self, s: Tensor, t: Tensor, z: Tensor, event_dim: int) -> TorchDistribution:
        return MaskedSubset(z, 1, self.num_categories, event_dim)

    def posterior(self, s: Tensor, t: Tensor, z: Tensor, logp: Tensor, event_dim: int) -> TorchDistribution:
        return OneRevealed(z, logp, event_dim)

    def divergence(self, s: Tensor | None, t: Tensor, z: Tensor, x: Tensor, logp: Tensor) -> Tensor:
        masked = z == self.num_categories
        dims = tuple(range(t.dim() - z.dim(), 0))
        surprise = -_chosen(logp, x)
        share = masked.sum(dims, keepdim=True).clamp(min=1)
        return torch.where(masked, surprise / share, torch.zeros_like(surprise))

    def __repr__(self) -> str:
        return f"AnyOrder({self.num_categories})"


class Uniform(Corruption):
    r"""Each entry is replaced by one that is drawn uniformly from the alphabet, itself included, again and again.

    In continuous time an entry z of z_t turns back into i at the rate :math:`\beta U_i` under the guide and
    :math:`\beta V_i` under the model, :math:`\beta = b'/(Ca)`, and the rate of the divergence is

    .. math:: \beta\sum_{i\ne z} U_i\log\frac{U_i}{V_i} - U_i + V_i,\qquad
        U_i = \frac{a\,\delta_{ix}+b/C}{a\,\delta_{zx}+b/C},\quad V_i = \frac{a\,\pi_i+b/C}{a\,\pi_z+b/C}.

    Args:
        num_categories: C.
        schedule: b(t); where b(1) < 1 the bound has a term of prior matching.

    Example:
        >>> noise = Uniform(2)
        >>> noise.marginal(torch.tensor(0.5), torch.tensor([0, 1]), 1).base_dist.probs
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """

    def __init__(self, num_categories: int, schedule: ReplacementSchedule | None = None) -> None:
        super().__init__(num_categories, schedule)
        self.num_states = num_categories

    def prior(self, event_shape: tuple[int, ...], like: Tensor) -> TorchDistribution:
        zeros = torch.zeros(*event_shape, self.num_states, dtype=like.dtype, device=like.device)
        return _categorical(zeros, len(event_shape))

    def log_marginal(self, t: Tensor, logp: Tensor) -> Tensor:
        return self._mixed(self.schedule.kept(t), self.schedule(t), logp)

    def log_step(self, s: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return self._mixed(*_step(self.schedule, s, t), log_one_hot(z, self.num_states, t.dtype))

    def log_posterior(self, s: Tensor, t: Tensor, z: Tensor, logp: Tensor) -> Tensor:
        return self.log_step(s, t, z) + self.log_marginal(s, logp)  # a step is as likely in both directions

    def divergence(self, s: Tensor | None, t: Tensor, z: Tensor, x: Tensor, logp: Tensor) -> Tensor:
        event_dim = z.dim() - t.dim()
        known, t = self._known(x, logp), self._level(t, z, event_dim)
        if s is None:
            return self._rate(t, z, known, logp)
        s = self._level(s, z, event_dim)
        log_q, log_p = (self.log_posterior(s, t, z, of_x).log_softmax(-1) for of_x in (known, logp))
        return torch.where(log_q == -math.inf, 0.0, log_q.exp() * (log_q - log_p)).sum(-1)

    def _rate(self, t: Tensor, z: Tensor, known: Tensor, logp: Tensor) -> Tensor:
        at = z.long().unsqueeze(-1)
        kept, share = self.schedule.kept(t), self.schedule(t) / self.num_categories
        # logarithms of the ratios near t = 0, where shares vanish; ratios less 1 near t = 1, where ratios are near 1
        late = share * self.num_categories > 0.5
        log_u, log_v = (_log_ratio(self.log_marginal(t, of_x), at) for of_x in (known, logp))
        safe_kept, safe_share = torch.where(late, kept, 0.5), torch.where(late, share, 0.5 / self.num_categories)
        u, v = (_excess(of_x.exp(), at, safe_kept, safe_share) for of_x in (known, logp))
        early_u = log_u.exp()
        early = torch.where(early_u == 0, 0.0, early_u * (log_u - log_v)) - early_u + log_v.exp()
        terms = torch.where(late, (1 + u) * (torch.log1p(u) - torch.log1p(v)) - u + v, early)
        rate = self.schedule.derivative(t) / (self.num_categories * kept.clamp(min=torch.finfo(t.dtype).tiny))
        return (rate * terms).sum(-1)  # the term of i = z is zero

    def _mixed(self, kept: Tensor, lost: Tensor, logp: Tensor) -> Tensor:
        return torch.logaddexp(kept.log() + logp, (lost / self.num_categories).log())


def _step(schedule: ReplacementSchedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities that an entry of z_s is kept until t, and that it is replaced."""
    kept = schedule.kept(s)
    return schedule.kept(t) / kept, (schedule(t) - schedule(s)) / kept


def _beside(log_categories: Tensor, log_mask: Tensor) -> Tensor:
    """Append the mask's log-probability to those of the categories."""
    return torch.cat([log_categories, log_mask.expand(*log_categories.shape[:-1], 1)], -1)


def _chosen(logp: Tensor, x: Tensor) -> Tensor:
    """Return the log-probabilities of x, (..., *event)."""
    index = x.long().unsqueeze(-1)
    return torch.gather(logp, -1, index.expand(*logp.shape[:-1], 1)).squeeze(-1)


def _log_ratio(log_marginal: Tensor, at: Tensor) -> Tensor:
    """Return log of the ratios of probabilities of each state to that of the state ``at``."""
    return log_marginal - torch.gather(log_marginal, -1, at)


def _excess(p: Tensor, at: Tensor, kept: Tensor, share: Tensor) -> Tensor:
    """Return the same ratios less one, without cancellation where nearly nothing is kept."""
    of_z = torch.gather(p, -1, at)
    return kept * (p - of_z) / (kept * of_z + share)


def _categorical(logits: Tensor, event_dim: int) -> TorchDistribution:
    return Categorical(logits=logits).to_event(event_dim)
