"""Chains as kernels of other chains.

A generative chain is a kernel of its observation: in the place of a kernel it adds its own latents, and its observation
takes the name of the site.  An inference chain, or a noising process, does the same above the site before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["is_chain", "is_diffusion", "nested_steps", "sites_of"]


def is_chain(kernel: Any) -> bool:
    """Whether a kernel is a chain itself: it yields steps, and names its latents."""
    return callable(getattr(kernel, "steps", None)) and hasattr(kernel, "latents")


def is_diffusion(kernel: Any) -> bool:
    """Whether a kernel is a chain of layers, or of continuous time, of which single layers can be drawn."""
    return is_chain(kernel) and hasattr(kernel, "num_layers")


def nested_steps(site: str, kernel: Any) -> Iterator[Any]:
    """Yield the steps of a nested chain; the observation of a generative one is named ``site``."""
    observation = getattr(kernel, "observation", None)
    for name, inner, infer in kernel.steps():
        yield site if name == observation else name, inner, infer


def sites_of(kernels: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the sites of kernels, of which some may be chains.

    Raises:
        ValueError: for a name that two sites have.
    """
    sites: list[str] = []
    for site, kernel in kernels.items():
        if hasattr(kernel, "observation"):
            sites += [*kernel.latents, site]
        elif is_chain(kernel):
            sites += kernel.latents
        else:
            sites.append(site)
    twice = sorted({site for site in sites if sites.count(site) > 1})
    if twice:
        raise ValueError(
            f"the sites {twice} are in the chain and in a chain that is nested in it: name those of the outer chain "
            "differently."
        )
    return tuple(sites)
