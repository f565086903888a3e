r"""Priors of the top latent that are richer than a standard normal: a mixture, aggregated posteriors, a flow.

Each is a kernel that takes no parent, for the first place of a ``TopDown`` chain.  None has a closed-form divergence
from a Gaussian guide: :class:`~pyro_hvae.bounds.LayerwiseELBO` estimates the term of that layer from draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyro_hvae.kernels.base import Kernel
from pyro_hvae.kernels.continuous import positive
from pyro_hvae.nn import MLP

__all__ = ["FlowPrior", "MixturePrior", "VampPrior"]


class MixturePrior(Kernel):
    r"""Mixture of diagonal Gaussians with learned weights, means and scales.

    .. math:: p(z) = \sum_k \pi_k\, N(z;\; \mu_k, \operatorname{diag} \sigma_k^2)

    It starts with equal weights, scales of 1 and means drawn from a standard normal.

    Args:
        features: width d of z.
        num_components: K >= 1.
        min_scale: floor of the scales, in (0, 1), in units of z.

    Raises:
        ValueError: for a number below 1, or a ``min_scale`` out of range.

    Example:
        >>> MixturePrior(3, 10)(None).shape()
        torch.Size([3])
    """

    def __init__(self, features: int, num_components: int = 20, *, min_scale: float = 1e-2) -> None:
        super().__init__(None, 1)
        if features < 1 or num_components < 1:
            raise ValueError(f"features and num_components must be >= 1, got {features} and {num_components}.")
        if not 0.0 < min_scale < 1.0:
            raise ValueError(f"min_scale must lie in (0, 1), got {min_scale}.")
        self.min_scale = min_scale
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, features))
        self.raw_scale = nn.Parameter(torch.zeros(num_components, features))

    def forward(self, parent: Tensor | None = None, context: Tensor | None = None) -> TorchDistribution:
        components = dist.Normal(self.loc, positive(self.raw_scale, self.min_scale)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components)

    def extra_repr(self) -> str:
        return f"{self.loc.shape[1]}, num_components={self.loc.shape[0]}"


class VampPrior(Kernel):
    r"""Mixture of the guide's posteriors at learned pseudo-inputs.

    .. math:: p(z) = \frac1K \sum_k q(z \mid u_k)

    The optimal prior for the ELBO is the average of the posteriors of all data; this one has K of them.

    Args:
        kernel: the guide's kernel of the same latent, with Gaussian or other independent entries.  It stays a part of
            the guide: this prior calls it, and does not register its parameters.
        inputs: pseudo-inputs u (K, ...) to start from, of the shape of the kernel's parent; data, for one.

    Raises:
        TypeError: for a kernel that is not a module.
        ValueError: for inputs without a dim over components, or at the call where there is a context.

    Reference: VAE with a VampPrior (Tomczak and Welling, 2018).

    Example:
        >>> from pyro_hvae.kernels import Gaussian
        >>> _ = torch.manual_seed(0)
        >>> VampPrior(Gaussian(nn.Linear(5, 2 * 3)), torch.rand(10, 5))(None).shape()
        torch.Size([3])
    """

    def __init__(self, kernel: nn.Module, inputs: Tensor) -> None:
        super().__init__(None, 1)
        if not isinstance(kernel, nn.Module):
            raise TypeError(f"VampPrior needs the guide's kernel, a module; got {type(kernel).__name__}.")
        if inputs.dim() < 2 or not len(inputs):
            raise ValueError(f"inputs must be (K, *shape of the kernel's parent), got shape {tuple(inputs.shape)}.")
        self._held = (kernel,)  # a tuple, so that torch does not register it as a child
        self.inputs = nn.Parameter(inputs.detach().clone())

    @property
    def kernel(self) -> nn.Module:
        """The guide's kernel."""
        return self._held[0]

    def forward(self, parent: Tensor | None = None, context: Tensor | None = None) -> TorchDistribution:
        if context is not None:
            raise ValueError("VampPrior takes no context: wrap it in WithoutContext, or use MixturePrior.")
        components = self.kernel(self.inputs)
        count = components.batch_shape[-1]
        return dist.MixtureSameFamily(dist.Categorical(logits=self.inputs.new_zeros(count)), components)

    def extra_repr(self) -> str:
        return f"num_components={self.inputs.shape[0]}"


class FlowPrior(Kernel):
    r"""Standard normal, pushed through affine coupling layers.

    .. math:: z = f_L \circ \dots \circ f_1(\epsilon),\quad \epsilon \sim N(0, I),\qquad f_l: (a, b) \mapsto (a,\;
        b\, e^{s_l(a)} + t_l(a))

    with the halves exchanged from layer to layer.  Density and draws take one pass each.  It starts as N(0, I).

    Args:
        features: width d >= 2 of z.
        num_layers: L >= 1.
        hidden: widths of the hidden layers of each network.
        max_log_scale: largest absolute value of s, in nats.

    Raises:
        ValueError: for a number that is too small.

    Reference: Density estimation using Real NVP (Dinh, Sohl-Dickstein and Bengio, 2017).

    Example:
        >>> FlowPrior(4)(None).shape()
        torch.Size([4])
    """

    ones: Tensor
    masks: Tensor

    def __init__(
        self, features: int, num_layers: int = 4, hidden: Sequence[int] = (64,), *, max_log_scale: float = 2.0
    ) -> None:
        super().__init__(None, 1)
        if features < 2 or num_layers < 1 or not max_log_scale > 0:
            raise ValueError(
                f"FlowPrior needs features >= 2, num_layers >= 1 and max_log_scale > 0, got {features}, {num_layers} "
                f"and {max_log_scale}. For one latent variable use MixturePrior."
            )
        self.max_log_scale = max_log_scale
        self.register_buffer("ones", torch.ones(features), persistent=False)
        even = torch.arange(features) % 2 == 0
        self.register_buffer("masks", torch.stack([even, ~even]), persistent=False)
        self.layers = nn.ModuleList(MLP(features, 2 * features, hidden, nn.SiLU) for _ in range(num_layers))
        for layer in self.layers:
            for parameter in list(layer.parameters())[-2:]:  # of the last linear map
                nn.init.zeros_(parameter)

    def forward(self, parent: Tensor | None = None, context: Tensor | None = None) -> TorchDistribution:
        base = dist.Normal(torch.zeros_like(self.ones), self.ones).to_event(1)
        layers = [_Coupling(net, self.masks[i % 2], self.max_log_scale) for i, net in enumerate(self.layers)]
        return dist.TransformedDistribution(base, layers)

    def extra_repr(self) -> str:
        return f"{self.ones.shape[0]}, num_layers={len(self.layers)}"


class _Coupling(Transform):
    """Affine map of the entries outside of a mask, with parameters from those inside."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, net: Any, mask: Tensor, bound: float) -> None:
        super().__init__()
        self.net, self.mask, self.bound = net, mask, bound

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Coupling) and self.net is other.net

    __hash__ = None  # type: ignore[assignment]

    def _parameters(self, value: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.net(torch.where(self.mask, value, 0.0)).chunk(2, -1)
        log_scale = self.bound * torch.tanh(raw / self.bound)
        return torch.where(self.mask, 0.0, shift), torch.where(self.mask, 0.0, log_scale)

    def _call(self, x: Tensor) -> Tensor:
        shift, log_scale = self._parameters(x)
        return x * log_scale.exp() + shift

    def _inverse(self, y: Tensor) -> Tensor:
        shift, log_scale = self._parameters(y)
        return (y - shift) * (-log_scale).exp()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |det dy/dx| (...), nats."""
        return self._parameters(x)[1].sum(-1)
