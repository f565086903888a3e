"""Gaussian kernels: the standard normal, a network's diagonal Gaussian, and the linear-Gaussian one."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae.arguments import check_choice, check_count, check_number, check_switch
from pyro_hvae.kernels.base import Kernel, halves, join

__all__ = ["Gaussian", "LinearGaussian", "StandardNormal"]


class StandardNormal(Kernel):
    """N(0, I) over an event of shape ``event_shape``, independent of the parent.

    Args:
        *event_shape: shape of the event; none for a scalar.

    Example:
        >>> StandardNormal(3)(None).event_shape
        torch.Size([3])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, *event_shape: int) -> None:
        super().__init__(None, len(event_shape))
        for size in event_shape:
            check_count("every size of the event shape", size)
        self.register_buffer("loc", torch.zeros(event_shape), persistent=False)
        self.register_buffer("scale", torch.ones(event_shape), persistent=False)

    def forward(self, parent: Tensor | None = None, context: Tensor | None = None) -> TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(self.event_dim)

    def extra_repr(self) -> str:
        return ", ".join(str(size) for size in self.loc.shape)


class Gaussian(Kernel):
    r"""Diagonal Gaussian N(mu, diag(sigma^2)) with (mu, r) = net(parent).

    ``scale="softplus"``: sigma = min_scale + softplus(r + c). ``scale="exp"``: sigma = exp(B tanh(r / B))
    with B = -log(min_scale), which is exp(r) to second order and stays within [min_scale, 1 / min_scale], so
    that deep untrained stacks don't overflow in float32. Both have sigma = 1 at r = 0.

    Args:
        net: network to (..., 2d): mu and r side by side along the first event dim.
        event_dim: dims of one event (1: vectors; 3: images, where the channels are doubled).
        scale: ``"softplus"`` or ``"exp"``.
        min_scale: floor of sigma, in (0, 1), in units of z.

    Raises:
        ValueError: for an unknown ``scale`` or a ``min_scale`` outside (0, 1).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> Gaussian(nn.Linear(5, 2 * 3))(torch.randn(4, 5)).shape()
        torch.Size([4, 3])
    """

    def __init__(self, net: nn.Module, event_dim: int = 1, *, scale: str = "softplus", min_scale: float = 1e-3) -> None:
        super().__init__(net, event_dim)
        if event_dim == 0:
            raise ValueError("Gaussian needs event_dim >= 1: mu and r are the two halves of the first event dim.")
        check_choice("scale", scale, ("softplus", "exp"))
        check_number("min_scale", min_scale, 0.0, 1.0, ends="()")
        self.scale_rule = scale
        self.min_scale = min_scale
        self._shift = math.log(math.expm1(1.0 - min_scale))
        self._bound = -math.log(min_scale)

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        loc, raw = halves(self, self.parameters_of(parent, context))
        if self.scale_rule == "softplus":
            scale = F.softplus(raw + self._shift) + self.min_scale
        else:
            scale = torch.exp(self._bound * torch.tanh(raw / self._bound))
        return dist.Normal(loc, scale).to_event(self.event_dim)

    def extra_repr(self) -> str:
        return f"event_dim={self.event_dim}, scale={self.scale_rule!r}, min_scale={self.min_scale:g}"


