r"""Kernels: what a chain is made of, maps from a parent value to a distribution.

A kernel is p(z | parent, context): any ``torch.nn.Module`` whose ``forward(parent, context=None)`` returns a Pyro
distribution over one datum's event, with every leading dim of ``parent`` (particles, data) as a batch dim. The
kernels here wrap a network ``net`` that turns the parent into the parameters of a family:

.. math::
    \mathrm{Gaussian:}\quad z \sim N(\mu, \operatorname{diag} \sigma^2),\qquad (\mu, r) = \mathrm{net}(parent),
    \qquad \sigma = s_{min} + \operatorname{softplus}(r + c),\quad c: \sigma(0) = 1

    \mathrm{LinearGaussian:}\quad z \sim N(W\,parent + b,\; S)

**What the network is given.** Of ``parent`` and ``context``, those that are not ``None`` (the first kernel of a
``TopDown`` has no parent): one of them is passed as ``net(value)``; two are passed as ``net(parent, context)`` where
the ``forward`` of ``net`` names two positional arguments, else joined on the last dim, ``net(cat([parent,
context], -1))``. A kernel that must not see the context is wrapped in :class:`WithoutContext`.

**Events.** ``event_dim`` dims on the right belong to one datum. A network that yields two parameters a variable
(``Gaussian``, ``NegativeBinomial``, ``DiscretizedLogistic``) yields them side by side along the *first event dim*:
for vectors the last dim, 2d wide; for images with ``event_dim=3`` the channels.

Networks must accept any number of leading dims. Nothing here checks that the values are finite: that costs a
synchronisation a call, and is done once by whoever reads the traces.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

__all__ = [
    "Bernoulli",
    "Categorical",
    "Flow",
    "Gaussian",
    "Kernel",
    "LinearGaussian",
    "NegativeBinomial",
    "Poisson",
    "StandardNormal",
    "Transition",
    "WithoutContext",
]


class Kernel(PyroModule):
    """Base of the kernels here: holds a network and calls it by the rule of this module.

    A kernel need not inherit from this: any module with the same ``forward`` will do.

    Args:
        net: network from the parent to the parameters, or ``None``. A ``PyroModule`` with ``PyroSample`` weights makes
            a Bayesian kernel.
        event_dim: number of dims of one datum's event, >= 0.

    Attributes:
        infer: what the chain passes to ``pyro.sample(..., infer=)`` for this kernel, or ``None``.
    """

    infer: dict[str, Any] | None = None

    def __init__(self, net: nn.Module | None = None, event_dim: int = 1) -> None:
        super().__init__()
        if event_dim < 0:
            raise ValueError(f"event_dim must be >= 0, got {event_dim}.")
        if net is not None and not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}.")
        self.event_dim = event_dim
        self._net_takes_context = net is not None and takes_context(net)
        if net is not None:
            self.net = net

    def parameters_of(self, parent: Tensor | None, context: Tensor | None) -> Tensor:
        """Call the network on the parent and the context, each if there."""
        net = self.net
        if context is None:
            if parent is None:
                raise ValueError(
                    f"{type(self).__name__} was given neither a parent nor a context, so its network has no input. "
                    "Begin the chain with StandardNormal(...), or pass context=."
                )
            return net(parent)
        if parent is None:
            return net(context)
        if self._net_takes_context:
            return net(parent, context)
        return net(join(parent, context))

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        """The distribution of this site given its parent (..., d) and context (..., c)."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward(parent, context=None).")


def takes_context(net: nn.Module) -> bool:
    """Whether ``net.forward`` names a second positional argument."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        arguments = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(argument.kind in positional for argument in arguments) >= 2


def join(parent: Tensor, context: Tensor) -> Tensor:
    """Parent (..., d) and context (..., c) side by side (..., d + c), leading dims broadcast."""
    if parent.shape[:-1] != context.shape[:-1]:
        lead = torch.broadcast_shapes(parent.shape[:-1], context.shape[:-1])
        parent = parent.expand(lead + parent.shape[-1:])
        context = context.expand(lead + context.shape[-1:])
    return torch.cat([parent, context], -1)


class StandardNormal(Kernel):
    """N(0, I) over an event of a given shape, whatever the parent.

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
        if any(size < 1 for size in event_shape):
            raise ValueError(f"every size of the event shape must be >= 1, got {event_shape}.")
        self.register_buffer("loc", torch.zeros(event_shape), persistent=False)
        self.register_buffer("scale", torch.ones(event_shape), persistent=False)

    def forward(self, parent: Tensor | None = None, context: Tensor | None = None) -> TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(self.event_dim)

    def extra_repr(self) -> str:
        return ", ".join(str(size) for size in self.loc.shape)


