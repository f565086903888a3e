"""Base of the generative chains of diffusions: one denoiser behind every kernel, whatever the noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae.chains import TopDown

__all__ = ["ReverseChain", "takes_context"]


class ReverseChain(TopDown):
    """Base: p(z_T) prod p(z_{t-1}|z_t) p(x|z_1), whose kernels are created lazily, one at a time, from one denoiser.

    Subclasses define ``noise``, :meth:`prior`, :meth:`transition`, :meth:`time` and may define ``matching``.

    Args:
        denoiser: module with ``forward(z, gamma)``, or ``forward(z, gamma, context)``; gamma is the noise level.
        event_shape: of one datum.
        num_layers: T; None for continuous time.
        likelihood: kernel for p(x | z_1).
        name, plate: as in the chains.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        event_shape: tuple[int, ...],
        num_layers: int | None,
        likelihood: nn.Module,
        name: str,
        plate: str,
    ) -> None:
        super().__init__(name=name, plate=plate, x=likelihood)
        self.denoiser = denoiser
        self.event_shape = tuple(event_shape)
        self.num_layers = num_layers
        self._denoiser_takes_context = takes_context(denoiser)

    @property
    def noise(self) -> str:
        """Kind of noise, which model and guide must share."""
        raise NotImplementedError

    @property
    def event_dim(self) -> int:
        return len(self.event_shape)

    @property
    def latents(self) -> tuple[str, ...]:
        return tuple(f"z{i}" for i in range(self.num_layers or 0, 0, -1))

    @property
    def observation(self) -> str:
        return "x"

    @property
    def kernels(self) -> Mapping[str, nn.Module]:
        return MappingProxyType({"x": self._modules["x"]})

    def call_denoiser(self, z: Tensor, gamma: Tensor, context: Any = None) -> Tensor:
        """Return the denoiser's output for z (..., *event_shape) at noise levels gamma (...) or one for all."""
        levels = gamma.expand(self.level_shape(z))
        if context is None or not self._denoiser_takes_context:
            return self.denoiser(z, levels)
        return self.denoiser(z, levels, context)

    def level_shape(self, z: Tensor) -> torch.Size:
        """Return the shape of the noise levels of z (..., *event_shape) with which the denoiser is called: (...)."""
        return z.shape[: z.dim() - self.event_dim]

    def prior(self, like: Tensor) -> TorchDistribution:
        """Return p(z_T)."""
        raise NotImplementedError

    def transition(self, s: Tensor, t: Tensor, z_t: Tensor, context: Any = None) -> TorchDistribution:
        """Return p(z_s | z_t) for times s < t."""
        raise NotImplementedError

    def likelihood(self, z_1: Tensor, context: Any = None) -> TorchDistribution:
        """Return p(x | z_1)."""
        return self.distribution("x", self.x, z_1, context)

    def time(self, index: Any) -> Any:
        """Return the times of layers ``index``, each in 1, ..., T."""
        raise NotImplementedError

    def layer_kernel(self) -> Callable[[int, Tensor, Any], TorchDistribution]:
        """Return a function of (i, z_{i+1}, context) that gives p(z_i | z_{i+1}), for one run of the program."""
        assert self.num_layers is not None
        count, dtype = self.num_layers + 1, self.reference().dtype
        times: Tensor | None = None

        def kernel(i: int, parent: Tensor, context: Any) -> TorchDistribution:
            nonlocal times
            if times is None:
                times = self.time(torch.arange(count, dtype=dtype, device=parent.device))
            return self.transition(times[i], times[i + 1], parent, context)

        return kernel

    def steps(self) -> Iterator[Any]:
        if self.num_layers is None:
            raise ValueError(
                "a diffusion in continuous time has infinitely many sites and can't be run as a program: train it with "
                "DiffusionELBO, sample with probability_flow, dpm_solver or ancestral, or give num_layers"
            )

        def prior(parent: Tensor | None, context: Any = None) -> TorchDistribution:
            return self.prior(self.reference())

        kernel = self.layer_kernel()
        yield f"z{self.num_layers}", prior, None
        for i in range(self.num_layers - 1, 0, -1):
            yield f"z{i}", lambda parent, context=None, i=i: kernel(i, parent, context), None
        yield "x", self.x, None

    def forward(
        self,
        *args: Any,
        visit: Callable[[Any], Any] | None = None,
        data_size: int | None = None,  # by name, so that fit sees that minibatches can be scaled
        **kwargs: Any,
    ) -> Any:
        """Run the chain as a program, as :class:`~pyro_hvae.chains.TopDown`; or ``visit`` inside of the call.

        Parameters register with Pyro only during a module's call, not in its other methods; an estimator
        that needs more of this chain than its trace passes ``visit``, a function of the chain.
        """
        return super().forward(*args, data_size=data_size, **kwargs) if visit is None else visit(self)

    def reference(self) -> Tensor:
        """Return a tensor on the chain's device and of its dtype."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                return tensor
        return torch.empty(())

    def _path(self) -> list[str]:
        if self.num_layers is None:
            return ["z(t)", "x"]
        return [f"z{self.num_layers}", "...", "z1", "x"] if self.num_layers > 2 else [*self.latents, "x"]


def takes_context(denoiser: nn.Module) -> bool:
    """Return whether ``denoiser.forward`` names a third positional argument."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = inspect.signature(denoiser.forward).parameters.values()
    return sum(argument.kind in positional for argument in arguments) >= 3
