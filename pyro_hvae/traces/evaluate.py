"""Densities of a pair at many draws, at given draws, and draws from the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor
from torch.distributions import Independent
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_hvae.traces.reading import Reading
from pyro_hvae.traces.running import Program, execute, isolated, read, run_pair, structure
from pyro_hvae.traces.structure import sample_sites
from pyro_hvae.traces.validation import check_particles

__all__ = ["Evaluator", "given", "log_weights", "prior_guide", "simulate"]


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""Log-weights :math:`\log p(x_n, z_{kn}) - \log q(z_{kn}|x_n)` of ``num_particles`` draws, without gradient.

    Args:
        num_particles: K >= 1.
        chunk_size: how many particles run at once; all of them by default.  Memory grows with it, the result
            does not depend on it but for the order of the random numbers.

    Returns:
        Tensor of shape ``(K, *plates)`` in nats.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> log_weights(model, model, num_particles=3)
        tensor([0., 0., 0.])
    """
    check_particles(num_particles)
    size = num_particles if chunk_size is None else chunk_size
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    chunks = []
    with torch.no_grad():
        for start in range(0, num_particles, size):
            count = min(size, num_particles - start)
            chunks.append(read(model, guide, args, kwargs, num_particles=count).log_weights)
    return torch.cat(chunks) if len(chunks) > 1 else chunks[0]


class Evaluator:
    """Both programs at given draws, again and again.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.
        num_particles: K, how many draws run at once.

    Attributes:
        structure: what the pair consists of.
        template: a trace of the guide, whose sites have the distributions that the draws must fit.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        num_particles: int = 1,
    ) -> None:
        check_particles(num_particles)
        self.model, self.guide, self.args = model, guide, args
        self.kwargs = {} if kwargs is None else dict(kwargs)
        self.num_particles = num_particles
        self.structure = structure(model, guide, args, self.kwargs)
        with isolated(model, guide), torch.no_grad(), pyro.validation_enabled(False):
            self.template = run_pair(model, guide, args, self.kwargs)[1]

    def __call__(self, values: Mapping[str, Tensor]) -> Reading:
        """Read the pair at ``values``: for each drawn site K values on the leftmost dim, or one without it if K = 1.

        A site that the guide computes from others, as AutoGuides do, may be left out, and is computed.

        Raises:
            ValueError: if a site that the guide draws has no value, or another number of them.
        """
        computed = {n for n in self.structure.drawn if self.structure.sites[n].guide_distribution == "Delta"}
        missing = sorted(set(self.structure.drawn) - set(values) - computed)
        if missing:
            raise ValueError(f"no value was given for site(s) {missing} that the guide draws; given: {sorted(values)}")
        draws = self.template.copy()
        for name in self.structure.drawn:
            if name not in values:
                draws.remove_node(name)
                continue
            node = draws.nodes[name]
            draws.nodes[name] = {**node, "value": self.place(name, values[name])}
        return execute(
            self.model, self.guide, self.args, self.kwargs, self.structure, self.num_particles, frozenset(), draws
        )

    def place(self, name: str, value: Tensor) -> Tensor:
        """A value with its draws left of every plate."""
        shape = self.template.nodes[name]["fn"].shape()
        if self.num_particles == 1:
            return value.reshape(shape)
        if value.shape[0] != self.num_particles:
            raise ValueError(
                f"site '{name}' comes with {value.shape[0]} draws where {self.num_particles} are evaluated"
            )
        event_dim = self.template.nodes[name]["fn"].event_dim
        padding = self.structure.max_plate_nesting + event_dim - len(shape)
        return value.reshape(self.num_particles, *(1,) * padding, *shape)


def given(
    model: Program,
    guide: Program,
    values: Mapping[str, Tensor],
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Reading:
    """Read a pair at given draws instead of the guide's own.

    Args:
        values: for every site that the guide draws, S values on the leftmost dimension, or one without it.

    Raises:
        ValueError: if a drawn site has no value, or their numbers of draws differ.
    """
    once = Evaluator(model, guide, args, kwargs)
    counts = {
        len(values[name]) if values[name].dim() > len(once.template.nodes[name]["fn"].shape()) else 1
        for name in once.structure.drawn
        if name in values
    }
    if len(counts) > 1:
        raise ValueError(f"sites come with different numbers of draws: {sorted(counts)}")
    once.num_particles = counts.pop() if counts else 1
    return once(values)


def prior_guide(model: Program) -> Program:
    """The model's own latents, drawn as if nothing was observed, as a guide.

    Raises:
        ValueError: when it is run, for a latent that can't be drawn, as under an improper prior.
    """
    return _Prior()(model)


class _Prior(BlockMessenger):
    """Hide what is observed, and say which latent the prior can't draw."""

    def __init__(self) -> None:
        super().__init__(hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"])
        self.last: Any = None

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        if msg["type"] == "sample" and not msg["is_observed"]:
            self.last = msg["name"], msg["fn"]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        last, self.last = self.last, None
        super().__exit__(kind, error, trace)
        if isinstance(error, NotImplementedError) and last is not None:
            name, fn = last
            while isinstance(fn, Independent):
                fn = fn.base_dist
            raise ValueError(
                f"site '{name}' can't be drawn from its prior ({type(fn).__name__}): {str(error).splitlines()[0]}. "
                "Draw from a guide instead, or give the site a proper prior"
            ) from error


def simulate(
    model: Program, args: tuple = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], tuple, dict[str, Any]]:
    """An exact joint draw of latents and data: the model with its observations released.

    Returns:
        The latent draws by site, and the arguments with the simulated tensors in the place of the observed ones.

    Raises:
        ValueError: if no argument is an observed tensor of the model, so that nobody could be shown what it drew.
    """
    kwargs = {} if kwargs is None else dict(kwargs)
    with torch.no_grad():
        with isolated(model):
            seen = poutine.trace(model).get_trace(*args, **kwargs)
        observed = {id(s["value"]): s["name"] for s in sample_sites(seen) if s["is_observed"]}
        drawn = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    values = {site["name"]: site["value"].detach() for site in sample_sites(drawn)}
    leaves, spec = tree_flatten((args, kwargs))
    if not any(id(leaf) in observed for leaf in leaves):
        raise ValueError(
            f"no argument is an observed tensor of the model (observed sites: {sorted(observed.values())}), so the "
            "guide can't be shown what the model drew; pass the data as an argument"
        )
    leaves = [values[observed[id(leaf)]] if id(leaf) in observed else leaf for leaf in leaves]
    new_args, new_kwargs = tree_unflatten(leaves, spec)
    return {name: v for name, v in values.items() if name not in observed.values()}, new_args, new_kwargs
