"""Inverse graphs against brute force: d-separation by moral graphs, minimal sets by enumeration."""

import itertools

import pytest

from pyro_hvae.amortized.graph import Graph, invert

NAMES = ("a", "b", "c", "d")


def ancestors(parents, nodes):
    reached = set(nodes)
    while True:
        more = {parent for node in reached for parent in parents[node]} - reached
        if not more:
            return reached
        reached |= more


def separated(parents, first, second, given):
    """d-separation by the moral graph of the ancestors (Lauritzen et al., 1990); shares no code with the package."""
    kept = ancestors(parents, {first, second, *given})
    linked = {node: set() for node in kept}
    for node in kept:
        family = [node, *parents[node]]
        for one, other in itertools.permutations(family, 2):
            linked[one].add(other)
    reached, queue = {first}, [first]
    while queue:
        for other in linked[queue.pop()] - reached - set(given):
            reached.add(other)
            queue.append(other)
    return second not in reached


def smallest_sets(parents, node, given):
    """Every smallest subset of ``given`` that separates the node from the rest of it."""
    for size in range(len(given) + 1):
        sets = [
            set(chosen)
            for chosen in itertools.combinations(sorted(given), size)
            if all(separated(parents, node, other, chosen) for other in given if other not in chosen)
        ]
        if sets:
            return sets
    raise AssertionError


def all_graphs():
    """All directed acyclic graphs of four nodes in one topological order, each with every set of observed nodes."""
    pairs = list(itertools.combinations(NAMES, 2))
    for bits in itertools.product((False, True), repeat=len(pairs)):
        parents = {name: [] for name in NAMES}
        for (parent, child), present in zip(pairs, bits, strict=True):
            if present:
                parents[child].append(parent)
        for size in range(4):
            for observed in itertools.combinations(NAMES, size):
                yield parents, observed


def test_boundaries_are_the_unique_smallest_sets_on_all_graphs_of_four_nodes():
    count = 0
    for parents, observed in all_graphs():
        graph = Graph(parents)
        latents = [name for name in NAMES if name not in observed]
        order = invert(graph, latents, observed)
        assert set(order.boundaries) == set(latents)
        before = set(observed)
        for name, boundary in order.boundaries.items():
            sets = smallest_sets(parents, name, before)
            assert sets == [set(boundary.members)], (parents, observed, name)
            for member, trail in boundary.trails.items():
                assert (trail[0], trail[-1]) == (name, member)
                for one, other in itertools.pairwise(trail):
                    assert one in parents[other] or other in parents[one]
            before.add(name)
            count += 1
    assert count > 1500


def fewest_edges(graph, latents, observed):
    fewest = None
    for order in itertools.permutations(latents):
        before, edges = set(observed), 0
        for name in order:
            edges += len(graph.boundary(name, before).members)
            before.add(name)
        fewest = edges if fewest is None else min(edges, fewest)
    return fewest


def test_greedy_order_has_the_fewest_edges_on_all_graphs_of_four_nodes():
    for parents, observed in all_graphs():
        graph = Graph(parents)
        latents = [name for name in NAMES if name not in observed]
        assert invert(graph, latents, observed).edges == fewest_edges(graph, latents, observed), (parents, observed)


CASES = {
    "chain": ({"z3": (), "z2": ("z3",), "z1": ("z2",), "x": ("z1",)}, {"z1": "x", "z2": "z1", "z3": "z2"}),
    "fork": ({"z": (), "x": ("z",), "y": ("z",)}, {"z": "x y"}),
    "collider": ({"a": (), "b": (), "x": ("a", "b")}, {"b": "x", "a": "b x"}),
    "collider without data": ({"a": (), "b": (), "c": ("a", "b")}, {"a": "", "b": "", "c": "a b"}),
    "explained away": (
        {"a": (), "b": (), "c": ("a", "b"), "x": ("c",)},
        {"c": "x", "b": "c", "a": "b c"},
    ),
    "state space": (
        {"z1": (), "x1": ("z1",), "z2": ("z1",), "x2": ("z2",), "z3": ("z2",), "x3": ("z3",)},
        {"z2": "x1 x2 x3", "z3": "x3 z2", "z1": "x1 z2"},
    ),
    "tree": (
        {"r": (), "l": ("r",), "m": ("r",), "x": ("l",), "y": ("m",)},
        {"r": "x y", "l": "r x", "m": "r y"},
    ),
    "scale first": ({"v": (), "m": ("v",), "x": ("m", "v")}, {"v": "x", "m": "v x"}),
}


@pytest.mark.parametrize("case", CASES)
def test_named_graphs(case):
    parents, expected = CASES[case]
    graph = Graph(parents)
    observed = [name for name in parents if name[0] in "xy"]
    latents = [name for name in parents if name not in observed]
    order = invert(graph, latents, observed)
    assert order.edges == fewest_edges(graph, latents, observed)
    assert {name: " ".join(sorted(b.members)) for name, b in order.boundaries.items()} == expected


def test_a_latent_is_drawn_before_those_inside_of_its_plates():
    parents = {"top": (), "group": ("top",), "item": ("group",), "x": ("item",)}
    plates = {"top": frozenset(), "group": frozenset("g"), "item": frozenset("gi"), "x": frozenset("gi")}
    order = invert(Graph(parents), ["top", "group", "item"], ["x"], plates=plates)
    assert list(order.boundaries) == ["top", "group", "item"]
    assert {name: sorted(b.members) for name, b in order.boundaries.items()} == {
        "top": ["x"], "group": ["top", "x"], "item": ["group", "x"],
    }  # fmt: skip


def test_latents_drawn_first_left_out_and_merged():
    graph = Graph(CASES["chain"][0])
    order = invert(graph, ["z3", "z2", "z1"], ["x"], first=["z3"])
    assert next(iter(order.boundaries)) == "z3"
    assert sorted(order.boundaries["z3"].members) == ["x"]
    order = invert(graph, ["z3", "z1"], ["x"])  # z2 is summed over
    assert {name: sorted(b.members) for name, b in order.boundaries.items()} == {"z1": ["x"], "z3": ["z1"]}
    order = invert(graph, ["z3", "z2", "z1"], ["x"], merge=[("z1", "z3")])
    assert sorted(order.boundaries["z3"].members) == ["x", "z2"]
    assert sorted(order.boundaries["z1"].members) == ["x", "z2", "z3"]


def test_nodes_out_of_order_are_refused():
    with pytest.raises(ValueError, match="do not come before it"):
        Graph({"x": ("z",), "z": ()})


def test_a_chain_of_a_thousand_nodes_is_inverted_quickly():
    parents = {"z0": ()}
    for t in range(1, 1000):
        parents[f"z{t}"] = (f"z{t - 1}",)
    parents["x"] = ("z999",)
    order = invert(Graph(parents), [f"z{t}" for t in range(1000)], ["x"])
    assert order.edges == 1000
