r"""Factors of a product: each a module that returns a distribution and can be matched to weighted draws.

For an exponential family :math:`q(z) = h(z)\exp(\eta^\top T(z) - A(\eta))` the minimum of KL(p||q) is where the
expectations agree, :math:`\mathrm E_q[T] = \mathrm E_p[T]`; :meth:`Family.match` solves that.  Any other family is
fitted to the same draws by gradient, :func:`fit_by_gradient`.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform, identity_transform

from pyro_hvae.factorized.sites import Site

__all__ = ["FAMILIES", "Family", "family_for", "fit_by_gradient"]


class Family(PyroModule):
    """One factor for each element of a site; ``forward()`` returns its distribution.

    Args:
        site: the site whose place the factor takes.
        like: a tensor of the dtype and device for the parameters.
    """

    supports: str = ""

    def __init__(self, site: Site, like: Tensor) -> None:
        super().__init__()
        self.site = site

    @classmethod
    def fits(cls, site: Site) -> bool:
        """Whether the family lives on the site's support."""
        raise NotImplementedError

    def match(self, values: Tensor, weights: Tensor) -> None:
        """Set the parameters where expectations agree with those of draws.

        Args:
            values: ``(K, *site.shape)``.
            weights: normalised along dim 0, broadcastable against ``values``.
        """
        raise NotImplementedError

    def forward(self) -> Any:
        raise NotImplementedError

    def _set(self, **values: Tensor) -> None:
        with torch.no_grad():
            for name, value in values.items():
                getattr(self, name).copy_(value)


def bare_support(site: Site) -> Any:
    support = site.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def bounds_of(site: Site) -> tuple[float | None, float | None] | None:
    """Lower and upper bound of a continuous support, None where there is none; no pair where elements differ."""
    support = bare_support(site)
    if support.is_discrete:
        return None
    found = []
    for name in ("lower_bound", "upper_bound"):
        bound = getattr(support, name, None)
        if bound is not None:
            bound = torch.as_tensor(bound)
            if bool((bound != bound.reshape(-1)[0]).any()):
                return None
            bound = float(bound.reshape(-1)[0])
        found.append(bound)
    return found[0], found[1]


class Normal(Family):
    """Normal on the real line that the site's support is mapped to: LogNormal where that is positive."""

    supports = "any continuous support"

    def __init__(self, site: Site, like: Tensor) -> None:
        super().__init__(site, like)
        self.transform = site.to_support
        shape = self.transform.inverse_shape(site.shape)
        self.loc = nn.Parameter(like.new_zeros(shape))
        self.log_scale = nn.Parameter(like.new_zeros(shape))

    @classmethod
    def fits(cls, site: Site) -> bool:
        return not site.support.is_discrete

    @property
    def linear(self) -> bool:
        """Whether the site itself, and not a transform of it, is Normal."""
        return is_identity(self.transform)

    def match(self, values: Tensor, weights: Tensor) -> None:
        u = self.transform.inv(values)
        weights = weights.reshape(weights.shape[: weights.dim() - (values.dim() - u.dim())])  # a matrix becomes a row
        loc = (weights * u).sum(0)
        variance = (weights * (u - loc) ** 2).sum(0)
        self.set(loc, 0.5 * variance.clamp(min=1e-24).log())

    def set(self, loc: Tensor, log_scale: Tensor) -> None:
        """Put the two numbers of each element in place."""
        self._set(loc=loc, log_scale=log_scale)

    def forward(self) -> Any:
        base = dist.Normal(self.loc, self.log_scale.exp())
        events = self.loc.dim() - len(self.site.batch_shape)
        if self.linear:
            return base.to_event(events)
        return dist.TransformedDistribution(base.to_event(events), [self.transform])


class Gamma(Family):
    supports = "positive numbers"

    def __init__(self, site: Site, like: Tensor) -> None:
        super().__init__(site, like)
        self.log_concentration = nn.Parameter(like.new_zeros(site.shape))
        self.log_rate = nn.Parameter(like.new_zeros(site.shape))

    @classmethod
    def fits(cls, site: Site) -> bool:
        return bounds_of(site) == (0.0, None)

    def match(self, values: Tensor, weights: Tensor) -> None:
        mean, mean_log = (weights * values).sum(0), (weights * values.log()).sum(0)
        s = (mean.log() - mean_log).clamp(min=1e-12)
        log_a = ((3 - s + ((s - 3) ** 2 + 24 * s).sqrt()) / (12 * s)).log()
        for _ in range(50):
            a = log_a.exp()
            log_a = log_a - (log_a - a.digamma() - s) / (1 - a * torch.polygamma(1, a))
        self._set(log_concentration=log_a, log_rate=log_a - mean.log())

    def forward(self) -> Any:
        return dist.Gamma(self.log_concentration.exp(), self.log_rate.exp()).to_event(self.site.event_dim)


