r"""Posteriors of discrete latents: a list of all configurations, or marginal tables without one.

With potentials :math:`\phi` added to the log-densities of the latents,

.. math:: \frac{\partial}{\partial\phi_{iv}} \log \sum_z p(x, z)\exp\Bigl(\sum_i\phi_{i z_i}\Bigr)\Big|_{\phi=0}
          = p(z_i = v \mid x),

so one backward pass through a sum by variable elimination gives every marginal.  In a chain of length T the cost is
linear in T (A Differential Approach to Inference in Bayesian Networks, Darwiche, 2003).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.infer import config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_hvae.factorized.draws import log_joint
from pyro_hvae.factorized.posterior import Posterior, Sample
from pyro_hvae.factorized.sites import Latents, support_of
from pyro_hvae.modules import evaluation_mode
from pyro_hvae.problem import Problem
from pyro_hvae.weights import check_weights

__all__ = ["Configurations", "configurations", "eliminated"]

MOST_CONFIGURATIONS = 20_000
"""Largest number of configurations of one datum that are listed."""


class Configurations(Posterior):
    """Every configuration of a datum's discrete latents, with its exact posterior probability.

    Args:
        problem: the model with its data, and a guide that draws its latents.
        latents: of the model.
        supports: the values of each site's elements.

    Attributes:
        sizes: values that each element can take, in the order of the sites and of their elements.
        index: of the value of each element, ``(K, elements)``; the last element varies fastest.
        log_joint: log p(x, z), ``(K, *data)``.

    Raises:
        ValueError: where the support of a site depends on other draws, or no configuration has a positive probability.
    """

    def __init__(self, problem: Problem, latents: Latents, supports: Mapping[str, Tensor]) -> None:
        self.problem, self.latents, self.how = problem, latents, "enumeration"
        sites = latents.sites.items()
        self.sizes = [len(supports[name]) for name, site in sites for _ in range(latents.elements(site))]
        index = torch.cartesian_prod(*(torch.arange(size, device=latents.like.device) for size in self.sizes))
        self.index = index.reshape(-1, len(self.sizes))
        self.values = {}
        for name, columns in latents.places().items():
            flat = supports[name][self.index[:, columns.start : columns.stop]]
            flat = flat.reshape(len(flat), *(1,) * len(latents.data_shape), -1)
            site = latents.sites[name]
            self.values[name] = latents.unflatten(flat.expand(len(flat), *latents.data_shape, -1), site)
        self.log_joint = log_joint(problem, latents, self.values)
        check_weights(self.log_joint)
        self.log_evidence = self.log_joint.logsumexp(0)
        self.log_weights = self.log_joint - self.log_evidence
        self.stderr = torch.zeros_like(self.log_evidence)
        self.khat = torch.full_like(self.log_evidence, -torch.inf)

    def sample(self, count: int) -> Sample:
        return Sample(self.values, self.log_weights, self.log_joint)


def configurations(problem: Problem, latents: Latents) -> Configurations | None:
    """List all configurations; None where a latent is not discrete and finite, or there are too many."""
    supports, count = {}, 1.0
    for name, site in latents.sites.items():
        support = support_of(site)
        if support is None:
            return None
        supports[name] = support.to(latents.like.device)
        count *= float(len(support)) ** latents.elements(site)
        if count > MOST_CONFIGURATIONS:
            return None
    return Configurations(problem, latents, supports)


def eliminated(problem: Problem, latents: Latents) -> dict[str, Tensor] | None:
    """Return marginal tables ``(*site.shape, V)`` by site; None where a latent can't be summed out."""
    supports = {}
    for name, site in latents.sites.items():
        support = support_of(site)
        if support is None or site.event_dim:
            return None
        supports[name] = support
    potentials = {
        name: latents.like.new_zeros(*latents.sites[name].shape, len(support)).requires_grad_()
        for name, support in supports.items()
    }
    tilted = _Tilt(supports, potentials)(config_enumerate(problem.model))
    try:
        with torch.enable_grad(), evaluation_mode(problem.model):
            value = Problem(tilted, None, problem.args, problem.kwargs).unregistered().run().log_weights
            slopes = torch.autograd.grad(value.sum(), list(potentials.values()))
    except (ValueError, NotImplementedError):
        return None
    for slope in slopes:  # NaN where no configuration is possible, another sum where a support differs
        if not bool(((slope.sum(-1) - 1).abs() < 1e-3).all()):
            return None
    return dict(zip(potentials, slopes, strict=True))


class _Tilt(Messenger):
    """Add potentials to the log-densities of the latents."""

    def __init__(self, supports: Mapping[str, Tensor], potentials: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.supports, self.potentials = supports, potentials

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.potentials and not isinstance(msg["fn"], _Tilted):
            msg["fn"] = _Tilted(msg["fn"], self.supports[name], self.potentials[name])


class _Tilted(TorchDistribution):
    """A discrete distribution whose density is multiplied by exp(potential), without normalisation."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_enumerate_support = True

    def __init__(self, base: Any, support: Tensor, potential: Tensor) -> None:
        self.base, self.values, self.potential = base, support, potential
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Tilted:
        return _Tilted(self.base.expand(batch_shape), self.values, self.potential)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return self.base.enumerate_support(expand=expand)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.base.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        chosen = (value[..., None] == self.values).to(self.potential.dtype)
        return self.base.log_prob(value) + (chosen * self.potential).sum(-1)
