r"""Factors of a product: modules that return a distribution and can be matched to weighted draws.

For an exponential family :math:`q(z) = h(z)\exp(\eta^\top T(z) - A(\eta))` KL(p||q) is least where
expectations agree, :math:`\mathrm E_q[T] = \mathrm E_p[T]`; :meth:`Family.match` solves this equation.  Other
families are fitted to the same draws by gradient, :func:`fit_by_gradient`.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform, identity_transform

from pyro_hvae.factorized.sites import Site
from pyro_hvae.problem.supports import bare_support

__all__ = ["FAMILIES", "Family", "family_for", "fit_by_gradient"]


class Family(nn.Module):
    """One factor for each element of a site; ``forward()`` returns its distribution.

    Args:
        site: the site of the factor.
        like: a tensor of the dtype and device for the parameters.
    """

    supports: str = ""

    def __init__(self, site: Site, like: Tensor) -> None:
        super().__init__()
        self.site = site

    @classmethod
    def fits(cls, site: Site) -> bool:
        """Whether the family has the site's support."""
        raise NotImplementedError

    def match(self, values: Tensor, weights: Tensor) -> None:
        """Set the parameters so that expectations equal those of weighted draws.

        Args:
            values: ``(K, *site.shape)``.
            weights: normalised along dim 0, broadcastable against ``values``.
        """
        raise NotImplementedError

    def forward(self) -> Any:
        raise NotImplementedError

    def put(self, **values: Tensor) -> None:
        """Set the parameters of these names to values."""
        with torch.no_grad():
            for name, value in values.items():
                getattr(self, name).copy_(value)


def expectation(weights: Tensor, statistic: Tensor) -> Tensor:
    """Return the weighted sum of a statistic; draws of zero weight are dropped, infinite ones included."""
    return torch.where(weights > 0, weights * statistic, 0.0).sum(0)


def bounds_of(site: Site) -> tuple[float | None, float | None] | None:
    """Return lower and upper bound of a continuous support, None for none; None if the elements' bounds differ."""
    support = bare_support(site.prior)
    if support.is_discrete:
        return None
    bounds = []
    for name in ("lower_bound", "upper_bound"):
        bound = getattr(support, name, None)
        if bound is not None:
            bound = torch.as_tensor(bound)
            if bool((bound != bound.reshape(-1)[0]).any()):
                return None
            bound = float(bound.reshape(-1)[0])
        bounds.append(bound)
    return bounds[0], bounds[1]


class Normal(Family):
    """Normal on the real line, mapped to the site's support: LogNormal where that is positive."""

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
        """Whether the site is Normal without a transform."""
        return is_identity(self.transform)

    def match(self, values: Tensor, weights: Tensor) -> None:
        u = self.transform.inv(values)
        weights = weights.reshape(weights.shape[: weights.dim() - (values.dim() - u.dim())])  # a matrix becomes a row
        loc = expectation(weights, u)
        variance = expectation(weights, (u - loc) ** 2)
        self.set(loc, 0.5 * variance.clamp(min=1e-24).log())

    def set(self, loc: Tensor, log_scale: Tensor) -> None:
        """Set the location and the log scale of each element."""
        self.put(loc=loc, log_scale=log_scale)

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
        mean, mean_log = expectation(weights, values), expectation(weights, values.log())
        s = (mean.log() - mean_log).clamp(min=1e-12)
        log_a = ((3 - s + ((s - 3) ** 2 + 24 * s).sqrt()) / (12 * s)).log()
        for _ in range(50):
            a = log_a.exp()
            log_a = log_a - (log_a - a.digamma() - s) / (1 - a * torch.polygamma(1, a))
        self.put(log_concentration=log_a, log_rate=log_a - mean.log())

    def forward(self) -> Any:
        return dist.Gamma(self.log_concentration.exp(), self.log_rate.exp()).to_event(self.site.event_dim)