class Dirichlet(Family):
    supports = "points of a simplex"

    def __init__(self, site: Site, like: Tensor) -> None:
        super().__init__(site, like)
        self.log_concentration = nn.Parameter(like.new_zeros(site.shape))

    @classmethod
    def fits(cls, site: Site) -> bool:
        return bare_support(site) is constraints.simplex

    def match(self, values: Tensor, weights: Tensor) -> None:
        tiny = torch.finfo(values.dtype).tiny
        statistics = (weights * values.clamp(min=tiny).log()).sum(0)
        self._set(log_concentration=dirichlet_from(statistics).log())

    def forward(self) -> Any:
        return dist.Dirichlet(self.log_concentration.exp()).to_event(self.site.event_dim - 1)


class Beta(Family):
    supports = "numbers between 0 and 1"

    def __init__(self, site: Site, like: Tensor) -> None:
        super().__init__(site, like)
        self.log_concentration = nn.Parameter(like.new_zeros((*site.shape, 2)))

    @classmethod
    def fits(cls, site: Site) -> bool:
        return bounds_of(site) == (0.0, 1.0)

    def match(self, values: Tensor, weights: Tensor) -> None:
        eps = torch.finfo(values.dtype).eps
        values = values.clamp(eps, 1 - eps)
        statistics = torch.stack([(weights * values.log()).sum(0), (weights * torch.log1p(-values)).sum(0)], -1)
        self._set(log_concentration=dirichlet_from(statistics).log())

    def forward(self) -> Any:
        first, second = self.log_concentration.exp().unbind(-1)
        return dist.Beta(first, second).to_event(self.site.event_dim)


class Bernoulli(Family):
    supports = "0 and 1"

    def __init__(self, site: Site, like: Tensor) -> None:
        super().__init__(site, like)
        self.logits = nn.Parameter(like.new_zeros(site.shape))

    @classmethod
    def fits(cls, site: Site) -> bool:
        return bare_support(site) is constraints.boolean

    def match(self, values: Tensor, weights: Tensor) -> None:
        self.from_tables(torch.stack([(weights * (values == v)).sum(0) for v in (0, 1)], -1))

    def from_tables(self, tables: Tensor) -> None:
        log = log_tables(tables)
        self._set(logits=log[..., 1] - log[..., 0])

    def tables(self) -> Tensor:
        return torch.stack([torch.sigmoid(-self.logits), torch.sigmoid(self.logits)], -1)

    def forward(self) -> Any:
        return dist.Bernoulli(logits=self.logits).to_event(self.site.event_dim)


class Categorical(Family):
    supports = "integers from 0 to n - 1"

    def __init__(self, site: Site, like: Tensor) -> None:
        super().__init__(site, like)
        count = int(torch.as_tensor(bare_support(site).upper_bound).max()) + 1
        self.logits = nn.Parameter(like.new_zeros((*site.shape, count)))

    @classmethod
    def fits(cls, site: Site) -> bool:
        support = bare_support(site)
        return isinstance(support, constraints.integer_interval) and bool(
            (torch.as_tensor(support.lower_bound) == 0).all()
        )

    def match(self, values: Tensor, weights: Tensor) -> None:
        count = self.logits.shape[-1]
        self.from_tables(torch.stack([(weights * (values == v)).sum(0) for v in range(count)], -1))

    def from_tables(self, tables: Tensor) -> None:
        self._set(logits=log_tables(tables))

    def tables(self) -> Tensor:
        return self.logits.softmax(-1)

    def forward(self) -> Any:
        return dist.Categorical(logits=self.logits).to_event(self.site.event_dim)


class Poisson(Family):
    supports = "numbers of events"

    def __init__(self, site: Site, like: Tensor) -> None:
        super().__init__(site, like)
        self.log_rate = nn.Parameter(like.new_zeros(site.shape))

    @classmethod
    def fits(cls, site: Site) -> bool:
        return bare_support(site) is constraints.nonnegative_integer

    def match(self, values: Tensor, weights: Tensor) -> None:
        self._set(log_rate=(weights * values).sum(0).clamp(min=1e-12).log())

    def forward(self) -> Any:
        return dist.Poisson(self.log_rate.exp()).to_event(self.site.event_dim)


