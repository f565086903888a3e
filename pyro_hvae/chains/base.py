"""Base of the chains: named kernels, one plate, errors that name the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_hvae.arguments import ContextError, check_context
from pyro_hvae.chains.arguments import check_data_size
from pyro_hvae.chains.frames import TableData, read_table
from pyro_hvae.chains.nesting import is_chain, is_diffusion, nested_steps, sites_of
from pyro_hvae.chains.weights import drop_shared, fill_shared, has_global
from pyro_hvae.tables import Schema

__all__ = ["Chain", "Node", "Step"]

Step = tuple[str, Callable[..., TorchDistribution], "dict[str, Any] | None"]

Node = tuple[str, str, tuple[str, ...], Callable[..., Any]]
"""A site that particles step through: its kind, its name, the values that it depends on, and a function of these.

The function of a ``"draw"`` returns a distribution, of a ``"factor"`` a log-density, of a ``"value"`` a tensor.
"""


class Chain(PyroModule):
    """An ordered set of named kernels over one plate of data. Base of the chains; defines no program itself.

    Args:
        name: root of the parameters' names in Pyro's store.
        plate: name of the plate over the data.
        kernels: kernels by site name, in the order of sampling.

    Attributes:
        schema: description of the columns of a table, for chains over tables; else None.

    Raises:
        ValueError: for no kernel at all, or a site name that the module or the plate already uses.
        TypeError: for a kernel that is not a module.
    """

    schema: Schema | None = None

    def __init__(self, name: str, plate: str, kernels: Mapping[str, nn.Module]) -> None:
        super().__init__(name)
        if not kernels:
            raise ValueError(f"{type(self).__name__} needs at least one kernel: write site=kernel.")
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
        self._sites = sites_of(kernels)
        self._check_nesting()
        self._indices: Tensor | None = None
        self.register_state_dict_post_hook(drop_shared)
        self.register_load_state_dict_pre_hook(fill_shared)

    @property
    def name(self) -> str:
        """Root of the parameters' names."""
        return self._pyro_name

    def read(self, data: Any) -> TableData | None:
        """Convert a DataFrame or a :class:`~pyro_hvae.tables.Table` to tensors; None for other data.

        Raises:
            TypeError: for a frame where the chain has no ``schema``.
            ValueError: for a frame with other columns or values than the schema has.
        """
        return read_table(self, self.schema, data, self.plate_name, self._observation())

    def _observation(self) -> str | None:
        return None

    @property
    def kernels(self) -> Mapping[str, nn.Module]:
        """Kernels by site name in the order of sampling (read only)."""
        return MappingProxyType({site: self._modules[home] for site, home, _ in self._steps})

    def steps(self) -> Iterator[Step]:
        """Yield (site name, kernel, ``infer``) in the order of sampling, registering kernels on the way.

        The steps of a chain that is nested here are among them.  A subclass may yield kernels that are made on the fly.
        """
        yield from self._walk(self._steps)

    def _walk(self, entries: Iterable[tuple[str, str, Any]]) -> Iterator[Step]:
        modules = self._modules
        for site, home, infer in entries:
            kernel = modules[home]
            if is_chain(kernel):
                yield from nested_steps(site, kernel)
                continue
            if not isinstance(kernel, PyroModule):  # Reading a plain module as an attribute is what registers it.
                kernel = getattr(self, home)
            yield site, kernel, infer

    @property
    def nested(self) -> Any:
        """The diffusion that is nested in this chain, or ``None``."""
        found = [home for _, home, _ in self._steps if is_diffusion(self._modules[home])]
        return getattr(self, found[0]) if found else None

    def _check_nesting(self) -> None:
        """Refuse nested chains in a place where they can't be."""

    def _visited(self) -> Any:
        diffusion = self.nested
        if diffusion is None:
            raise ValueError(f"no diffusion is nested in {self.name!r}, so nothing can be run around it.")
        return diffusion

    def call(self, site: str, kernel: Callable[..., Any], parent: Tensor | None, context: Any) -> Any:
        """Call a kernel; an error inside it is raised with the kernel's name and shapes."""
        try:
            return kernel(parent) if context is None else kernel(parent, context)
        except ContextError:
            raise
        except (RuntimeError, ValueError) as error:
            self._check_context(context)
            message = self._misfit(site, kernel, parent, context, error)
            if message is None:
                raise
            raise ValueError(message) from error

    def distribution(
        self, site: str, kernel: Callable[..., TorchDistribution], parent: Tensor | None, context: Any
    ) -> TorchDistribution:
        """Return the distribution of a site."""
        result = self.call(site, kernel, parent, context)
        if not isinstance(result, TorchDistributionMixin):
            raise TypeError(
                f"kernel {site!r} of {self.name!r} must return a Pyro distribution, got "
                f"{type(result).__name__}. Wrap a module that gives torch distributions (a zuko flow) in "
                "kernels.Flow."
            )
        return result

    def refuse_global(self, why: str | None = None) -> None:
        """Refuse kernels with Bayesian weights, where sites are listed one by one for each datum."""
        if has_global(self):
            default = "shares them among all data, so its draws can't be resampled for each. Use IWELBO or TraceELBO."
            raise ValueError(f"{self.name!r} has Bayesian weights (PyroSample), and {why or default}")

    def _check_context(self, context: Any) -> None:
        """Refuse a context that does not fit what ready-made chains were built for, after a kernel has failed.

        Raises:
            ContextError: as in :func:`~pyro_hvae.arguments.check_context`.
        """
        width = (getattr(self, "factory", None) or {}).get("args", {}).get("context_dim")
        if width is not None and (context is None or isinstance(context, Tensor)):
            check_context(repr(self.name), context, width)

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
                f" ({parent.shape[-1]} + {context.shape[-1]} of the context)"
                if (isinstance(parent, Tensor) and isinstance(context, Tensor) and context.dim() and parent.dim())
                else ""
            )
            text += f"; its first layer expects a last dim of {expected}{joined}"
            if context is None and isinstance(parent, Tensor) and parent.dim() and parent.shape[-1] < expected:
                text += f" (with a context= of width {expected - parent.shape[-1]}, if it was built for one)"
        return f"{text}: {said}"

    def data_plate(self, size: int, data_size: int | None, device: torch.device | None) -> pyro.plate:
        """Return the plate over N data of a data set of ``data_size``."""
        if data_size is None:
            return pyro.plate(self.plate_name, size, dim=-1)
        check_data_size(data_size, size)
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
