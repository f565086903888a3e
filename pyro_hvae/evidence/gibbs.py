r"""Gibbs moves of discrete latents: each entry is drawn from its conditional under the tempered density.

With all other latents held, the value of an entry i of a discrete site is drawn by enumeration from

.. math:: f_\beta(z_i = v\mid z_{-i}, u) = \frac{f_\beta(v, z_{-i}, u)}{\sum_{v'} f_\beta(v', z_{-i}, u)},

which leaves :math:`f_\beta` invariant.  Entries are drawn one after another, but for those along plates whose indices
are conditionally independent given all else: these are drawn together, each from its own terms of the densities.
Whether a plate is such a one is tried on draws of the base: the terms of an index must not change with the values at
any other one.  The plates common to all sites index independent data, and must be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_hvae import devices
from pyro_hvae.evidence.path import Path, State, tempered
from pyro_hvae.evidence.support import require_fixed_range, values_of
from pyro_hvae.problem import Plate
from pyro_hvae.weights import default_chunk

__all__ = ["Block", "Gibbs"]

Position = tuple[int, ...]

_PROBES = 8
"""Chains on which plates are tried."""


@dataclass(frozen=True)
class Block:
    """How the entries of a discrete site are drawn.

    Attributes:
        name: of the site.
        points: values of one entry, ``(V, *event)``.
        inner: dims of the site's event that index entries, from ``to_event``.
        plates: whose indices are drawn together.
        steps: other dims, from the right of the entry's own event, with their sizes; one index after another.
    """

    name: str
    points: Tensor
    inner: int
    plates: tuple[Plate, ...]
    steps: tuple[tuple[int, int], ...]

    @property
    def positions(self) -> list[Position]:
        """Indices along ``steps``, in the order of the moves."""
        return [tuple(row) for row in _indices([size for _, size in self.steps])]

    def mask(self, position: Position) -> Tensor:
        """Return which entries of the site are drawn at a position; it broadcasts against a state of the site."""
        chosen = torch.ones((), dtype=torch.bool, device=self.points.device)
        for (dim, size), index in zip(self.steps, position, strict=True):
            along = torch.arange(size, device=self.points.device) == index
            chosen = chosen & along.reshape((size,) + (1,) * (-dim - 1))
        return chosen.reshape(chosen.shape + (1,) * (self.points.dim() - 1))


class Gibbs:
    """Gibbs moves of every discrete latent of a path, site by site in the order of the model.

    Args:
        path: the path of densities.
        blocks: how the sites are drawn, if that is known.

    Raises:
        ValueError: for a site whose number of values depends on other draws, or data that depend on each other.
    """

    def __init__(self, path: Path, blocks: tuple[Block, ...] | None = None) -> None:
        self.path = path
        self.blocks = _blocks(path) if blocks is None else blocks

    def on(self, path: Path) -> Gibbs:
        """Return the same moves for other chains of the same problem."""
        return Gibbs(path, self.blocks)

    def __call__(self, state: State, beta: float) -> State:
        """Draw every entry of every discrete site once.

        Raises:
            ValueError: where the base has no density at a value that is possible under the model.
        """
        for block in self.blocks:
            for position in block.positions:
                state = self.draw(state, block, position, beta)
        return state

    @property
    def evaluations(self) -> int:
        """Densities that a move evaluates, for each chain."""
        return sum(len(block.positions) * len(block.points) for block in self.blocks)

    def draw(self, state: State, block: Block, position: Position, beta: float) -> State:
        """Draw the entries at a position from their conditionals."""
        logits = self.conditional(state, block, position, beta)
        stuck = (logits == -torch.inf).all(0)  # a state of zero density, which has no conditional
        weights = torch.where(stuck, 0.0, logits).softmax(0)
        drawn = torch.multinomial(weights.reshape(len(weights), -1).T, 1).reshape(stuck.shape)
        spread, layout = block.points.dim() - 1, self.path.layout
        index = layout.spread(drawn, block.plates, block.inner)
        stuck = layout.spread(stuck, block.plates, block.inner + spread)
        value = state[block.name]
        chosen = block.mask(position) & ~stuck
        return {**state, block.name: torch.where(chosen, block.points[index].to(value.dtype), value)}

    def conditional(self, state: State, block: Block, position: Position, beta: float) -> Tensor:
        """Return unnormalised log-probabilities of the values at a position, ``(V, K, *plates)``.

        Raises:
            ValueError: where the base has no density at a value that is possible under the model.
        """
        path = self.path
        with torch.no_grad():
            values = path.values(state)
            if path.num_chains == 1:
                values = {name: value.unsqueeze(0) for name, value in values.items()}
            mask, parts = block.mask(position), []
            for points in block.points.split(self._at_once()):
                repeated = {n: _repeated(value, len(points)) for n, value in values.items()}
                candidates = points.to(values[block.name].dtype).repeat_interleave(path.num_chains, 0)
                spread = (1,) * (values[block.name].dim() - points.dim())
                candidates = candidates.reshape(len(candidates), *spread, *points.shape[1:])
                repeated[block.name] = torch.where(mask, candidates, repeated[block.name])
                count = len(candidates)
                if count == 1:
                    repeated = {name: value.squeeze(0) for name, value in repeated.items()}
                log_q, log_p = path.terms(repeated, count, block.plates)
                _check_covered(block, log_q, log_p)
                log_f = tempered(log_q, log_p, beta).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
                parts.append(log_f.reshape(len(points), path.num_chains, *log_f.shape[1:]))
        return torch.cat(parts)

    def _at_once(self) -> int:
        """Return the number of values that are evaluated at once."""
        return max(1, default_chunk(self.path.problem.structure.entries) // self.path.num_chains)


def _repeated(value: Tensor, count: int) -> Tensor:
    return value.expand(count, *value.shape).reshape(count * len(value), *value.shape[1:])


def _check_covered(block: Block, log_q: Tensor, log_p: Tensor) -> None:
    """Refuse a base without density at a possible value: chains would never be there before the last temperature.

    A zero among ``probs`` is no such value, since torch rounds it up to the precision of the dtype, as density.
    """
    missed = (log_q == -torch.inf) & torch.isfinite(log_p)
    if devices.has_values(missed) and bool(missed.any()):
        raise ValueError(
            f"the base draws site '{block.name}' with probability zero at a value that is possible under the model, so "
            "that weights leave a part of the evidence out: give every value a positive probability in the guide, or "
            'anneal from the prior (base="prior")'
        )


def _blocks(path: Path) -> tuple[Block, ...]:
    if not path.discrete:
        return ()
    probe = path if path.num_chains >= _PROBES else Path(path.problem, _PROBES)
    with torch.no_grad():
        run = probe.problem.run(probe.num_chains)
        state = probe.unconstrain(run.values)
        other = {name: value[torch.randperm(len(value), device=value.device)] for name, value in state.items()}
        blocks = []
        for name in path.discrete:
            require_fixed_range(name, run.guide_trace.nodes[name]["fn"])
            block = _block(probe, name)
            if not path.problem.structure.enumerated:  # terms that are summed out together have no index
                for plate in sorted(_plates(path, name), key=lambda plate: (plate not in path.plates, -plate.size)):
                    together = _within(block, plate)
                    if _separate(probe, (state, other), together, plate):
                        block = together
                    elif plate in path.plates:
                        raise ValueError(
                            f"plate '{plate.name}' encloses all sites, so that its indices are independent data, and "
                            f"the density at one of them depends on values of site '{name}' at another: make the plate "
                            "a dim of the site's event (.to_event), or let sites that join its indices be outside of it"
                        )
            blocks.append(block)
    return tuple(blocks)


def _plates(path: Path, name: str) -> list[Plate]:
    return [plate for plate in path.problem.structure.sites[name].plates if plate.dim is not None]


def _block(path: Path, name: str) -> Block:
    """Return the block that draws data together, and all other entries of a site one after another."""
    fn = path.problem.template.nodes[name]["fn"]
    values = values_of(fn)
    inner = fn.event_dim - values.event_dim
    events = fn.event_shape[:inner]
    steps = [(plate.dim - inner, plate.size) for plate in _plates(path, name) if plate not in path.plates]
    steps += [(dim - inner, size) for dim, size in enumerate(events)]
    return Block(name, values.points, inner, path.plates, tuple((d, n) for d, n in steps if n > 1))


def _within(block: Block, plate: Plate) -> Block:
    """Return the block in which the indices of a plate are drawn together, too."""
    assert plate.dim is not None
    plates = tuple(sorted({*block.plates, plate}, key=lambda one: one.dim or 0))
    steps = tuple(step for step in block.steps if step[0] != plate.dim - block.inner)
    return replace(block, plates=plates, steps=steps)


def _separate(path: Path, states: tuple[State, State], block: Block, plate: Plate) -> bool:
    """Whether the terms at each index of a plate are unchanged by the site's values at all others.

    Half of the indices are changed at a time; halves by the binary digits of the indices separate every ordered pair.
    """
    assert plate.dim is not None
    state, other = states
    value = state[block.name]
    changed = _other_values(block, value)
    index = torch.arange(plate.size, device=value.device)
    before = [path.terms(path.values(one), path.num_chains, block.plates) for one in (state, other)]
    own = 1 + [one.dim for one in block.plates].index(plate.dim)
    for digit in range(max(1, (plate.size - 1).bit_length())):
        for half in (0, 1):
            moved = (index >> digit) % 2 == half
            shape = (plate.size,) + (1,) * (-plate.dim - 1 + block.inner + block.points.dim() - 1)
            for at, terms in zip((state, other), before, strict=True):
                there = {**at, block.name: torch.where(moved.reshape(shape), changed, at[block.name])}
                after = path.terms(path.values(there), path.num_chains, block.plates)
                rest = (~moved).nonzero().squeeze(-1)
                pairs = zip(terms, after, strict=True)
                if not all(_same(a.index_select(own, rest), b.index_select(own, rest)) for a, b in pairs):
                    return False
    return True


def _other_values(block: Block, value: Tensor) -> Tensor:
    """Draw a value for each entry uniformly."""
    batch = value.shape[: value.dim() - (block.points.dim() - 1)]
    drawn = torch.randint(len(block.points), batch, device=value.device)
    return block.points[drawn].to(value.dtype)


def _same(first: Tensor, second: Tensor) -> bool:
    precision = torch.finfo(first.dtype).eps ** 0.5
    return torch.allclose(first, second, rtol=precision, atol=precision, equal_nan=True)


def _indices(sizes: list[int]) -> Iterator[list[Any]]:
    """Yield all indices of an array, the last dim fastest."""
    if not sizes:
        yield []
        return
    for first in range(sizes[0]):
        for rest in _indices(sizes[1:]):
            yield [first, *rest]
