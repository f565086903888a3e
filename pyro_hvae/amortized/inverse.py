"""The inverse of a model's graph that a guide follows, and the reasons for it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from pyro_hvae.amortized.graph import Boundary, Graph, invert
from pyro_hvae.amortized.reading import ModelReading
from pyro_hvae.problem import Plate

__all__ = ["Inverse", "invert_model"]


@dataclass
class Inverse:
    """What a guide draws, in which order, and given what.

    Attributes:
        inputs: of each latent that the guide draws, in the order of drawing.
        how: ``"encoded"``, ``"free"`` (parameters of its own) or ``"pooled"``, by latent.
        reasons: why each input is one, by latent.
        coupled: latents whose elements may depend on each other in the posterior, through the node that is named; the
            guide draws them independently, given their inputs.
        covariates: position and plates of each argument that is an input.
        kinds: of all sites of the model.
        first: latents that programs of the user draw before all others.
        families: descriptions, by latent.
        complete: whether the model's dependencies could be analysed.
    """

    inputs: dict[str, tuple[str, ...]]
    how: dict[str, str]
    reasons: dict[str, dict[str, str]]
    coupled: dict[str, str]
    covariates: dict[str, tuple[int, tuple[Plate, ...]]]
    kinds: dict[str, str]
    first: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    complete: bool = True
    families: dict[str, str] = field(default_factory=dict)

    @property
    def drawn(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    @property
    def nodes(self) -> tuple[str, ...]:
        """All inputs of all latents."""
        return tuple(dict.fromkeys(name for names in self.inputs.values() for name in names))

    def __str__(self) -> str:
        width = max((len(name) for name in (*self.inputs, *self.first, *self.left_out)), default=0)
        lines = [f"{name:<{width}}  drawn by a program of yours" for name in self.first]
        for name, inputs in self.inputs.items():
            shown = ", ".join(inputs)
            if self.how[name] == "encoded":
                how = f"encoder of {shown}" if inputs else "the same for all elements"
            elif self.how[name] == "pooled":
                how = f"encoder of {shown}, pooled" if inputs else "parameters of its own"
            else:
                how = "parameters of its own" + (f", and encoder of {shown}" if inputs else "")
            family = self.families.get(name)
            lines.append(f"{name:<{width}}  " + (f"{family}, {how}" if family else how))
            lines += [f"{'':<{width}}    {other}: {reason}" for other, reason in self.reasons[name].items()]
            if name in self.coupled:
                lines.append(
                    f"{'':<{width}}    elements are drawn independently; they may depend on each other through "
                    f"{self.coupled[name]}"
                )
        lines += [f"{name:<{width}}  left out" for name in self.left_out]
        if not self.complete:
            lines.append("dependencies could not be analysed: each site counts as dependent on all before it")
        return "\n".join(lines)


def invert_model(
    reading: ModelReading,
    *,
    first: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    merge: Sequence[Sequence[str]] = (),
    pooled: bool = False,
) -> Inverse:
    """Invert the graph of a model; see :func:`~pyro_hvae.amortized.amortize` for the options.

    Raises:
        ValueError: for unknown sites, or groups that can't be merged.
    """
    latents = reading.names("latent")
    merge = [merge] if merge and isinstance(merge[0], str) else merge  # type: ignore[list-item]
    _check_names(latents, leave_out=leave_out, merge=[name for group in merge for name in group])
    _check_groups(reading, merge, {*first, *leave_out})
    drawn = [name for name in latents if name not in leave_out]
    observed = {name for name in reading.graph.parents if name not in latents} - set(reading.names("summed out"))
    order = invert(reading.graph, drawn, observed, plates=reading.plates, first=first, merge=merge)
    data_plates = {name for other in reading.names("observed") for name in reading.plates[other]}
    factors = set(reading.names("factor"))
    inputs, how, reasons, coupled = {}, {}, {}, {}
    for name, boundary in order.boundaries.items():
        if name in first:
            continue
        vectorised = reading.plates[name]
        stacked = {plate.name for plate in reading.sites[name].plates}
        local = bool(stacked) and vectorised <= data_plates
        how[name] = "encoded" if local else "pooled" if pooled else "free"
        members = [node for node in reading.graph.parents if node in boundary.trails and node not in factors]
        if how[name] == "free":
            members = [node for node in members if node in latents]
        if how[name] == "free" and any(plate.subsampled for plate in reading.sites[name].plates):
            raise ValueError(
                f"site '{name}' is in a subsampled plate, and no data are in its plates to encode it from: its "
                "elements would need parameters of their own; draw it in a program of yours, "
                "amortize(..., guides=[program])"
            )
        inputs[name] = tuple(members)
        reasons[name] = {node: _reason(reading.graph, boundary.trails[node]) for node in members}
        through = _coupling(reading, name, boundary, {*observed, *order.boundaries})
        if through is not None and vectorised:
            coupled[name] = through
    kinds = {name: seen.kind for name, seen in reading.sites.items()}
    return Inverse(
        inputs, how, reasons, coupled, reading.covariates, kinds, tuple(first), tuple(leave_out), reading.complete
    )


def _reason(graph: Graph, trail: Sequence[str]) -> str:
    """Describe an active trail from a latent to its input."""
    name, other = trail[0], trail[-1]
    if len(trail) == 2:
        return "parent" if other in graph.parents[name] else "child"
    if len(trail) == 3 and {name, other} <= set(graph.parents[trail[1]]):
        return f"parent of the child {trail[1]}"
    arrows = [name]
    for one, two in itertools.pairwise(trail):
        arrows.append(f"{'<-' if two in graph.parents[one] else '->'} {two}")
    return " ".join(arrows)


def _coupling(reading: ModelReading, name: str, boundary: Boundary, given: Collection[str]) -> str | None:
    """Return a node that several elements of a latent reach by active trails, and that does not separate them."""
    own = reading.plates[name]
    for other in (*boundary.passed, *reading.graph.children[name]):
        if other in reading.plates and not own <= reading.plates[other]:
            if other in given and other not in boundary.passed and name not in reading.graph.parents[other]:
                continue
            return other
    return None


def _check_names(latents: Sequence[str], **options: Sequence[str]) -> None:
    for option, names in options.items():
        unknown = sorted(set(names) - set(latents))
        if isinstance(names, str) or unknown:
            raise ValueError(
                f"{option} names {unknown or repr(names)}, and the model's latents are {list(latents)}: write a list "
                "of site names"
            )


def _check_groups(reading: ModelReading, merge: Sequence[Sequence[str]], taken: Collection[str]) -> None:
    names = [name for group in merge for name in group]
    twice = sorted({name for name in names if names.count(name) > 1 or name in taken})
    if twice:
        raise ValueError(f"merge names {twice} twice, or a site that this guide does not draw")
    for group in merge:
        stacks = {reading.plates[name] for name in group}
        if len(stacks) > 1:
            raise ValueError(
                f"merge joins {list(group)}, which are in different plates ({[sorted(stack) for stack in stacks]}): "
                "a latent is drawn before those in plates inside of its own"
            )
