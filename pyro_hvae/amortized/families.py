"""Distributions of a latent from the outputs of a network: one family for each kind of support."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_hvae.amortized.transforms import Skew, TriangularAffine, below_diagonal, inner_support, transform_onto
from pyro_hvae.problem.structure import leaf_distribution

__all__ = ["CustomHead", "DiscreteHead", "GaussianHead", "make_head"]

FULL_UP_TO = 40
"""The largest event that has a full covariance by default."""
RANK = 8
"""Rank of the covariance of larger events, besides its diagonal."""
FLOOR = 1e-5
"""Smallest standard deviation, in those of the prior."""
MOST_SKEW = 2.0
"""Largest skew, at which the longer tail is some e^4 times the shorter."""
START = 0.3
"""The standard deviation at the start, in those of the prior, and in the units of the real line at most."""

Factory = Callable[[int, int], nn.Module]


def make_head(name: str, fn: Any, family: Any, draws: Tensor) -> GaussianHead | DiscreteHead | CustomHead:
    """Return the family of a site.

    Args:
        name: of the site.
        fn: its distribution in the model.
        family: ``"skewed"``, ``"full"``, ``"low_rank"``, ``"diagonal"``, ``"logits"``, ``"enumerate"``, a function, or
            None.
        draws: of the prior, ``(S, ...)``.

    Raises:
        ValueError: for a family that the support does not have.
    """
    try:
        support = inner_support(fn)
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"site '{name}' ({type(leaf_distribution(fn)).__name__}) does not say what its support is: draw it in a "
            f"program of yours, amortize(..., guides=[program])"
        ) from error
    if type(leaf_distribution(fn)).__name__ == "Delta":
        raise ValueError(f"site '{name}' is a Delta, of which nothing is to be inferred: write pyro.deterministic")
    discrete = ("logits", "enumerate")
    continuous = ("skewed", "full", "low_rank", "diagonal")
    allowed = discrete if support.is_discrete else continuous
    if family is not None and family not in allowed and (support.is_discrete or not callable(family)):
        kind = "discrete" if support.is_discrete else "continuous"
        raise ValueError(
            f"families['{name}'] is {family!r}, and the site is {kind}: choose one of {list(allowed)}"
            + ("" if support.is_discrete else ", or a function from (width, size) to a module")
        )
    if support.is_discrete:
        return DiscreteHead(name, fn, enumerated=family == "enumerate")
    try:
        transform = transform_onto(support)
        free = transform.inv(draws)
        transform.log_abs_det_jacobian(free[:1], draws[:1])
    except NotImplementedError as error:
        raise ValueError(
            f"site '{name}' has the support {support}, which has no bijection from the real line: draw it in a program "
            "of yours, amortize(..., guides=[program])"
        ) from error
    shape = transform.inverse_shape(fn.shape())
    event = torch.Size(shape[len(fn.batch_shape) :])
    spread = free.detach().reshape(-1, event.numel())
    spread = spread[spread.isfinite().all(-1)] if len(spread) else spread
    if len(spread) < 2:
        spread = torch.tensor([[-1.0], [1.0]]).to(free).expand(2, event.numel())
    low, middle, high = spread.quantile(torch.tensor([0.16, 0.5, 0.84]).to(spread), dim=0)
    scale = ((high - low) / 2).clamp(1e-3, 1e3)
    if callable(family):
        return CustomHead(family, event, middle, scale)
    size = event.numel()
    kind = family or ("low_rank" if size > FULL_UP_TO else "full" if is_identity(transform) else "skewed")
    return GaussianHead(kind, event, middle, scale)


class GaussianHead(nn.Module):
    """A Gaussian on the real line, skewed where asked for, mapped onto the support.

    It starts at the prior's median, narrower than the prior.

    Args:
        kind: ``"skewed"``, ``"full"``, ``"low_rank"`` or ``"diagonal"``.
        event: event shape on the real line.
        loc, scale: of the prior on the real line, of each of its d elements.
    """

    infer: dict[str, Any] | None = None
    wants_features = False

    def __init__(self, kind: str, event: torch.Size, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.kind, self.event = kind, event
        self.loc: Tensor
        self.scale: Tensor
        self.offset: Tensor
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())
        start = (START / scale).clamp(max=START)
        self.register_buffer("offset", start.expm1().log())
        size = event.numel()
        self.rank = min(RANK, size)
        triangle = size * (size - 1) // 2
        more = {"skewed": 2 * size + triangle, "full": triangle, "low_rank": size * self.rank, "diagonal": 0}[kind]
        self.outputs = 2 * size + more

    def __repr__(self) -> str:
        if self.event.numel() > 1:
            return f"{self.kind} Gaussian in {self.event.numel()} dims"
        return "skewed Gaussian" if self.kind == "skewed" else "Gaussian"

    def forward(self, outputs: Tensor, fn: Any) -> Any:
        """Return the distribution from outputs (..., :attr:`outputs`); ``fn`` is the model's, whose support it has."""
        size = self.event.numel()
        loc = self.loc + self.scale * outputs[..., :size]
        scale = self.scale * (nn.functional.softplus(outputs[..., size : 2 * size] + self.offset) + FLOOR)
        rest = outputs[..., 2 * size :]
        transform = transform_onto(inner_support(fn))
        base: Any
        if self.kind == "skewed":
            base = _skewed(loc, scale, rest)
        elif not self.event or (size == 1 and len(self.event) == 1) or self.kind == "diagonal":
            shape = outputs.shape[:-1] + self.event
            base = dist.Normal(loc.reshape(shape), scale.reshape(shape)).to_event(len(self.event))
        elif self.kind == "full":
            factor = scale[..., None] * (torch.eye(size).to(rest) + below_diagonal(rest, size))
            base = dist.MultivariateNormal(loc, scale_tril=factor)
        else:
            factor = self.scale[..., None] * rest.reshape(*rest.shape[:-1], size, self.rank) / math.sqrt(self.rank)
            base = dist.LowRankMultivariateNormal(loc, factor, scale.square())
        return mapped(base, self.event, transform)


