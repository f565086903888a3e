"""The generative chain and the inference chain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_hvae.chains.arguments import batch_size
from pyro_hvae.chains.base import Chain, Node, Step
from pyro_hvae.chains.missing import drop_masked, zero_masked
from pyro_hvae.chains.nesting import is_chain, is_diffusion
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

    def _observation(self) -> str | None:
        return self.observation

    def forward(
        self,
        x: Tensor | None = None,
        context: Any = None,
        *,
        mask: Tensor | None = None,
        size: int | None = None,
        data_size: int | None = None,
        visit: Callable[[TopDown], Any] | None = None,
    ) -> Any:
        """Run the program: ancestral sampling, or conditioning on x if it is not ``None``.

        Args:
            x: data (N, *event_shape), or ``None`` to sample it.
            context: covariates (N, c), passed to every kernel.
            mask: True = observed, of the shape of x or (N,).
            size: N, where x, mask and context are all ``None``.
            data_size: size of the data set of which x is a minibatch.
            visit: run this function of the chain instead, inside of the module's call, where parameters register.

        Returns:
            The observation (N, *event_shape), sampled, or x with masked entries filled.
        """
        if visit is not None:
            return visit(self)
        return self._run(None, x, context, mask=mask, size=size, data_size=data_size)

    def around(
        self, value_of: Callable[[Any], Tensor], x: Tensor | None = None, context: Any = None, **rest: Any
    ) -> Tensor:
        """Run the sites outside of the diffusion that is nested in this chain, inside of the module's call.

        Args:
            value_of: a function of the diffusion that gives the value of its site (N, *event_shape).
            x, context, rest: those of the program.
        """
        return self._run(value_of, x, context, **rest)

    def _run(
        self,
        value_of: Callable[[Any], Tensor] | None,
        x: Tensor | None,
        context: Any,
        *,
        mask: Tensor | None = None,
        size: int | None = None,
        data_size: int | None = None,
    ) -> Tensor:
        size = batch_size(self.name, x, context, mask, size)
        like = x if x is not None else context if isinstance(context, Tensor) else mask
        draw_global(self)
        value: Any = None
        observation = self.observation
        with self.data_plate(size, data_size, None if like is None else like.device):
            if value_of is not None:
                value = value_of(self._visited())
            for site, kernel, infer in self.steps() if value_of is None else self._walk(self._steps[1:]):
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

    def stepwise(
        self, x: Tensor, context: Any = None, *, mask: Tensor | None = None, data_size: int | None = None
    ) -> list[Node]:
        """List the factors p(z_T), p(z_{t-1} | z_t), ..., p(x | z_1), for particles (:class:`pyro_hvae.SMCBound`).

        Args: those of the program.

        Returns:
            ``("factor", site, draws that it depends on, log-density as a function of these)`` for each site.

        Raises:
            ValueError: without data, or for kernels with Bayesian weights, which belong to no datum.
        """
        size = batch_size(self.name, x, context, mask, None)
        self.refuse_global()
        nodes: list[Node] = []
        parents: tuple[str, ...] = ()
        observation = self.observation
        for site, kernel, _ in self.steps():
            if site == observation:
                nodes.append(("factor", site, parents, self._likelihood_of(kernel, x, context, mask, size)))
            else:
                nodes.append(("factor", site, (*parents, site), self._density_of(site, kernel, context)))
            parents = (site,)
        return nodes

    def _density_of(self, site: str, kernel: Callable[..., TorchDistribution], context: Any) -> Callable[..., Tensor]:
        def log_density(*values: Tensor) -> Tensor:
            parent, value = (None, *values)[-2:]
            distribution = self.distribution(site, kernel, parent, context)
            self._check_value(site, distribution, value)  # type: ignore[arg-type]
            return distribution.log_prob(value)

        return log_density

    def _likelihood_of(
        self, kernel: Callable[..., TorchDistribution], x: Tensor, context: Any, mask: Tensor | None, size: int
    ) -> Callable[..., Tensor]:
        if x is None:
            raise ValueError(f"{self.name!r} lists the factors of a posterior, which needs data: pass x.")

        def log_likelihood(*values: Tensor) -> Tensor:
            site = self.observation
            distribution, data = self.distribution(site, kernel, values[0] if values else None, context), x
            self._check_data(site, distribution, data, size)
            if mask is not None:
                distribution, data = drop_masked(site, distribution, mask, x, size)  # type: ignore[assignment]
            return distribution.log_prob(data)

        return log_likelihood

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
            if len(fn.event_shape) != 1 or getattr(fn.support, "base_constraint", None) is not constraints.real:
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
        guide = BottomUp(plate=self.plate_name, **kernels)
        return guide.to(x) if x.is_floating_point() else guide.to(x.device)

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
        visit: Callable[[BottomUp], Any] | None = None,
    ) -> Any:
        """Draw the latents given x.

        Args:
            x: data (N, *event_shape).
            context: covariates (N, c), passed to every kernel.
            mask: True = observed, of the shape of x or (N,); the first kernel sees 0 elsewhere (its ``masked_value``).
            data_size: size of the data set of which x is a minibatch.
            visit: run this function of the chain instead, inside of the module's call, where parameters register.

        Returns:
            Draws by site, (..., N, *latent_shape).
        """
        if visit is not None:
            return visit(self)
        return self._run(self.steps(), x, context, mask, data_size)

    def around(
        self,
        inside: Callable[[Any, dict[str, Tensor]], Any],
        x: Tensor,
        context: Any = None,
        *,
        mask: Tensor | None = None,
        data_size: int | None = None,
    ) -> Any:
        """Run the sites outside of the noising process that is nested in this chain, inside of the module's call.

        Args:
            inside: a function of the process and of the draws before it, whose result is returned.
            x, context, mask, data_size: those of the program.
        """
        process = self._visited()
        return inside(process, self._run(self._walk(self._steps[:-1]), x, context, mask, data_size))

    def _run(
        self, steps: Iterable[Step], x: Tensor, context: Any, mask: Tensor | None, data_size: int | None
    ) -> dict[str, Tensor]:
        size = batch_size(self.name, x, context, mask, None)
        draw_global(self)
        values: dict[str, Tensor] = {}
        value = zero_masked(x, mask, self._modules[self._steps[0][1]])
        with self.data_plate(size, data_size, x.device):
            for site, kernel, infer in steps:
                distribution = self.distribution(site, kernel, value, context)
                value = values[site] = pyro.sample(site, distribution, infer=infer)
        return values

    def stepwise(
        self, x: Tensor, context: Any = None, *, mask: Tensor | None = None, data_size: int | None = None
    ) -> list[Node]:
        """List the draws q(z_1 | x), q(z_2 | z_1), ..., for particles (:class:`pyro_hvae.SMCBound`).

        Args: those of the program.

        Returns:
            ``("draw", site, draws that it depends on, distribution as a function of these)`` for each site.
        """
        batch_size(self.name, x, context, mask, None)
        self.refuse_global()
        first = zero_masked(x, mask, self._modules[self._steps[0][1]])
        nodes: list[Node] = []
        parents: tuple[str, ...] = ()
        for site, kernel, _ in self.steps():
            nodes.append(("draw", site, parents, self._distribution_of(site, kernel, first, context)))
            parents = (site,)
        return nodes

    def _distribution_of(
        self, site: str, kernel: Callable[..., TorchDistribution], first: Tensor, context: Any
    ) -> Callable[..., TorchDistribution]:
        return lambda *values: self.distribution(site, kernel, values[0] if values else first, context)

    def _path(self) -> list[str]:
        return ["x", *super()._path()]
