"""Weights of kernels: draw Bayesian weights once, and save tensors that kernels share once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro.nn import PyroModule
from torch import nn

__all__ = ["draw_global", "drop_shared", "fill_shared", "has_global", "register"]


def draw_global(module: PyroModule) -> None:
    """Draw the ``PyroSample`` attributes of the kernels, once and outside the data plate."""
    for child in module._modules.values():
        if isinstance(child, PyroModule):
            for name in child._pyro_samples:
                getattr(child, name)
            draw_global(child)


def register(module: PyroModule) -> None:
    """Read all parameters of a module, which is what registers them, where kernels run after the module's call."""
    if not module._pyro_context.active:
        return
    for name in (*module._parameters, *module._pyro_params):
        getattr(module, name)
    for name, child in module._modules.items():
        if isinstance(child, PyroModule):
            register(child)
        else:
            getattr(module, name)


def has_global(module: PyroModule) -> bool:
    """Return whether a module has ``PyroSample`` attributes in its kernels."""
    return any(
        isinstance(child, PyroModule) and (bool(child._pyro_samples) or has_global(child))
        for child in module._modules.values()
    )


def _shared(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each further name of a tensor with its first name."""
    first: dict[int, str] = {}
    for members in (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in members:
            home = first.setdefault(id(tensor), name)
            if home != name:
                yield name, home


def drop_shared(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Remove the further names of shared tensors from a state dict (a hook of ``state_dict``)."""
    for name, _ in _shared(module):
        state.pop(prefix + name, None)


def fill_shared(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the further names of shared tensors to a state dict (a hook of ``load_state_dict``)."""
    for name, home in _shared(module):
        if prefix + home in state:
            state.setdefault(prefix + name, state[prefix + home])