FAMILIES: dict[str, type[Family]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "poisson": Poisson,
    "beta": Beta,
    "dirichlet": Dirichlet,
    "normal": Normal,
    "gamma": Gamma,
}
"""By name; where none is named, the first that fits a site's support is taken."""


def family_for(site: Site, named: Any, like: Tensor) -> nn.Module:
    """The factor of a site: by name, by support where ``named`` is None, or a callable that makes a module.

    Raises:
        ValueError: for an unknown name, a family that does not live on the site's support, a support that no family
            here lives on, or a maker of something else than modules.
    """
    if named is None:
        for family in FAMILIES.values():
            if family.fits(site):
                return family(site, like)
        raise ValueError(
            f"no family is known for site '{site.name}' with support {site.support}: give a module that returns "
            f"a distribution, families={{'{site.name}': ...}}"
        )
    if isinstance(named, str):
        if named not in FAMILIES:
            raise ValueError(f"unknown family {named!r} for site '{site.name}'; there are {', '.join(FAMILIES)}")
        family = FAMILIES[named]
        if not family.fits(site):
            raise ValueError(
                f"family {named!r} is for {family.supports}, and site '{site.name}' has support {site.support}"
            )
        return family(site, like)
    return checked(site, named)


def checked(site: Site, maker: Any) -> nn.Module:
    """The module that a user's maker makes, if its distribution has the site's event shape."""
    where = f"families['{site.name}']"
    if not callable(maker) or isinstance(maker, (nn.Module, torch.distributions.Distribution)):
        raise ValueError(f"{where} is {maker!r}; a name, or a callable without arguments that makes a module, is meant")
    module = maker()
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{where} makes a {type(module).__name__}, which is no module: nothing of it can be fitted. Put its "
            "parameters into a torch.nn.Module whose forward() returns the distribution"
        )
    found = module().event_shape
    if found != site.event_shape:
        raise ValueError(f"{where} has event shape {tuple(found)}, and the site {tuple(site.event_shape)}")
    return module


def fit_by_gradient(module: nn.Module, values: Tensor, weights: Tensor, *, steps: int = 300) -> None:
    """Minimise KL(p||q) = -E_p[log q] + const over a module's parameters, on weighted draws (L-BFGS).

    Args:
        module: ``module()`` returns a distribution of the site.
        values: ``(K, *site.shape)``.
        weights: normalised along dim 0, in the shape of ``module().log_prob(values)`` or broadcastable to it.
    """
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = -(weights * module().log_prob(values)).sum()
            loss.backward()
        return loss

    optimizer.step(closure)


def dirichlet_from(statistics: Tensor) -> Tensor:
    """Concentrations with given E[log z_i], by Newton's method on their logarithms.

    Reference:
        Estimating a Dirichlet Distribution (Minka, 2000), for the equations.
    """
    size = statistics.shape[-1]
    log_a = torch.zeros_like(statistics)

    def value(log_a: Tensor) -> Tensor:
        a = log_a.exp()
        return a.lgamma().sum(-1) - a.sum(-1).lgamma() - (a * statistics).sum(-1)

    eye = torch.eye(size, dtype=statistics.dtype, device=statistics.device)
    for _ in range(200):
        a = log_a.exp()
        slope = a * (a.digamma() - a.sum(-1, keepdim=True).digamma() - statistics)
        curve = (
            torch.diag_embed(a**2 * torch.polygamma(1, a))
            - a[..., :, None] * a[..., None, :] * (torch.polygamma(1, a.sum(-1))[..., None, None])
        )
        # Convex in a, but not everywhere in log a, where the plain Gauss part of the curvature is used.
        step = torch.linalg.solve(curve + 1e-12 * eye, slope)
        step = step.clamp(-2.0, 2.0)
        scale = torch.ones_like(step[..., :1])
        for _ in range(20):
            worse = value(log_a - scale * step) > value(log_a) + 1e-14 * value(log_a).abs()
            if not bool(worse.any()):
                break
            scale = torch.where(worse[..., None], scale / 2, scale)
        log_a = log_a - scale * step
        if float((scale * step).abs().max()) < 1e-12:
            break
    return log_a.exp()


def log_tables(tables: Tensor) -> Tensor:
    """Logarithms of probabilities; an impossible value keeps a finite one, so that a table can be trained further."""
    return (tables / tables.sum(-1, keepdim=True)).clamp(min=torch.finfo(tables.dtype).tiny).log()


def strip(transform: Any) -> Any:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform


def is_identity(transform: Any) -> bool:
    transform = strip(transform)
    return transform is identity_transform or (isinstance(transform, ComposeTransform) and not transform.parts)
