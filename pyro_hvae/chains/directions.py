"""The generative chain and the inference chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae.chains.arguments import batch_size
from pyro_hvae.chains.base import Chain
from pyro_hvae.chains.missing import drop_masked, zero_masked
from pyro_hvae.chains.nesting import is_chain, is_diffusion
from pyro_hvae.chains.weights import draw_global

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

    def _check_nesting(self) -> None:
        for place, (site, home, _) in enumerate(self._steps):
            kernel = self._modules[home]
            if not is_chain(kernel):
                continue
            if not hasattr(kernel, "observation"):
                raise TypeError(
                    f"kernel {site!r} is a {type(kernel).__name__}, an inference chain, and a generative chain nests "
                    "generative chains: TopDown or DenoisingChain."
                )
            if place and is_diffusion(kernel):
                raise ValueError(
                    f"kernel {site!r} is a diffusion, which starts from noise and takes no parent: make it the first."
                )

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latents from the top down."""
        return self._sites[:-1]

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
        visit: Callable[[Any], Tensor] | None = None,
    ) -> Tensor:
        """Run the program: ancestral sampling, or conditioning on x if it is not ``None``.

        Args:
            x: data (N, *event_shape), or ``None`` to sample it.
            context: covariates (N, c), passed to every kernel.
            mask: True = observed, of the shape of x or (N,).
            size: N, where x, mask and context are all ``None``.
            data_size: size of the data set of which x is a minibatch.
            visit: where a diffusion is nested in this chain, a function of it that gives the value of its site (N,
                *event_shape); the diffusion's own sites are left out.

        Returns:
            The observation (N, *event_shape), sampled, or x with masked entries filled.
        """
        size = batch_size(self.name, x, context, mask, size)
        like = x if x is not None else context if isinstance(context, Tensor) else mask
        draw_global(self)
        value: Any = None
        observation = self.observation
        with self.data_plate(size, data_size, None if like is None else like.device):
            if visit is not None:
                value = visit(self._visited())
            for site, kernel, infer in self.steps() if visit is None else self._walk(self._steps[1:]):
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

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latents from the data upwards."""
        return self._sites

    def _check_nesting(self) -> None:
        for place, (site, home, _) in enumerate(self._steps):
            kernel = self._modules[home]
            if is_chain(kernel) and hasattr(kernel, "observation"):
                raise TypeError(
                    f"kernel {site!r} is a {type(kernel).__name__}, a generative chain, and an inference chain nests "
                    "inference chains: BottomUp, Diffusion or DiscreteDiffusion."
                )
            if is_diffusion(kernel) and not 0 < place == len(self._steps) - 1:
                raise ValueError(
                    f"kernel {site!r} is a noising process, which takes the draw of the kernels before it up to noise: "
                    "make it the last of two or more."
                )

    def forward(
        self,
        x: Tensor,
        context: Any = None,
        *,
        mask: Tensor | None = None,
        data_size: int | None = None,
        visit: Callable[[Any, dict[str, Tensor]], Any] | None = None,
    ) -> dict[str, Tensor]:
        """Draw the latents given x.

        Args:
            x: data (N, *event_shape).
            context: covariates (N, c), passed to every kernel.
            mask: True = observed, of the shape of x or (N,); the first kernel sees 0 elsewhere.
            data_size: size of the data set of which x is a minibatch.
            visit: where a noising process is nested in this chain, a function of it and of the draws before it, whose
                result is returned; the process's own sites are left out.

        Returns:
            Draws by site, (..., N, *latent_shape).
        """
        size = batch_size(self.name, x, context, mask, None)
        draw_global(self)
        values: dict[str, Tensor] = {}
        value = zero_masked(x, mask)
        process = None if visit is None else self._visited()
        with self.data_plate(size, data_size, x.device):
            for site, kernel, infer in self.steps() if visit is None else self._walk(self._steps[:-1]):
                distribution = self.distribution(site, kernel, value, context)
                value = values[site] = pyro.sample(site, distribution, infer=infer)
        return values if visit is None else visit(process, values)

    def _path(self) -> list[str]:
        return ["x", *super()._path()]
