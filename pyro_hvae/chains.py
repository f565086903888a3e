r"""Markov chains of kernels as Pyro programs: the generative chain and the inference chain against it.

With observation x, latents z_1, ..., z_T and kernels as in :mod:`pyro_hvae.kernels`, the joint of a Markovian
hierarchical VAE (seed eq. 14, 15) is :class:`TopDown`,

.. math::
    p_\theta(x, z_1, \dots, z_T) = p(z_T)\; p_\theta(x \mid z_1) \prod_{t=2}^T p_\theta(z_{t-1} \mid z_t),

and its approximate posterior (seed eq. 16, 17) is :class:`BottomUp`,

.. math::
    q_\phi(z_1, \dots, z_T \mid x) = q_\phi(z_1 \mid x) \prod_{t=2}^T q_\phi(z_t \mid z_{t-1}).

A VAE is the case T = 1. A posterior that runs top-down is :class:`pyro_hvae.ladder.Ladder`. Calling a chain
runs a Pyro program: one ``pyro.sample`` a kernel, named as the keyword that gave it, all inside one plate at
``dim=-1`` over the data, so ``poutine.condition``, ``Predictive``, ``NUTS`` and every estimator of Pyro apply.

**Context.** ``context`` is passed to every kernel as its second argument; kernels are called with the parent
alone where there is none. Pyro's own handlers take a keyword of that name for themselves, so give it by
position where they wrap a program: ``svi.step(x, context)``, ``poutine.condition(model, data)(None,
context)``.

**Missing data.** ``mask`` is boolean, True where observed, of the shape of x, or (N,) for whole data. A
masked entry is dropped from the likelihood (its log-density counts as 0) and the guide is shown 0 in its
place; what stood there, NaN included, reaches neither values nor gradients. Entries can be masked one by one
only where the likelihood factorises over them; others take a mask of shape (N,).

**Minibatches.** With ``data_size`` M and N data given, the plate stands for M data and Pyro scales every site
in it by M/N.

**Bayesian weights.** ``PyroSample`` attributes of kernels (and of ``PyroModule`` networks within) are drawn
before the plate is entered: they are global latents of the program, named as the parameter would be
(``model.z1.weight``).

**Names.** Parameters stand in Pyro's store as ``<name>.<site>...``; two chains trained in one process need
two names. A kernel given for two sites is one child, registered under the first; tensors shared between
kernels appear once in ``state_dict()``.

What is not enforced: finiteness and support of the data (a device synchronisation a call; the trace readers
do it once), and that networks keep data apart: batch normalisation couples the data of a plate, so that
densities per datum depend on the rest of the minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_hvae.missing import masked, shown

__all__ = ["BottomUp", "Chain", "TopDown"]

Step = tuple[str, Callable[..., TorchDistribution], "dict[str, Any] | None"]


class Chain(PyroModule):
    """An ordered set of named kernels over one plate of data. Base of the chains; defines no program itself.

    Args:
        name: root of the parameters' names in Pyro's store.
        plate: name of the plate over the data.
        kernels: kernels by site name, in the order of sampling.

    Raises:
        ValueError: for no kernel at all, or a site name that the module or the plate already uses.
        TypeError: for a kernel that is not a module.
    """

    def __init__(self, name: str, plate: str, kernels: Mapping[str, nn.Module]) -> None:
        super().__init__(name)
        if not kernels:
            raise ValueError(f"{type(self).__name__} needs at least one kernel, given as site=kernel.")
        self.plate_name = plate
        homes: dict[int, str] = {}
        steps = []
        for site, kernel in kernels.items():
            if not isinstance(kernel, nn.Module):
                raise TypeError(
                    f"kernel {site!r} must be a torch.nn.Module with forward(parent, context=None) -> "
                    f"distribution, got {type(kernel).__name__}."
                )
            if site == plate or hasattr(self, site):
                what = "the plate" if site == plate else f"an attribute of {type(self).__name__}"
                raise ValueError(f"a site can't be called {site!r}: that is the name of {what}. Choose another.")
            home = homes.setdefault(id(kernel), site)
            if home == site:
                setattr(self, site, kernel)
            else:  # a second registration would double its tensors and rename them
                self.__dict__[site] = kernel
            steps.append((site, home, getattr(kernel, "infer", None)))
        self._steps = tuple(steps)
        self._indices: Tensor | None = None
        self.register_state_dict_post_hook(_drop_shared)
        self.register_load_state_dict_pre_hook(_fill_shared)

    @property
    def name(self) -> str:
        """Root of the parameters' names."""
        return self._pyro_name

    @property
    def kernels(self) -> Mapping[str, nn.Module]:
        """Kernels by site name in the order of sampling (read only)."""
        return MappingProxyType({site: self._modules[home] for site, home, _ in self._steps})

    def steps(self) -> Iterator[Step]:
        """Yield (site name, kernel, ``infer``) in the order of sampling, registering kernels on the way.

        A subclass may yield kernels that are made on the fly.
        """
        modules = self._modules
        for site, home, infer in self._steps:
            kernel = modules[home]
            if not isinstance(kernel, PyroModule):  # Reading a plain module as an attribute is what registers it.
                kernel = getattr(self, home)
            yield site, kernel, infer

    def call(self, site: str, kernel: Callable[..., Any], parent: Tensor | None, context: Any) -> Any:
        """Call a kernel; what goes wrong inside is told with the kernel's name and shapes."""
        try:
            return kernel(parent) if context is None else kernel(parent, context)
        except (RuntimeError, ValueError) as error:
            message = self._misfit(site, kernel, parent, context, error)
            if message is None:
                raise
            raise ValueError(message) from error

    def distribution(
        self, site: str, kernel: Callable[..., TorchDistribution], parent: Tensor | None, context: Any
    ) -> TorchDistribution:
        """The distribution of a site."""
        found = self.call(site, kernel, parent, context)
        if not isinstance(found, TorchDistributionMixin):
            raise TypeError(
                f"kernel {site!r} of {self.name!r} must return a Pyro distribution, got "
                f"{type(found).__name__}. Wrap a module that gives torch distributions (a zuko flow) in "
                "kernels.Flow."
            )
        return found

    def _misfit(self, site: str, kernel: Any, parent: Any, context: Any, error: Exception) -> str | None:
        said = str(error)
        if isinstance(error, RuntimeError) and not any(
            word in said.lower() for word in ("shape", "size", "dtype", "dimension", "unflatten")
        ):
            return None
        text = f"kernel {site!r} of {self.name!r} ({type(kernel).__name__}) failed"
        if isinstance(parent, Tensor):
            text += f" on a parent of shape {tuple(parent.shape)} and {parent.dtype}"
        if isinstance(context, Tensor):
            text += f" with a context of shape {tuple(context.shape)} and {context.dtype}"
        widths = [module for module in getattr(kernel, "modules", list)() if hasattr(module, "in_features")]
        if widths:
            expected = widths[0].in_features
            joined = (
                f" ({parent.shape[-1]} + {context.shape[-1]} of the context given)"
                if (isinstance(parent, Tensor) and isinstance(context, Tensor) and context.dim() and parent.dim())
                else ""
            )
            text += f"; its first layer expects a last dim of {expected}{joined}"
        return f"{text}: {said}"

    def data_plate(self, size: int, data_size: int | None, device: torch.device | None) -> pyro.plate:
        """The plate over N data that stand for ``data_size``."""
        if data_size is None:
            return pyro.plate(self.plate_name, size, dim=-1)
        if data_size < size:
            raise ValueError(f"data_size is the size of the whole data set, got {data_size} for a batch of {size}.")
        indices = self._indices
        if indices is None or indices.shape[0] != size or indices.device != device:
            indices = torch.arange(size, device=device)
            self._indices = indices
        return pyro.plate(self.plate_name, data_size, subsample=indices, dim=-1)

    def __repr__(self) -> str:
        path = " -> ".join(self._path())
        head = f"{type(self).__name__}({path}; name={self.name!r}, plate={self.plate_name!r})"
        lines = [f"({site}): {kernel!r}".replace("\n", "\n  ") for site, kernel in self.kernels.items()]
        return "\n  ".join([head, *lines])

    def _path(self) -> list[str]:
        return [site for site, *_ in self._steps]


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
        """Run the program: ancestral sampling, or conditioning on x where it is given.

        Args:
            x: data (N, *event_shape), or ``None`` to sample it.
            context: covariates (N, c), passed to every kernel.
            mask: True = observed, of the shape of x or (N,).
            size: N, where neither x, mask nor context tells it.
            data_size: size of the data set of which x is a minibatch.

        Returns:
            The observation (N, *event_shape), sampled or given (with masked entries filled).
        """
        size = batch_size(self.name, x, context, mask, size)
        like = x if x is not None else context if isinstance(context, Tensor) else mask
        draw_global(self)
        value: Any = None
        observation = self.observation
        with self.data_plate(size, data_size, None if like is None else like.device):
            for site, kernel, infer in self.steps():
                found = self.distribution(site, kernel, value, context)
                observed = site == observation
                if observed:
                    if x is not None:
                        self._check_data(site, found, x, size)
                    if mask is not None:
                        found, x = masked(site, found, mask, x, size)
                value = pyro.sample(site, found, obs=x if observed else None, infer=infer)
                if not observed:
                    self._check_value(site, found, value)
        return value

    def _check_data(self, site: str, found: TorchDistribution, x: Tensor, size: int) -> None:
        if found.event_shape != x.shape[1:]:
            raise ValueError(
                f"kernel {site!r} of {self.name!r} gives events of shape {tuple(found.event_shape)}, but a "
                f"datum has shape {tuple(x.shape[1:])} (data {tuple(x.shape)}). Reshape the data, or set "
                "the width and event_dim of the kernel."
            )
        if found.batch_shape and found.batch_shape[-1] not in (1, size):
            raise ValueError(
                f"kernel {site!r} of {self.name!r} gives a batch of shape {tuple(found.batch_shape)} for "
                f"{size} data: its last batch dim must be the data. Set event_dim of the kernel."
            )

    def _check_value(self, site: str, found: TorchDistribution, value: Tensor) -> None:
        event = found.event_shape
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
        value = shown(x, mask)
        with self.data_plate(size, data_size, x.device):
            for site, kernel, infer in self.steps():
                found = self.distribution(site, kernel, value, context)
                value = values[site] = pyro.sample(site, found, infer=infer)
        return values

    def _path(self) -> list[str]:
        return ["x", *super()._path()]


