r"""A product of factors as a Pyro program, :math:`q(z) = \prod_b q_b(z_b)` (seed eq. 18).

A factor is one element of one site, or a block of sites that are kept joint.  Within a block the sites are drawn one
after another, each given those before it: from conditional tables, or from the conditionals of a Gaussian on the real
line, mapped to the supports.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_hvae.factorized.families import Normal, family_for, is_identity, log_tables
from pyro_hvae.factorized.sites import Latents, Site, entered, size_of

__all__ = ["ConditionalGaussian", "ConditionalTable", "ProductGuide"]


class ConditionalTable(nn.Module):
    """q(z | the sites before it in its block) as a table; every site has one discrete element a datum."""

    def __init__(self, site: Site, sizes: Sequence[int], like: Tensor) -> None:
        super().__init__()
        self.site, self.sizes = site, tuple(sizes)
        self.logits = nn.Parameter(like.new_zeros((*site.shape, math.prod(self.sizes[:-1]), self.sizes[-1])))

    def set(self, tables: Tensor) -> None:
        """Set the table from joint probabilities ``(*site.shape, *sizes)`` of the sites before it and this one."""
        with torch.no_grad():
            joint = tables.reshape(self.logits.shape)
            empty = joint.sum(-1, keepdim=True) <= 0  # the table of an impossible condition is arbitrary
            self.logits.copy_(log_tables(torch.where(empty, torch.ones_like(joint), joint)))

    def forward(self, before: Sequence[Tensor]) -> Any:
        index: Any = 0
        for value, size in zip(before, self.sizes, strict=False):
            index = index * size + value.long()
        if isinstance(index, int):
            logits = self.logits[..., 0, :]
        else:
            chosen = nn.functional.one_hot(index, math.prod(self.sizes[:-1])).to(self.logits.dtype)
            logits = (chosen[..., None] * self.logits).sum(-2)
        if self.site.support is torch.distributions.constraints.boolean:
            return dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
        return dist.Categorical(logits=logits)


class ConditionalGaussian(nn.Module):
    """q(z | the sites before it in its block): multivariate Normal and linear, on the real line."""

    def __init__(self, latents: Latents, site: Site, before: Sequence[Site], like: Tensor) -> None:
        super().__init__()
        self.latents, self.site, self.before = latents, site, tuple(before)
        self.transform = site.to_support
        width = math.prod(self._event(site))
        batch = site.batch_shape
        self.loc = nn.Parameter(like.new_zeros((*batch, width)))
        self.log_diagonal = nn.Parameter(like.new_zeros((*batch, width)))
        self.below = nn.Parameter(like.new_zeros((*batch, width, width)))
        earlier = sum(math.prod(self._event(other)) for other in before)
        self.gain = nn.Parameter(like.new_zeros((*batch, width, earlier))) if earlier else None

    @staticmethod
    def _event(site: Site) -> torch.Size:
        shape = site.to_support.inverse_shape(site.shape)
        return torch.Size(shape[len(site.batch_shape) :])

    def set(self, mean: Tensor, covariance: Tensor) -> None:
        """Set it from the joint moments of the sites before it and this one: ``(*data, d)`` and ``(*data, d, d)``."""
        width = self.loc.shape[-1]
        earlier = mean.shape[-1] - width
        own = covariance[..., earlier:, earlier:]
        loc = mean[..., earlier:]
        with torch.no_grad():
            if self.gain is not None:
                gain = torch.linalg.solve(covariance[..., :earlier, :earlier], covariance[..., :earlier, earlier:]).mT
                self.gain.copy_(gain.reshape(self.gain.shape))
                own = own - gain @ covariance[..., :earlier, earlier:]
                loc = loc - (gain @ mean[..., :earlier, None])[..., 0]
            factor = torch.linalg.cholesky(0.5 * (own + own.mT))
            self.loc.copy_(loc.reshape(self.loc.shape))
            self.log_diagonal.copy_(factor.diagonal(dim1=-2, dim2=-1).log().reshape(self.loc.shape))
            self.below.copy_(factor.tril(-1).reshape(self.below.shape))

    def forward(self, before: Sequence[Tensor]) -> Any:
        loc: Tensor = self.loc
        if self.gain is not None:
            free = [
                site.to_support.inv(value).reshape(*value.shape[: value.dim() - site.event_dim], -1)
                for site, value in zip(self.before, before, strict=True)
            ]
            loc = loc + (self.gain @ torch.cat(free, -1)[..., None])[..., 0]
        factor = self.below.tril(-1) + torch.diag_embed(self.log_diagonal.exp())
        event = self._event(self.site)
        base: Any = dist.MultivariateNormal(loc, scale_tril=factor)
        if len(event) == 1 and is_identity(self.transform):
            return base
        parts: list[Any] = [torch.distributions.ReshapeTransform(loc.shape[-1:], event)]
        if not is_identity(self.transform):
            parts.append(self.transform)
        return dist.TransformedDistribution(base, parts)


class ProductGuide(PyroModule):
    """A guide that is a product of factors, for one data set.

    It takes the model's arguments and ignores them.  Its factors are modules with parameters, so any bound can train it
    further.

    Attributes:
        khat: of the weights that it was matched to, by datum; ``-inf`` where it is exact, None where it was trained.
        ess: effective number of those weights.
        how: the method that gave it.

    Args:
        latents: sites of the model.
        families: names or makers of factors by site; the default depends on the support.
        blocks: groups of sites that are kept joint.
        name: of the module, in Pyro's parameter store.

    Raises:
        ValueError: for blocks that overlap, name no latent site, or mix discrete and continuous sites.
    """

    khat: Tensor | None = None
    ess: Tensor | None = None
    how: str = "not fitted"

    def __init__(
        self,
        latents: Latents,
        families: Mapping[str, Any] | None = None,
        blocks: Sequence[Sequence[str]] = (),
        *,
        name: str = "product",
    ) -> None:
        super().__init__(name)
        self.latents = latents
        if families is not None and not isinstance(families, Mapping):
            raise TypeError(f"families must be a mapping from sites to families, got {families!r}")
        named = dict(families or {})
        check_blocks(latents, blocks, named)
        of = {name: tuple(block) for block in blocks for name in block}
        self.blocks = tuple(dict.fromkeys(of.get(name, (name,)) for name in latents.sites))
        self.joint = frozenset(of)
        self.keys = {site: f"factor{number}_{site}".replace(".", "_") for number, site in enumerate(latents.sites)}
        for block in self.blocks:
            for position, member in enumerate(block):
                site = latents.sites[member]
                before = [latents.sites[other] for other in block[:position]]
                factor: nn.Module
                if member not in of:
                    factor = family_for(site, named.get(member), latents.like)
                elif site.support.is_discrete:
                    sizes = [size_of(latents.sites[other]) for other in block[: position + 1]]
                    factor = ConditionalTable(site, sizes, latents.like)
                else:
                    factor = ConditionalGaussian(latents, site, before, latents.like)
                setattr(self, self.keys[member], factor)

    def factor(self, name: str) -> Any:
        """Return the module of a site."""
        return getattr(self, self.keys[name])

    def distribution(self, name: str) -> Any:
        """Return the distribution of a site, in the shape of its plates and event, without gradient.

        Raises:
            ValueError: for an unknown site, or one that is drawn given others of its block.
        """
        if name not in self.keys:
            raise ValueError(f"no latent site '{name}'; there are {list(self.keys)}")
        block = next(block for block in self.blocks if name in block)
        if block[0] != name:
            raise ValueError(f"site '{name}' is drawn given {list(block[: block.index(name)])} and has no factor alone")
        factor = self.factor(name)
        fixed = {key: value.detach() for key, value in factor.named_parameters()}
        return torch.func.functional_call(factor, fixed, ([],) if name in self.joint else ())

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        plates = self.latents.plates()
        values: dict[str, Tensor] = {}
        for block in self.blocks:
            for position, name in enumerate(block):
                factor = self.factor(name)
                with entered(self.latents.sites[name], plates):
                    before = [values[other] for other in block[:position]]
                    fn = factor(before) if name in self.joint else factor()
                    values[name] = pyro.sample(name, fn)
        return values

    def gaussian(self) -> tuple[Tensor, Tensor] | None:
        """Return mean ``(*data, D)`` and covariance of all latents; None where a factor is not Gaussian."""
        means: list[Any] = []
        covariances: list[Any] = []
        order: list[str] = []
        latents = self.latents
        for block in self.blocks:
            mean = covariance = None
            for name in block:
                factor, site = self.factor(name), latents.sites[name]
                order.append(name)
                if isinstance(factor, Normal) and factor.linear:
                    mean = latents.flatten(factor.loc[None], site)[0]
                    covariance = torch.diag_embed(latents.flatten((2 * factor.log_scale).exp()[None], site)[0])
                elif isinstance(factor, ConditionalGaussian) and is_identity(factor.transform):
                    mean, covariance = extend(mean, covariance, factor)
                else:
                    return None
            means.append(mean)
            covariances.append(covariance)
        sizes = {name: latents.elements(site) for name, site in latents.sites.items()}
        starts = dict(zip(order, itertools.accumulate([0, *(sizes[name] for name in order)]), strict=False))
        index = [starts[name] + k for name in latents.sites for k in range(sizes[name])]
        mean = torch.cat(means, -1)[..., index]
        covariance = block_diagonal(covariances)[..., index, :][..., :, index]
        return mean.detach(), covariance.detach()


def extend(mean: Tensor | None, covariance: Tensor | None, factor: ConditionalGaussian) -> tuple[Tensor, Tensor]:
    """Return the joint moments of a block's first sites and the next one, from its linear conditional."""
    data = factor.latents.data_shape
    width = factor.loc.shape[-1]
    loc = factor.loc.reshape(*data, width)
    tril = (factor.below.tril(-1) + torch.diag_embed(factor.log_diagonal.exp())).reshape(*data, width, width)
    own = tril @ tril.mT
    if factor.gain is None or mean is None or covariance is None:
        return loc, own
    gain = factor.gain.reshape(*data, width, -1)
    cross = gain @ covariance
    loc = loc + (gain @ mean[..., None])[..., 0]
    upper = torch.cat([covariance, cross.mT], -1)
    lower = torch.cat([cross, own + cross @ gain.mT], -1)
    return torch.cat([mean, loc], -1), torch.cat([upper, lower], -2)


