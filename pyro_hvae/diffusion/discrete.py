r"""Diffusion of categories: the noising process as a guide, and the chain of categorical kernels against it.

.. math:: q(z_{1:T}|x) = q(z_1|x)\prod_{t=2}^T q(z_t|z_{t-1}),\qquad
          p(z_T)\,\prod_{t=2}^T p(z_{t-1}|z_t)\;p(x|z_1),\qquad p(z_{t-1}|z_t) = q(z_{t-1}|z_t, x\sim\pi(z_t)).

Layers 1, ..., T are at times 1/T, ..., 1, and the datum is at time 0; p(x|z_1) is the last step of the same kind.
The noise is a :class:`~pyro_hvae.diffusion.Corruption`.  Every bound applies, as to a Gaussian diffusion, and
:class:`~pyro_hvae.bounds.DiffusionELBO` at a cost that does not grow with T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae.diffusion.corruption import Corruption, log_one_hot
from pyro_hvae.diffusion.process import NoisingProcess
from pyro_hvae.diffusion.replacement import ReplacementSchedule
from pyro_hvae.diffusion.reverse import ReverseChain
from pyro_hvae.diffusion.twists import CategoricalTwist, LogLikelihood
from pyro_hvae.distributions import Categorical
from pyro_hvae.kernels import Kernel

__all__ = ["DiscreteDenoisingChain", "DiscreteDiffusion"]


class _Corrupted:
    """Noise, schedule and times of a program that has a corruption."""

    corruption: Any  # a Corruption
    num_layers: int | None

    @property
    def noise(self) -> str:
        return self.corruption.noise

    @property
    def schedule(self) -> ReplacementSchedule:
        return self.corruption.schedule

    def time(self, index: Any) -> Any:
        assert self.num_layers is not None
        return self.corruption.time(index, self.num_layers)


class DiscreteDiffusion(_Corrupted, NoisingProcess):
    """Noise on categories as a guide, without parameters.

    Args:
        corruption: the noise.
        num_layers: T; None for continuous time.
        name, plate: as in the chains.
        event_dim: dims of one datum.

    Raises:
        ValueError: for T < 1; or on a call, for continuous time.

    Example:
        >>> from pyro_hvae.diffusion import Absorbing
        >>> guide = DiscreteDiffusion(Absorbing(3), num_layers=2)
        >>> z = guide(torch.tensor([[0, 1, 2, 1]]))
        >>> tuple(z["z1"].shape), z["z2"].tolist()
        ((1, 4), [[3, 3, 3, 3]])
    """

    def __init__(
        self,
        corruption: Corruption,
        num_layers: int | None,
        *,
        name: str = "guide",
        plate: str = "data",
        event_dim: int = 1,
    ) -> None:
        super().__init__(num_layers, name=name, plate=plate, event_dim=event_dim)
        corruption.check_layers(num_layers)
        self._held = (corruption,)  # the model's; a tuple, so that torch does not register it a second time

    @property
    def corruption(self) -> Corruption:
        return self._held[0]

    def marginal(self, t: Tensor, x: Tensor) -> TorchDistribution:
        """Return q(z_t | x) at times t in [0, 1], per datum (..., N) or one for all."""
        return self.corruption.marginal(t, x, self.event_dim)

    def step(self, s: Tensor, t: Tensor, z_s: Tensor) -> TorchDistribution:
        """Return q(z_t | z_s) for s < t."""
        return self.corruption.step(s, t, z_s, self.event_dim)

    def posterior(self, s: Tensor, t: Tensor, z_t: Tensor, x: Tensor) -> TorchDistribution:
        """Return q(z_s | z_t, x) for s < t."""
        known = log_one_hot(x, self.corruption.num_categories, t.dtype)
        return self.corruption.posterior(s, t, z_t, known, self.event_dim)

    def conditionals(self, x: Tensor) -> Iterator[Callable[[Tensor], TorchDistribution]]:
        assert self.num_layers is not None
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        times = self.time(torch.arange(self.num_layers + 1, device=x.device, dtype=dtype))
        yield partial(self.marginal, times[1])
        for i in range(2, self.num_layers + 1):
            yield partial(self.step, times[i - 1], times[i])

    def __repr__(self) -> str:
        return f"DiscreteDiffusion({self.corruption!r}, num_layers={self.num_layers}, name={self.name!r})"


class _LastStep(Kernel):
    """p(x | z_1) of a chain, from the chain's own denoiser; without one, in continuous time, x = z_0."""

    def __init__(self, corruption: Corruption, event_dim: int) -> None:
        super().__init__(None, event_dim)
        self.num_categories = corruption.num_categories
        self._chain: tuple[DiscreteDenoisingChain, ...] = ()

    def forward(self, parent: Tensor | None, context: Any = None) -> TorchDistribution:
        assert parent is not None
        chain = self._chain[0]
        like = chain.reference()
        if chain.num_layers is None:
            known = log_one_hot(parent, self.num_categories, like.dtype)
            logits = torch.where((parent == self.num_categories).unsqueeze(-1), torch.zeros_like(known), known)
            return Categorical(logits=logits).to_event(self.event_dim)
        time = torch.full((), chain.time(1), dtype=like.dtype, device=parent.device)
        return chain.corruption.last(time, parent, chain.predict(parent, time, context), self.event_dim)


