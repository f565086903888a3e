r"""Invert a directed graph: which nodes a guide must be shown to draw each latent.

A guide that draws latents in the order :math:`z_1, \dots, z_m` can hold every posterior of the graph if each
:math:`z_i` is drawn given its **Markov boundary** among the observed nodes and the latents drawn before it: the
smallest set of them that d-separates :math:`z_i` from the others.  For a fixed order these sets are unique, and no node
of them can be left out.  The order is chosen greedily, from the last draw to the first: latents without data below them
come last, each drawn given its parents, and of the others always the one with the fewest nodes in its boundary.

Reference:
    Faithful Inversion of Generative Models for Effective Amortized Inference (Webb et al., 2018).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field

__all__ = ["Boundary", "Graph", "Order", "invert"]

Trail = tuple[str, ...]


@dataclass(frozen=True)
class Boundary:
    """The Markov boundary of a node.

    Attributes:
        trails: for each member of the boundary a shortest active trail, from the node to the member.
        passed: nodes that active trails pass through, the node itself not included.
    """

    trails: dict[str, Trail]
    passed: frozenset[str]

    @property
    def members(self) -> frozenset[str]:
        return frozenset(self.trails)


class Graph:
    """A directed acyclic graph.

    Args:
        parents: the parents of each node; nodes in a topological order.

    Raises:
        ValueError: for a parent that does not come before its child.

    Example:
        >>> graph = Graph({"a": (), "b": (), "c": ("a", "b")})
        >>> sorted(graph.boundary("a", {"b"}).members), sorted(graph.boundary("a", {"b", "c"}).members)
        ([], ['b', 'c'])
    """

    def __init__(self, parents: Mapping[str, Collection[str]]) -> None:
        self.parents: dict[str, tuple[str, ...]] = {}
        self.children: dict[str, list[str]] = {}
        for node, above in parents.items():
            missing = sorted(set(above) - set(self.parents))
            if missing:
                raise ValueError(f"parent(s) {missing} of node '{node}' do not come before it: sort the nodes")
            self.parents[node] = tuple(name for name in self.parents if name in set(above))
            self.children[node] = []
            for name in self.parents[node]:
                self.children[name].append(node)

    def ancestors(self, nodes: Collection[str]) -> set[str]:
        """Return the nodes with all that have a directed path to one of them."""
        reached = set(nodes)
        for name in reversed(self.parents):
            if name in reached:
                reached.update(self.parents[name])
        return reached

    def boundary(self, node: str, given: Set[str]) -> Boundary:
        """Return the smallest subset of ``given`` that d-separates ``node`` from the rest of it.

        The search is that of Bayes-Ball: The Rational Pastime (Shachter, 1998).
        """
        start = (node, True)  # True: reached from a child, or the start
        before: dict[tuple[str, bool], tuple[str, bool] | None] = {start: None}
        queue, passed = [start], set[str]()
        trails: dict[str, Trail] = {}
        for state in queue:
            name, from_child = state
            if name in given and name != node:
                trails.setdefault(name, _trail(before, state))
                steps = [] if from_child else [(parent, True) for parent in self.parents[name]]
                if steps:
                    passed.add(name)
            else:
                passed.add(name)
                steps = [(child, False) for child in self.children[name]]
                if from_child:
                    steps += [(parent, True) for parent in self.parents[name]]
            for step in steps:
                if step not in before and step[0] != node:
                    before[step] = state
                    queue.append(step)
        return Boundary(trails, frozenset(passed - {node}))


def _trail(before: Mapping[tuple[str, bool], tuple[str, bool] | None], state: tuple[str, bool]) -> Trail:
    path: list[str] = []
    step: tuple[str, bool] | None = state
    while step is not None:
        path.append(step[0])
        step = before[step]
    return tuple(reversed(path))


@dataclass(frozen=True)
class Order:
    """The order in which a guide draws latents, and what each is drawn given.

    Attributes:
        boundaries: by latent, the first drawn first.
    """

    boundaries: dict[str, Boundary] = field(default_factory=dict)

    @property
    def edges(self) -> int:
        """The number of inputs of all latents."""
        return sum(len(boundary.trails) for boundary in self.boundaries.values())


def invert(
    graph: Graph,
    latents: Sequence[str],
    observed: Collection[str],
    *,
    plates: Mapping[str, frozenset[str]] | None = None,
    first: Sequence[str] = (),
    merge: Sequence[Sequence[str]] = (),
) -> Order:
    """Return an order of the latents with their Markov boundaries.

    Nodes that are neither latents nor observed are summed over.  Of orders with as few inputs, one that draws parents
    before their children is taken: given its scale a location is often Gaussian, where its marginal has heavier tails.

    Args:
        graph: of the model.
        latents: the nodes to draw.
        observed: the nodes that a guide may be shown.
        plates: the plates around each node.  A latent is drawn before those that have all its plates and more.
        first: latents that are drawn before all others.
        merge: groups of latents that are drawn one after another, each given the inputs of all of them.

    Example:
        >>> graph = Graph({"z2": (), "z1": ("z2",), "x": ("z1",)})
        >>> order = invert(graph, ["z2", "z1"], ["x"])
        >>> {name: sorted(boundary.members) for name, boundary in order.boundaries.items()}
        {'z1': ['x'], 'z2': ['z1']}
    """
    place = {name: number for number, name in enumerate(graph.parents)}
    of = {name: tuple(sorted(group, key=place.__getitem__)) for group in merge for name in group}
    units = list(dict.fromkeys(of.get(name, (name,)) for name in sorted(latents, key=place.__getitem__)))
    remaining, seen = set(latents), {*latents, *observed}
    drawn_last: list[tuple[tuple[str, ...], dict[str, Boundary]]] = []
    own = {unit: frozenset().union(*((plates or {}).get(name, frozenset()) for name in unit)) for unit in units}
    informed = graph.ancestors(observed)
    known: dict[tuple[str, ...], dict[str, Boundary]] = {}
    while units:
        late = [unit for unit in units if not set(unit) & set(first)] or units
        present = {own[unit] for unit in late}
        inner = {around for around in present if not any(around < other for other in present)}
        free = [unit for unit in late if own[unit] in inner]
        best: tuple[tuple[bool, int, bool, int], tuple[str, ...]] | None = None
        for unit in free:
            if unit not in known:
                for name in unit:
                    seen.discard(name)
                known[unit] = {name: graph.boundary(name, seen) for name in unit}
                seen.update(unit)
            size = len(set().union(*(boundary.trails for boundary in known[unit].values())))
            below = {child for name in unit for child in graph.children[name]} - set(unit)
            parent = bool(below & remaining)
            rank = parent or bool(informed & set(unit)), size, parent, place[unit[0]]
            if best is None or rank < best[0]:
                best = rank, unit
        assert best is not None
        chosen = best[1]
        units.remove(chosen)
        remaining -= set(chosen)
        seen -= set(chosen)
        drawn_last.append((chosen, known.pop(chosen)))
        for unit in [u for u, found in known.items() if any(set(chosen) & set(b.trails) for b in found.values())]:
            del known[unit]
    boundaries: dict[str, Boundary] = {}
    for unit, found in reversed(drawn_last):
        boundaries.update(_joined(unit, found) if len(unit) > 1 else found)
    return Order(boundaries)


def _joined(unit: tuple[str, ...], found: Mapping[str, Boundary]) -> dict[str, Boundary]:
    """Show each latent of a group the inputs of all, and the latents of the group before it."""
    trails: dict[str, Trail] = {}
    for boundary in found.values():
        for member, trail in boundary.trails.items():
            trails.setdefault(member, trail)
    passed = frozenset().union(*(boundary.passed for boundary in found.values()))
    joined = {}
    for position, name in enumerate(unit):
        earlier = {other: (name, other) for other in unit[:position]}
        joined[name] = Boundary({**trails, **earlier}, passed - {name})
    return joined