def block_diagonal(blocks: Sequence[Any]) -> Tensor:
    size = sum(block.shape[-1] for block in blocks)
    out = blocks[0].new_zeros(*blocks[0].shape[:-2], size, size)
    start = 0
    for block in blocks:
        stop = start + block.shape[-1]
        out[..., start:stop, start:stop] = block
        start = stop
    return out


def check_blocks(latents: Latents, blocks: Sequence[Sequence[str]], named: Mapping[str, Any]) -> None:
    """Refuse invalid blocks, and families of unknown sites."""
    whole = isinstance(blocks, Iterable) and not isinstance(blocks, str)
    if not whole or any(isinstance(block, str) or not isinstance(block, Iterable) for block in blocks):
        raise ValueError(f"blocks is a list of groups of site names, such as [('z1', 'z2')], got {blocks!r}")
    names = [name for block in blocks for name in block]
    unknown = sorted({*names, *named} - set(latents.sites))
    if unknown:
        raise ValueError(f"no latent site {unknown}; the model has {sorted(latents.sites)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"site(s) {twice} are in more than one block")
    both = sorted(set(names) & set(named))
    if both:
        raise ValueError(f"site(s) {both} are in a block, whose family follows the supports: drop them from families")
    for block in blocks:
        discrete = {latents.sites[name].support.is_discrete for name in block}
        if len(discrete) > 1:
            raise ValueError(f"block {tuple(block)} mixes discrete and continuous sites, which have no joint family")
        for name in block:
            site = latents.sites[name]
            inner = [plate.name for plate in site.plates if plate not in latents.common]
            if inner:
                raise ValueError(
                    f"site '{name}' of block {tuple(block)} is in plate(s) {inner}, which a block can't cross"
                )
            if discrete == {True} and site.event_dim:
                raise ValueError(f"site '{name}' has an event dim; a block of tables takes sites with one element each")