class LinearGaussian(Kernel):
    r"""N(W parent + b, S): the kernel with closed forms.

    With ``in_features=0`` (or no parent) the mean is b alone, so that it can be the first kernel of a chain. A
    ``context`` is joined to the parent. Weights are plain parameters named ``weight`` and ``bias``; the diagonal S =
    diag(exp(2 log_scale)), a full S = L L' with L the lower triangle of ``tril`` with its diagonal exponentiated. Any
    of them may be replaced by a ``pyro.nn.PyroSample``: ``kernel.weight = PyroSample(...)`` makes a Bayesian
    regression of it; particle dims on a sampled ``weight`` (K, 1, out, in) broadcast.

    Args:
        in_features: d_in >= 0.
        out_features: d_out >= 1.
        weight: W (d_out, d_in); default: uniform in +-1/sqrt(d_in), as ``torch.nn.Linear`` starts.
        bias: b (d_out,), ``True`` for zeros, ``False`` for none.
        covariance: full S (d_out, d_out), symmetric positive definite. Gives a ``MultivariateNormal``.
        scale: standard deviations (d_out,) or a number, when S is diagonal; default 1.
        learn: parameters (``True``) or constants (``False``, buffers).

    Raises:
        ValueError: for shapes that don't fit, both ``covariance`` and ``scale``, a scale that is not positive and
            finite, or a covariance that is not symmetric and positive definite.

    Example:
        >>> kernel = LinearGaussian(2, 1, weight=torch.tensor([[1.0, 2.0]]), scale=0.5)
        >>> kernel(torch.ones(3, 2)).mean.squeeze(-1).tolist()
        [3.0, 3.0, 3.0]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight: Tensor | None = None,
        bias: Tensor | bool = True,
        covariance: Tensor | None = None,
        scale: Tensor | float | None = None,
        learn: bool = True,
    ) -> None:
        super().__init__(None, 1)
        check_count("in_features", in_features, 0)
        check_count("out_features", out_features)
        check_switch("learn", learn)
        if covariance is not None and scale is not None:
            raise ValueError("give covariance= (full) or scale= (diagonal), not both.")
        self.in_features, self.out_features = in_features, out_features
        if weight is None:
            bound = in_features**-0.5 if in_features else 0.0
            weight = torch.empty(out_features, in_features).uniform_(-bound, bound)
        # without an input the weight is empty, and no loss would reach it
        self._hold("weight", weight, (out_features, in_features), learn and in_features > 0)
        if bias is False:
            self.bias = None
        else:
            start = weight.new_zeros(out_features) if bias is True else bias
            self._hold("bias", start, (out_features,), learn)
        self.full = covariance is not None
        if covariance is not None:
            if not isinstance(covariance, Tensor):
                raise ValueError(f"covariance must be a tensor, got {covariance!r}.")
            if covariance.shape != (out_features, out_features):
                raise ValueError(
                    f"covariance must have shape {(out_features, out_features)}, got {tuple(covariance.shape)}."
                )
            factor = _factor(covariance.detach())
            packed = factor.tril(-1) + factor.diagonal().log().diag_embed()
            self._hold("tril", packed, (out_features, out_features), learn)
        else:
            if not isinstance(scale, Tensor):
                check_number("scale", 1.0 if scale is None else scale, 0.0, ends="()")
            deviations = torch.as_tensor(1.0 if scale is None else scale, dtype=weight.dtype)
            if not bool(((deviations > 0) & torch.isfinite(deviations)).all()):
                raise ValueError(
                    f"scale holds standard deviations, which are positive and finite; got {deviations.tolist()}."
                )
            self._hold("log_scale", deviations.log().expand(out_features), (out_features,), learn)

    def _hold(self, name: str, value: Tensor, shape: tuple[int, ...], learn: bool) -> None:
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {value!r}.")
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}.")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite, got {value.tolist()}.")
        value = value.detach().clone()
        if learn:
            setattr(self, name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        if parent is None:
            parent = context
        elif context is not None:
            parent = join(parent, context)
        weight, bias = self.weight, self.bias
        loc = bias
        if self.in_features and parent is not None:
            if weight.dim() == 2:
                loc = F.linear(parent, weight)
            else:
                loc = (weight @ parent.unsqueeze(-1)).squeeze(-1)
            if bias is not None:
                loc = loc + bias
        elif loc is None:
            loc = weight.new_zeros(self.out_features)
        if self.full:
            return dist.MultivariateNormal(loc, scale_tril=self.scale_tril)
        return dist.Normal(loc, self.log_scale.exp()).to_event(1)

    @property
    def scale_tril(self) -> Tensor:
        """L with S = L L' (d_out, d_out)."""
        if not self.full:
            return self.log_scale.exp().diag_embed()
        packed = self.tril
        return packed.tril(-1) + packed.diagonal(dim1=-2, dim2=-1).exp().diag_embed()

    @property
    def covariance(self) -> Tensor:
        """S (d_out, d_out), differentiable."""
        factor = self.scale_tril
        return factor @ factor.mT

    def extra_repr(self) -> str:
        kind = "full" if self.full else "diagonal"
        return f"{self.in_features}, {self.out_features}, covariance={kind}"


def _factor(covariance: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a covariance matrix (d, d)."""
    asymmetry = (covariance - covariance.mT).abs().max()
    if not bool(asymmetry <= 1e-4 * covariance.abs().max()):  # false for NaN too
        raise ValueError(f"covariance must be symmetric and finite; got {covariance.tolist()}.")
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        eigenvalues = torch.linalg.eigvalsh(covariance).tolist()
        raise ValueError(f"covariance must be positive definite; its eigenvalues are {eigenvalues}.")
    return factor