def mapped(base: Any, event: torch.Size, transform: Any) -> Any:
    """Return a distribution on the support from one of d numbers."""
    parts = []
    if len(base.event_shape) == 1 and len(event) != 1:
        parts.append(torch.distributions.ReshapeTransform(base.event_shape, event))
    if not is_identity(transform):
        parts.append(transform)
    return dist.TransformedDistribution(base, parts) if parts else base


def is_identity(transform: Any) -> bool:
    """Return whether a transform leaves all as it is."""
    plain = transform
    while isinstance(plain, torch.distributions.IndependentTransform):
        plain = plain.base_transform
    if plain is torch.distributions.identity_transform:
        return True
    return isinstance(plain, torch.distributions.ComposeTransform) and not plain.parts


def _skewed(loc: Tensor, scale: Tensor, rest: Tensor) -> Any:
    """Return loc + scale L g(noise), with a bend g of each element and a unit lower triangle L."""
    size = loc.shape[-1]
    skew, tail = MOST_SKEW * torch.tanh(rest[..., :size] / MOST_SKEW), rest[..., size : 2 * size].tanh().exp()
    parts: list[Any] = [Skew(skew, tail)]
    if size > 1:
        factor = scale[..., None] * (torch.eye(size).to(rest) + below_diagonal(rest[..., 2 * size :], size))
        parts.append(TriangularAffine(loc, factor))
    else:
        parts.append(torch.distributions.AffineTransform(loc, scale))
    return dist.TransformedDistribution(dist.Normal(torch.zeros_like(loc), 1.0).to_event(1), parts)


class CustomHead(nn.Module):
    """A conditional distribution of d numbers that the user gives, mapped onto the support.

    Args:
        factory: called with the width of the features and d; returns a module from features to a distribution.
    """

    infer: dict[str, Any] | None = None
    wants_features = True

    def __init__(self, factory: Factory, event: torch.Size, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.factory, self.event = factory, event
        self.loc: Tensor
        self.scale: Tensor
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())
        self.conditional: nn.Module | None = None

    def build(self, width: int) -> None:
        """Make the module for features of this width."""
        module = self.factory(width, max(self.event.numel(), 1))
        if not isinstance(module, nn.Module):
            raise TypeError(f"a family must be a function that returns a torch module, got {type(module).__name__}")
        self.conditional = module

    def __repr__(self) -> str:
        return type(self.conditional).__name__

    def forward(self, features: Tensor, fn: Any) -> Any:
        assert self.conditional is not None
        base = self.conditional(features)
        affine = torch.distributions.AffineTransform(self.loc, self.scale, event_dim=1)
        shifted = dist.TransformedDistribution(base, [affine])
        return mapped(shifted, self.event, transform_onto(inner_support(fn)))


class DiscreteHead(nn.Module):
    """Logits of a discrete site; a rate for counts without a largest value.

    Args:
        enumerated: the guide enumerates the site, for exact expectations.

    Raises:
        ValueError: for a support whose values can't be listed.
    """

    wants_features = False

    def __init__(self, name: str, fn: Any, enumerated: bool = False) -> None:
        super().__init__()
        base: Any = inner_support(fn)
        while isinstance(base, constraints.independent):
            base = base.base_constraint
        self.event = torch.Size(fn.event_shape)
        self.infer = {"enumerate": "parallel"} if enumerated else None
        kind = type(base).__name__
        if kind == "_Boolean":
            self.kind, self.size = "bernoulli", 1
        elif kind == "_OneHot":
            self.kind, self.size = "one_hot", self.event[-1]
        elif kind == "_IntegerInterval" and bool((torch.as_tensor(base.lower_bound) == 0).all()):
            self.kind, self.size = "categorical", int(torch.as_tensor(base.upper_bound).max()) + 1
        elif kind == "_IntegerGreaterThan" and bool((torch.as_tensor(base.lower_bound) == 0).all()) and not enumerated:
            self.kind, self.size = "poisson", 1
        else:
            raise ValueError(
                f"site '{name}' ({type(leaf_distribution(fn)).__name__}) has the support {base}, for which there is no "
                "family: draw it in a program of yours, amortize(..., guides=[program])"
            )
        self.elements = self.event[:-1].numel() if self.kind == "one_hot" else self.event.numel()
        self.outputs = self.elements * self.size

    def __repr__(self) -> str:
        how = {"bernoulli": "Bernoulli", "poisson": "Poisson"}.get(self.kind, f"{self.size} logits")
        return how + (", enumerated" if self.infer else "")

    def forward(self, outputs: Tensor, fn: Any) -> Any:
        batch = outputs.shape[:-1]
        if self.kind == "bernoulli":
            return dist.Bernoulli(logits=outputs.reshape(batch + self.event)).to_event(len(self.event))
        if self.kind == "poisson":
            rate = nn.functional.softplus(outputs + 1.0) + 1e-6
            return dist.Poisson(rate.reshape(batch + self.event)).to_event(len(self.event))
        if self.kind == "one_hot":
            return dist.OneHotCategorical(logits=outputs.reshape(batch + self.event)).to_event(len(self.event) - 1)
        return dist.Categorical(logits=outputs.reshape(*batch, *self.event, self.size)).to_event(len(self.event))
