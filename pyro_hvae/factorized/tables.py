r"""Marginal tables of many discrete latents, without a list of their configurations.

With potentials :math:`\phi` added to the log-densities of the latents,

.. math:: \frac{\partial}{\partial\phi_{iv}} \log \sum_z p(x, z)\exp\Bigl(\sum_i\phi_{i z_i}\Bigr)\Big|_{\phi=0}
          = p(z_i = v \mid x),

so one backward pass through a sum by variable elimination gives every marginal: in a chain of length T at a cost that
grows with T and not with its exponential (a Differential Approach to Inference in Bayesian Networks, Darwiche, 2003).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.infer import config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_hvae.factorized.posterior import Joint
from pyro_hvae.factorized.sites import support_of
from pyro_hvae.traces import read

__all__ = ["eliminated"]


def eliminated(joint: Joint) -> dict[str, Tensor] | None:
    """Marginal tables ``(*site.shape, V)`` by site; None where a latent is not discrete, or can't be summed out."""
    supports = {}
    for name, site in joint.latents.sites.items():
        support = support_of(site)
        if support is None or site.event_dim:
            return None
        supports[name] = support
    like = joint.latents.like
    potentials = {
        name: like.new_zeros(*joint.latents.sites[name].shape, len(support)).requires_grad_()
        for name, support in supports.items()
    }
    tilted = _Tilt(supports, potentials)(config_enumerate(joint.model))
    try:
        with torch.enable_grad():
            value = read(tilted, _nothing, joint.args, joint.kwargs).log_weights
            slopes = torch.autograd.grad(value.sum(), list(potentials.values()))
    except (ValueError, NotImplementedError):
        return None
    if not all(bool(torch.isfinite(slope).all()) for slope in slopes):
        return None
    return dict(zip(potentials, slopes))


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Tilt(Messenger):
    def __init__(self, supports: Mapping[str, Tensor], potentials: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.supports, self.potentials = supports, potentials

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.potentials and not isinstance(msg["fn"], _Tilted):
            msg["fn"] = _Tilted(msg["fn"], self.supports[name], self.potentials[name])


class _Tilted(TorchDistribution):
    """A discrete distribution whose density is multiplied by exp(potential), and not normalised again."""

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