class DiscreteDenoisingChain(_Corrupted, ReverseChain):
    """The generative chain of a discrete diffusion, with one denoiser for all of its kernels.

    Args:
        denoiser: module with ``forward(z, gamma)``, or ``forward(z, gamma, context)``, to logits of the datum's entries
            given the *other* entries of z: z is (..., *event_shape) of integers, gamma (...), the logits are
            (..., *event_shape, C).
        event_shape: of one datum, whose entries are integers in 0, ..., C - 1 (of any dtype).
        corruption: the noise; the guide has the same.
        num_layers: T; None for continuous time.
        name, plate: as in the chains.

    Raises:
        ValueError: for T < 1, or on a call for logits of another shape.

    Example:
        >>> from pyro_hvae.diffusion import Absorbing
        >>> from pyro_hvae.nn import TokenMLP
        >>> _ = torch.manual_seed(0)
        >>> model = DiscreteDenoisingChain(TokenMLP(5, 3), event_shape=(5,), corruption=Absorbing(3), num_layers=20)
        >>> model(size=4).shape, model.latents[:2]
        (torch.Size([4, 5]), ('z20', 'z19'))
    """

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        event_shape: tuple[int, ...],
        corruption: Corruption,
        num_layers: int | None,
        name: str = "model",
        plate: str = "data",
    ) -> None:
        corruption.check_layers(num_layers, tuple(event_shape))
        last = _LastStep(corruption, len(event_shape))
        super().__init__(
            denoiser, event_shape=event_shape, num_layers=num_layers, likelihood=last, name=name, plate=plate
        )
        last._chain = (self,)
        self.corruption = corruption

    def predict(self, z: Tensor, t: Tensor, context: Any = None) -> Tensor:
        """Return log-probabilities of the datum's entries given the other entries of z, (..., *event_shape, C)."""
        return self.predict_at(z, self.schedule.gamma(t), context)

    def predict_at(self, z: Tensor, gamma: Tensor, context: Any = None) -> Tensor:
        """Return the same at noise levels gamma = log b - log a, (...) or one for all."""
        logits = self.call_denoiser(z, gamma.to(self.reference().dtype), context)
        if logits.shape[-1:] != (self.corruption.num_categories,) or logits.shape[:-1] != z.shape:
            raise ValueError(
                f"the denoiser {type(self.denoiser).__name__} must return logits of shape (..., *event_shape, C), here "
                f"{(*z.shape, self.corruption.num_categories)}; got {tuple(logits.shape)}"
            )
        return logits.log_softmax(-1)

    def transition(self, s: Tensor, t: Tensor, z_t: Tensor, context: Any = None) -> TorchDistribution:
        """Return p(z_s | z_t) for times s < t."""
        return self.corruption.posterior(s, t, z_t, self.predict(z_t, t, context), self.event_dim)

    def twisted(
        self, log_likelihood: LogLikelihood, context: Any, *, cg_iterations: int, denoiser_error: float
    ) -> CategoricalTwist:
        """Return the twists by a likelihood of x, for :func:`pyro_hvae.condition`."""
        return CategoricalTwist(self, log_likelihood, context, cg_iterations=cg_iterations)

    def prior(self, like: Tensor) -> TorchDistribution:
        """Return p(z_T)."""
        real = like if like.is_floating_point() else self.reference()
        return self.corruption.prior(self.event_shape, real)

    def matching(self, s: Tensor | None, t: Tensor, z_t: Tensor, x: Tensor, context: Any = None) -> Tensor:
        """Return KL(q(z_s|z_t,x) || p(z_s|z_t)), or for ``s=None`` its rate at t, in closed form; nats (...)."""
        lead = z_t.shape[: z_t.dim() - self.event_dim]
        logp = self.predict(z_t, t, context)
        s = None if s is None else s.expand(lead)
        by_entry = self.corruption.divergence(s, t.expand(lead), z_t, x, logp)
        return by_entry.sum(tuple(range(-self.event_dim, 0)))

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, corruption={self.corruption!r}"