class Dirichlet(Family):
    supports = "points of a simplex"

    def __init__(self, site: Site, like: Tensor) -> None:
        super().__init__(site, like)
        self.log_concentration = nn.Parameter(like.new_zeros(site.shape))

    @classmethod
    def fits(cls, site: Site) -> bool:
        return bare_support(site.prior) is constraints.simplex

    def match(self, values: Tensor, weights: Tensor) -> None:
        tiny = torch.finfo(values.dtype).tiny
        statistics = expectation(weights, values.clamp(min=tiny).log())
        self.put(log_concentration=dirichlet_from(statistics).log())

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
        statistics = torch.stack([expectation(weights, values.log()), expectation(weights, torch.log1p(-values))], -1)
        self.put(log_concentration=dirichlet_from(statistics).log())

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
        return bare_support(site.prior) is constraints.boolean

    def match(self, values: Tensor, weights: Tensor) -> None:
        self.from_tables(torch.stack([(weights * (values == v)).sum(0) for v in (0, 1)], -1))

    def from_tables(self, tables: Tensor) -> None:
        log = log_tables(tables)
        self.put(logits=log[..., 1] - log[..., 0])

    def tables(self) -> Tensor:
        return torch.stack([torch.sigmoid(-self.logits), torch.sigmoid(self.logits)], -1)

    def forward(self) -> Any:
        return dist.Bernoulli(logits=self.logits).to_event(self.site.event_dim)


class Categorical(Family):
    supports = "integers from 0 to n - 1"

    def __init__(self, site: Site, like: Tensor) -> None:
        super().__init__(site, like)
        count = int(torch.as_tensor(bare_support(site.prior).upper_bound).max()) + 1
        self.logits = nn.Parameter(like.new_zeros((*site.shape, count)))

    @classmethod
    def fits(cls, site: Site) -> bool:
        support = bare_support(site.prior)
        return isinstance(support, constraints.integer_interval) and bool(
            (torch.as_tensor(support.lower_bound) == 0).all()
        )

    def match(self, values: Tensor, weights: Tensor) -> None:
        count = self.logits.shape[-1]
        self.from_tables(torch.stack([(weights * (values == v)).sum(0) for v in range(count)], -1))

    def from_tables(self, tables: Tensor) -> None:
        self.put(logits=log_tables(tables))

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
        return bare_support(site.prior) is constraints.nonnegative_integer

    def match(self, values: Tensor, weights: Tensor) -> None:
        self.put(log_rate=expectation(weights, values).clamp(min=1e-12).log())

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
"""Families by name; the default of a site is the first that fits its support."""


def family_for(site: Site, named: Any, like: Tensor) -> nn.Module:
    """Build the factor of a site: by name, by support where ``named`` is None, or by a callable that makes a module.

    Raises:
        ValueError: for an unknown name, a family with another support than the site's, a support without a family, or
            a callable that does not make a module.
    """
    if named is None:
        for family in FAMILIES.values():
            if family.fits(site):
                return family(site, like)
        raise ValueError(
            f"no family for site '{site.name}' with support {site.support}: give a module that returns "
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
    return module_from(site, named)


def module_from(site: Site, maker: Any) -> nn.Module:
    """Build a user's module, and check the event shape of its distribution."""
    where = f"families['{site.name}']"
    if not callable(maker) or isinstance(maker, (nn.Module, torch.distributions.Distribution)):
        raise ValueError(f"{where} is {maker!r}; it must be a name, or a callable that makes a module")
    module = maker()
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{where} makes a {type(module).__name__}, which is no module and can't be fitted. Put its "
            "parameters into a torch.nn.Module whose forward() returns the distribution"
        )
    event_shape = module().event_shape
    if event_shape != site.event_shape:
        raise ValueError(f"{where} has event shape {tuple(event_shape)}, and the site {tuple(site.event_shape)}")
    return module


def fit_by_gradient(module: nn.Module, values: Tensor, weights: Tensor, *, steps: int = 300) -> None:
    """Minimise KL(p||q) = -E_p[log q] + const over a module's parameters, on weighted draws (L-BFGS).

    Args:
        module: ``module()`` returns a distribution of the site.
        values: ``(K, *site.shape)``.
        weights: normalised along dim 0, in the shape of ``module().log_prob(values)`` or broadcastable to it.
    """
    used = (weights > 0).reshape(len(weights), -1).any(1)  # log q may have no gradient at draws of zero weight
    values, weights = values[used], weights[used]
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = -expectation(weights, module().log_prob(values)).sum()
            loss.backward()
        return loss

    optimizer.step(closure)


def dirichlet_from(statistics: Tensor) -> Tensor:
    """Solve for the concentrations with E[log z_i] = statistics, by Newton's method on their logarithms.

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
        # Convex in a, but not in log a: the curvature without its term of first derivatives.
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
    """Return logarithms of probabilities, bounded below so that a table can be trained further."""
    return (tables / tables.sum(-1, keepdim=True)).clamp(min=torch.finfo(tables.dtype).tiny).log()


def without_events(transform: Any) -> Any:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform


def is_identity(transform: Any) -> bool:
    transform = without_events(transform)
    return transform is identity_transform or (isinstance(transform, ComposeTransform) and not transform.parts)