def batch_size(name: str, x: Any, context: Any, mask: Any, size: int | None) -> int:
    """N, from whichever of the arguments tells it; all that do must agree."""
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"{name!r} takes data as a torch.Tensor, got {type(x).__name__}; convert with torch.as_tensor.")
    found = size
    for what, given in (("x", x), ("context", context), ("mask", mask)):
        if not isinstance(given, Tensor):
            continue
        if not given.dim():
            raise ValueError(f"{what} must have the data as its first dim, got a 0-dim tensor.")
        if found is not None and given.shape[0] != found:
            raise ValueError(
                f"{what} has {given.shape[0]} rows where {found} are expected: x, context, mask and size "
                "must agree on the number of data."
            )
        found = given.shape[0]
    if found is None:
        raise ValueError(f"{name!r} can't tell how many data to sample: pass size=, or x, context or mask with N rows.")
    if found < 1:
        raise ValueError(f"{name!r} needs at least one datum, got {found}.")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean (True = observed), got {mask.dtype}; use mask.bool().")
        if x is not None and mask.shape not in (x.shape, x.shape[:1]):
            raise ValueError(
                f"mask must have the shape of x {tuple(x.shape)} or {tuple(x.shape[:1])}, got {tuple(mask.shape)}."
            )
    return found


def draw_global(module: PyroModule) -> None:
    """Draw the ``PyroSample`` attributes of the kernels, once and outside the data plate."""
    for child in module._modules.values():
        if isinstance(child, PyroModule):
            for name in child._pyro_samples:
                getattr(child, name)
            draw_global(child)


def has_global(module: PyroModule) -> bool:
    """Whether :func:`draw_global` would draw anything."""
    return any(
        isinstance(child, PyroModule) and (bool(child._pyro_samples) or has_global(child))
        for child in module._modules.values()
    )


def _shared(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of tensors met before under another name, with that name."""
    first: dict[int, str] = {}
    for members in (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in members:
            home = first.setdefault(id(tensor), name)
            if home != name:
                yield name, home


def _drop_shared(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, _ in _shared(module):
        state.pop(prefix + name, None)


def _fill_shared(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, home in _shared(module):
        if prefix + home in state:
            state.setdefault(prefix + name, state[prefix + home])
