"""Linear encoders reach the evidence of linear-Gaussian graphs, and lose the right amount without a needed edge."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.amortized import amortize
from tests.amortized.linear_graphs import LinearGraph, random_graph

GRAPHS = {
    "chain": {"z3": (), "z2": ("z3",), "z1": ("z2",), "x": ("z1",)},
    "fork": {"z": (), "x1": ("z",), "x2": ("z",)},
    "collider": {"z1": (), "z2": (), "x": ("z1", "z2")},
    "covariate": {"x1": (), "z": ("x1",), "x2": ("z", "x1")},
    "without data below": {"z1": (), "x": ("z1",), "z2": ("z1",)},
}


LATER = ("covariate", "without data below")


def train(model, guide, data, bound, steps, rate=0.05):
    size = len(next(iter(data.values())))

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 0.5 * (1 - step / steps)))

    ph.fit(
        model, guide, data, bound=bound, steps=steps, batch_size=None, progress=False, check_every=None,
        terms_every=10**6, schedule=schedule, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2 * rate),
    )  # fmt: skip
    return size


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in GRAPHS),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4)),
    ],
)
def test_linear_encoders_reach_the_evidence(case):
    torch.manual_seed(0)
    graph = LinearGraph(GRAPHS[case] if isinstance(case, str) else random_graph(6 if case == 0 else 12, case))
    draws = graph.draw(100)
    data = graph.data(draws)
    guide = amortize(graph.model, **data, hidden=())
    train(graph.model, guide, data, ph.TraceELBO(gradient="stl"), steps=400 if isinstance(case, str) else 800)
    new = graph.draw(400, seed=2)
    elbo = ph.TraceELBO(num_particles=20).per_datum(graph.model, guide, **graph.data(new))
    gap = graph.log_evidence(new).mean() - elbo.mean()
    assert -0.002 < gap < 0.01


def without(guide, site, other):
    """Hold the weights of an input of a linear encoder at zero, where they start."""
    encoder, start, keep = guide.conditional(site).encoder, 0, None
    for name in guide.inverse.inputs[site]:
        width = guide.input(name).width
        if name == other:
            keep = torch.ones_like(encoder.skip.weight)
            keep[:, start : start + width] = 0
        start += width
    encoder.skip.weight.register_hook(lambda gradient: gradient * keep)


@pytest.mark.parametrize(
    ("case", "site", "other"),
    [("fork", "z", "x2"), ("collider", "z1", "z2"), pytest.param("chain", "z2", "z1", marks=pytest.mark.slow)],
)
def test_a_guide_without_a_needed_edge_falls_short_by_the_mutual_information(case, site, other):
    """E log p(z|x) - E log q(z|x) under the model, the sleep phase's objective."""
    torch.manual_seed(0)
    graph = LinearGraph(GRAPHS[case])
    draws = graph.draw(2000)
    data = graph.data(draws)
    guide = amortize(graph.model, **data, hidden=())
    assert other in guide.inverse.inputs[site]
    rest = [name for name in guide.inverse.inputs[site] if name != other]
    without(guide, site, other)
    train(graph.model, guide, data, ph.SleepPhase(), steps=300)
    information = graph.mutual_information(site, other, rest)
    assert information > 0.05
    new = graph.draw(20_000, seed=2)
    values = {name: new[:, graph.names.index(name)] for name in graph.latents}
    log_q = ph.Problem(graph.model, guide)(**graph.data(new)).run(values=values).log_q
    log_p = 0.0
    for name, inputs in guide.inverse.inputs.items():
        gain, variance = graph.conditional(name, list(inputs))
        log_p = log_p + dist.Normal(new[:, graph.index(inputs)] @ gain, variance.sqrt()).log_prob(values[name])
    gap = log_p - sum(term[0] for term in log_q.values())
    assert abs(gap.mean() - information) < 4 * gap.std() / len(gap) ** 0.5 + 0.01


def test_elbo_without_a_needed_edge():
    """The reverse divergence is the variance of the posterior mean that the guide can't see, over twice its own."""
    torch.manual_seed(0)
    graph = LinearGraph(GRAPHS["fork"])
    draws = graph.draw(200)
    data = graph.data(draws)
    guide = amortize(graph.model, **data, hidden=())
    without(guide, "z", "x2")
    train(graph.model, guide, data, ph.TraceELBO(gradient="stl"), steps=400)
    gain, variance = graph.conditional("z", ["x1", "x2"])
    mean = draws[:, graph.index(["x1", "x2"])] @ gain
    design = torch.stack([torch.ones(200), data["x1"]], -1)
    residual = mean - design @ torch.linalg.lstsq(design, mean[:, None]).solution[:, 0]
    shortfall = residual.square().mean() / (2 * variance)
    elbo = ph.TraceELBO(num_particles=400).per_datum(graph.model, guide, **data).mean()
    assert shortfall > 0.1
    assert abs(graph.log_evidence(draws).mean() - elbo - shortfall) < 0.02


def test_two_plates_deep():
    """x_ij ~ N(b_ij, .5), b_ij ~ N(a_j, 1), a_j ~ N(m, 1), m ~ N(0, 1), with j along the inner plate's left."""
    torch.manual_seed(0)

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", x.shape[0], dim=-2):
            a = pyro.sample("a", dist.Normal(m, 1.0))
            with pyro.plate("items", x.shape[1], dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    groups, items = 12, 5
    x = 0.7 + torch.randn(groups, 1) + torch.randn(groups, items) * 1.25**0.5
    guide = amortize(model, x, hidden=())
    assert guide.inverse.inputs == {"m": (), "a": ("m", "x"), "b": ("a", "x")}
    train(model, guide, {"x": x}, ph.TraceELBO(gradient="stl"), steps=600)
    size = groups * items
    same = torch.eye(groups).repeat_interleave(items, 0).repeat_interleave(items, 1)
    covariance = torch.ones(size, size) + same + 1.25 * torch.eye(size)
    evidence = dist.MultivariateNormal(torch.zeros(size), covariance).log_prob(x.flatten())
    elbo = ph.TraceELBO(num_particles=1000).per_datum(model, guide, x).sum()
    assert -0.1 < evidence - elbo < 0.01 * size