class Gaussian(Kernel):
    r"""Diagonal Gaussian N(mu, diag(sigma^2)) with (mu, r) = net(parent).

    ``scale="softplus"``: sigma = min_scale + softplus(r + c). ``scale="exp"``: sigma = exp(B tanh(r / B)) with
    B = -log(min_scale), which is exp(r) to second order and stays within [min_scale, 1 / min_scale], so that deep
    untrained stacks don't overflow in float32. Both have sigma = 1 at r = 0.

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

    def __init__(
        self, net: nn.Module, event_dim: int = 1, *, scale: str = "softplus", min_scale: float = 1e-3
    ) -> None:
        super().__init__(net, event_dim)
        if event_dim < 1:
            raise ValueError("Gaussian needs event_dim >= 1: mu and r stand side by side along the first event dim.")
        if scale not in ("softplus", "exp"):
            raise ValueError(f"scale must be 'softplus' or 'exp', got {scale!r}.")
        if not 0.0 < min_scale < 1.0:
            raise ValueError(f"min_scale must lie in (0, 1), got {min_scale}.")
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


def halves(kernel: Kernel, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Split a network's output in two along the first event dim."""
    if parameters.dim() < kernel.event_dim or parameters.shape[-kernel.event_dim] % 2:
        raise ValueError(
            f"{type(kernel).__name__} needs a network that yields two parameters a variable, so an even size along dim "
            f"{-kernel.event_dim}; it yielded shape {tuple(parameters.shape)}. Make the network's output 2 * d wide."
        )
    first, second = parameters.chunk(2, -kernel.event_dim)
    return first, second


