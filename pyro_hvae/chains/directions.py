"""The generative chain and the inference chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_hvae.chains.arguments import batch_size
from pyro_hvae.chains.base import Chain
from pyro_hvae.chains.missing import drop_masked, zero_masked
from pyro_hvae.chains.weights import draw_global
from pyro_hvae.kernels import Gaussian
from pyro_hvae.nn import MLP

__all__ = ["BottomUp", "TopDown"]


class TopDown(Chain):
    """The generative chain p(z_T) prod_t p(z_{t-1} | z_t) p(x | z_1) (seed eq. 15).

    Args:
        name: root of the parameters' names.
        plate: name of the plate over the data.
        **kernels: kernels in generative order; the last is the observation's. The first is called with parent
            ``None``.

    Raises:
        ValueError: for site names in use, data or sizes that don't fit.

    Example:
        >>> import torch
        >>> from pyro_hvae.kernels import Bernoulli, Gaussian, StandardNormal
        >>> _ = torch.manual_seed(0)
        >>> net, decoder = nn.Linear(2, 2 * 3), nn.Linear(3, 5)
        >>> model = TopDown(z2=StandardNormal(2), z1=Gaussian(net), x=Bernoulli(decoder))
        >>> model(size=4).shape
        torch.Size([4, 5])
        >>> model.latents, model.observation
        (('z2', 'z1'), 'x')
    """

    def __init__(self, *, name: str = "model", plate: str = "data", **kernels: nn.Module) -> None:
        super().__init__(name, plate, kernels)

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latents from the top down."""
        return tuple(site for site, *_ in self._steps[:-1])

    @property
    def observation(self) -> str:
        """Name of the observed site."""
        return self._steps[-1][0]

    def forward(
        self,
        x: Tensor | None = None,
        context: Any = None,
        *,
        mask: Tensor | None = None,
        size: int | None = None,
        data_size: int | None = None,
    ) -> Tensor:
        """Run the program: ancestral sampling, or conditioning on x if it is not ``None``.

        Args:
            x: data (N, *event_shape), or ``None`` to sample it.
            context: covariates (N, c), passed to every kernel.
            mask: True = observed, of the shape of x or (N,).
            size: N, where x, mask and context are all ``None``.
            data_size: size of the data set of which x is a minibatch.

        Returns:
            The observation (N, *event_shape), sampled, or x with masked entries filled.
        """
        size = batch_size(self.name, x, context, mask, size)
        like = x if x is not None else context if isinstance(context, Tensor) else mask
        draw_global(self)
        value: Any = None
        observation = self.observation
        with self.data_plate(size, data_size, None if like is None else like.device):
            for site, kernel, infer in self.steps():
                distribution = self.distribution(site, kernel, value, context)
                observed = site == observation
                if observed:
                    if x is not None:
                        self._check_data(site, distribution, x, size)
                    if mask is not None:
                        distribution, x = drop_masked(site, distribution, mask, x, size)
                value = pyro.sample(site, distribution, obs=x if observed else None, infer=infer)
                if not observed:
                    self._check_value(site, distribution, value)
        return value

    def amortized(
        self, x: Tensor, context: Tensor | None = None, *, hidden: Sequence[int], **kwargs: Any
    ) -> BottomUp | None:
        """Return the inverse chain, with a Gaussian kernel of each latent; None where latents are no real vectors.

        Args:
            x: example data (N, *event_shape).
            context: example covariates (N, c).
            hidden: widths of the hidden layers of each network.
            **kwargs: the other arguments of the model; they do not matter here.
        """
        with torch.random.fork_rng(devices=[]), torch.no_grad(), poutine.block():
            trace = poutine.trace(self.forward).get_trace(x[:1], context if context is None else context[:1])
        sites = {name: trace.nodes[name]["fn"] for name in self.latents}
        for fn in sites.values():
            if len(fn.event_shape) != 1 or not isinstance(fn.support, type(constraints.real_vector)):
                return None
        extra = 0 if context is None else context.shape[-1]
        if x.dim() > 2 and extra:
            return None
        kernels: dict[str, Any] = {}
        before = x[0].numel()
        for name, fn in reversed(sites.items()):
            net: nn.Module = MLP(before + extra, 2 * fn.event_shape[0], hidden, xavier=True)
            if not kernels and x.dim() > 2:
                net = nn.Sequential(nn.Flatten(1 - x.dim()), net)
            kernels[name], before = Gaussian(net), fn.event_shape[0]
        return BottomUp(plate=self.plate_name, **kernels).to(x)

    def _check_data(self, site: str, distribution: TorchDistribution, x: Tensor, size: int) -> None:
        if distribution.event_shape != x.shape[1:]:
            raise ValueError(
                f"kernel {site!r} of {self.name!r} gives events of shape {tuple(distribution.event_shape)}, but a "
                f"datum has shape {tuple(x.shape[1:])} (data {tuple(x.shape)}). Reshape the data, or set "
                "the width and event_dim of the kernel."
            )
        if distribution.batch_shape and distribution.batch_shape[-1] not in (1, size):
            raise ValueError(
                f"kernel {site!r} of {self.name!r} gives a batch of shape {tuple(distribution.batch_shape)} for "
                f"{size} data: its last batch dim must be the data. Set event_dim of the kernel."
            )

    def _check_value(self, site: str, distribution: TorchDistribution, value: Tensor) -> None:
        event = distribution.event_shape
        if event and value.shape[-len(event) :] != event:
            raise ValueError(
                f"site {site!r} holds a value of shape {tuple(value.shape)}, but kernel {site!r} of "
                f"{self.name!r} gives events of shape {tuple(event)}: the guide's kernel for {site!r} has "
                "another width."
            )


class BottomUp(Chain):
    """The inference chain q(z_1 | x) prod_t q(z_t | z_{t-1}) (seed eq. 17).

    Args:
        name: root of the parameters' names.
        plate: name of the plate over the data, the model's.
        **kernels: kernels from the data upwards; the first is called with x as parent.

    Example:
        >>> import torch
        >>> from pyro_hvae.kernels import Gaussian
        >>> _ = torch.manual_seed(0)
        >>> guide = BottomUp(z1=Gaussian(nn.Linear(5, 2 * 3)), z2=Gaussian(nn.Linear(3, 2 * 2)))
        >>> {site: tuple(z.shape) for site, z in guide(torch.zeros(4, 5)).items()}
        {'z1': (4, 3), 'z2': (4, 2)}
    """

    def __init__(self, *, name: str = "guide", plate: str = "data", **kernels: nn.Module) -> None:
        super().__init__(name, plate, kernels)

    def forward(
        self, x: Tensor, context: Any = None, *, mask: Tensor | None = None, data_size: int | None = None
    ) -> dict[str, Tensor]:
        """Draw the latents given x.

        Args:
            x: data (N, *event_shape).
            context: covariates (N, c), passed to every kernel.
            mask: True = observed, of the shape of x or (N,); the first kernel sees 0 elsewhere.
            data_size: size of the data set of which x is a minibatch.

        Returns:
            Draws by site, (..., N, *latent_shape).
        """
        size = batch_size(self.name, x, context, mask, None)
        draw_global(self)
        values: dict[str, Tensor] = {}
        value = zero_masked(x, mask)
        with self.data_plate(size, data_size, x.device):
            for site, kernel, infer in self.steps():
                distribution = self.distribution(site, kernel, value, context)
                value = values[site] = pyro.sample(site, distribution, infer=infer)
        return values

    def _path(self) -> list[str]:
        return ["x", *super()._path()]