class LinearGaussian(Kernel):
    r"""N(W parent + b, S): the kernel with closed forms.

    With ``in_features=0`` (or no parent) the mean is b alone, so that it can begin a chain. A ``context`` is joined to
    the parent. Weights are plain parameters named ``weight`` and ``bias``; the diagonal S = diag(exp(2 log_scale)),
    a full S = L L' with L the lower triangle of ``tril`` with its diagonal exponentiated. Any of them may be replaced by a
    ``pyro.nn.PyroSample``: ``kernel.weight = PyroSample(...)`` makes a Bayesian regression of it; particle dims on a
    sampled ``weight`` (K, 1, out, in) broadcast.

    Args:
        in_features: d_in >= 0.
        out_features: d_out >= 1.
        weight: W (d_out, d_in); default: uniform in +-1/sqrt(d_in), as ``torch.nn.Linear`` starts.
        bias: b (d_out,), ``True`` for zeros, ``False`` for none.
        covariance: full S (d_out, d_out), symmetric positive definite. Gives a ``MultivariateNormal``.
        scale: standard deviations (d_out,) or a number, when S is diagonal; default 1.
        learn: parameters (``True``) or constants (``False``, buffers).

    Raises:
        ValueError: for shapes that don't fit, or both ``covariance`` and ``scale``.

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
        if in_features < 0 or out_features < 1:
            raise ValueError(f"need in_features >= 0 and out_features >= 1, got {in_features} and {out_features}.")
        if covariance is not None and scale is not None:
            raise ValueError("give covariance= (full) or scale= (diagonal), not both.")
        self.in_features, self.out_features = in_features, out_features
        if weight is None:
            bound = in_features**-0.5 if in_features else 0.0
            weight = torch.empty(out_features, in_features).uniform_(-bound, bound)
        self._hold("weight", weight, (out_features, in_features), learn)
        if bias is False:
            self.bias = None
        else:
            start = weight.new_zeros(out_features) if bias is True else bias
            self._hold("bias", start, (out_features,), learn)
        self.full = covariance is not None
        if covariance is not None:
            if covariance.shape != (out_features, out_features):
                raise ValueError(
                    f"covariance must have shape {(out_features, out_features)}, got {tuple(covariance.shape)}."
                )
            factor = torch.linalg.cholesky(covariance.detach())
            packed = factor.tril(-1) + factor.diagonal().log().diag_embed()
            self._hold("tril", packed, (out_features, out_features), learn)
        else:
            deviations = torch.as_tensor(1.0 if scale is None else scale, dtype=weight.dtype)
            if bool((deviations <= 0).any()):
                raise ValueError(f"scale holds standard deviations, which are positive; got {deviations.tolist()}.")
            self._hold("log_scale", deviations.log().expand(out_features), (out_features,), learn)

    def _hold(self, name: str, value: Tensor, shape: tuple[int, ...], learn: bool) -> None:
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}.")
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


class Bernoulli(Kernel):
    """Independent Bernoulli variables with logits net(parent); values 0. and 1.

    Args:
        net: network to the logits (..., *event_shape).
        event_dim: dims of one event.

    Example:
        >>> Bernoulli(nn.Linear(2, 4))(torch.zeros(3, 2)).event_shape
        torch.Size([4])
    """

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        return dist.Bernoulli(logits=self.parameters_of(parent, context)).to_event(self.event_dim)


class Categorical(Kernel):
    """Independent categorical variables with logits from a network.

    Args:
        net: network to logits (..., *event_shape, C).
        event_dim: dims of one event, not counting the categories: 0 is one variable a datum, with integer values.
        num_categories: C. If given, the network yields (..., d * C), read as (..., d, C) (or (..., C) when
            ``event_dim=0``).
        one_hot: values are one-hot vectors (..., *event_shape, C) of floats, which a next kernel's network can take,
            instead of integers (..., *event_shape).
        enumerate: mark the site for parallel enumeration (exact sums over a discrete latent). One variable a
            datum only (``event_dim=0``): Pyro does not enumerate products.

    Example:
        >>> Categorical(nn.Linear(2, 3 * 5), num_categories=5)(torch.zeros(4, 2)).shape()
        torch.Size([4, 3])
    """

    def __init__(
        self,
        net: nn.Module,
        event_dim: int = 1,
        *,
        num_categories: int | None = None,
        one_hot: bool = False,
        enumerate: bool = False,
    ) -> None:
        super().__init__(net, event_dim)
        if num_categories is not None and num_categories < 1:
            raise ValueError(f"num_categories must be >= 1, got {num_categories}.")
        if enumerate and event_dim:
            raise ValueError(
                f"enumerate=True sums over one variable a datum, but event_dim={event_dim} makes a product of them. "
                "Use event_dim=0, or one site a variable."
            )
        self.num_categories = num_categories
        self.one_hot = one_hot
        if enumerate:
            self.infer = {"enumerate": "parallel"}

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        logits = self.parameters_of(parent, context)
        if self.num_categories is not None and self.event_dim:
            logits = logits.unflatten(-1, (-1, self.num_categories))
        family = dist.OneHotCategorical if self.one_hot else dist.Categorical
        return family(logits=logits).to_event(self.event_dim)


class Transition(Kernel):
    """Discrete Markov kernel p(z = j | parent = i) = softmax(logits[i])_j, from a learnable table.

    One integer-valued variable a datum (event_dim 0). With ``num_parents=None`` it is an initial distribution: one row.

    Args:
        num_states: number of states J of this site.
        num_parents: number of states I of the parent, or ``None``.
        probs: starting table (I, J) or (J,), positive rows that sum to one; default uniform, up to noise of
            sd 0.1 in the logits.
        enumerate: mark the site for parallel enumeration: the sum over its states is then exact, as in the forward
            algorithm. Leave it off for the observation.
        learn: whether the table is a parameter or a constant.

    Example:
        >>> import pyro_hvae as ph
        >>> chain = ph.TopDown(z=Transition(3), x=Transition(2, 3))
        >>> chain(size=4).shape
        torch.Size([4])
    """

    def __init__(
        self,
        num_states: int,
        num_parents: int | None = None,
        *,
        probs: Tensor | None = None,
        enumerate: bool = False,
        learn: bool = True,
    ) -> None:
        super().__init__(None, 0)
        shape = (num_states,) if num_parents is None else (num_parents, num_states)
        if min(shape) < 1:
            raise ValueError(f"numbers of states must be >= 1, got {shape}.")
        if probs is None:
            logits = 0.1 * torch.randn(shape)
        elif probs.shape != shape:
            raise ValueError(f"probs must have shape {shape}, got {tuple(probs.shape)}.")
        else:
            logits = probs.detach().log()
        self.num_states, self.num_parents = num_states, num_parents
        if learn:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)
        if enumerate:
            self.infer = {"enumerate": "parallel"}

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        logits = self.logits
        if self.num_parents is not None:
            if parent is None:
                raise ValueError("Transition with num_parents can't begin a chain: it has no parent to look up.")
            logits = Vindex(logits)[parent.long()]
        return dist.Categorical(logits=logits)

    def extra_repr(self) -> str:
        return f"{self.num_states}" if self.num_parents is None else f"{self.num_states}, {self.num_parents}"


class Poisson(Kernel):
    """Independent Poisson counts with rate softplus(net(parent)) + 1e-6.

    Args:
        net: network to (..., *event_shape).
        event_dim: dims of one event.

    Example:
        >>> Poisson(nn.Linear(2, 4))(torch.zeros(3, 2)).event_shape
        torch.Size([4])
    """

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        rate = F.softplus(self.parameters_of(parent, context)) + 1e-6
        return dist.Poisson(rate).to_event(self.event_dim)


class NegativeBinomial(Kernel):
    """Independent negative binomial counts: r = softplus(a) + 1e-6 failures, success logits l, (a, l) = net(parent).

    The mean is r exp(l), the variance mean (1 + exp(l)): counts with more spread than :class:`Poisson` allows.

    Args:
        net: network to a and l side by side along the first event dim.
        event_dim: dims of one event, >= 1.

    Example:
        >>> NegativeBinomial(nn.Linear(2, 2 * 4))(torch.zeros(3, 2)).event_shape
        torch.Size([4])
    """

    def __init__(self, net: nn.Module, event_dim: int = 1) -> None:
        super().__init__(net, event_dim)
        if event_dim < 1:
            raise ValueError("NegativeBinomial needs event_dim >= 1: its two parameters stand along the first event dim.")

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        raw, logits = halves(self, self.parameters_of(parent, context))
        return dist.NegativeBinomial(F.softplus(raw) + 1e-6, logits=logits).to_event(self.event_dim)


class WithoutContext(PyroModule):
    """A kernel that is not shown the chain's context.

    Args:
        kernel: any kernel.

    Example:
        >>> WithoutContext(Gaussian(nn.Linear(2, 2)))(torch.zeros(3, 2), torch.zeros(3, 9)).event_shape
        torch.Size([1])
    """

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel
        self.infer = getattr(kernel, "infer", None)

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        return self.kernel(parent)


class Flow(Kernel):
    """A lazy distribution as a kernel: a module that maps a conditioning value to a ``torch`` distribution.

    This is the interface of zuko's flows (``zuko.flows.NSF(features, context)``), which are not Pyro distributions; no
    optional package is imported here.

    Args:
        lazy: module with ``lazy(c) -> torch.distributions.Distribution``, c being parent and context joined on the
            last dim, or ``lazy()`` where there is neither.
        event_dim: dims of one event.

    Example:
        >>> import zuko
        >>> flow = Flow(zuko.flows.NSF(2, 3, transforms=1))
        >>> flow(torch.zeros(5, 3)).shape()
        torch.Size([5, 2])
    """

    def __init__(self, lazy: nn.Module, event_dim: int = 1) -> None:
        super().__init__(lazy, event_dim)

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        net = self.net
        given = net() if parent is None and context is None else self.parameters_of(parent, context)
        if isinstance(given, TorchDistribution):
            return given
        return Adapted(given)


class Adapted(TorchDistribution):
    """A ``torch`` distribution with the methods that Pyro asks for.

    Args:
        base: the distribution, with ``sample`` or ``rsample``, ``log_prob`` and ``expand``.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, base: torch.distributions.Distribution) -> None:
        self.base_dist = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.base_dist.has_rsample

    @property
    def support(self) -> Any:
        try:
            return self.base_dist.support
        except (NotImplementedError, AttributeError):
            return torch.distributions.constraints.independent(
                torch.distributions.constraints.real, len(self.event_shape)
            )

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.base_dist.sample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.base_dist.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base_dist.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Adapted:
        return Adapted(self.base_dist.expand(torch.Size(batch_shape)))
