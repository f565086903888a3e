"""The evidence lower bound on linear-Gaussian chains: values, layers and gradients in closed form."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

import pyro_hvae as ph
from tests.linear_gaussian import Oracle, linear_gaussian
from tests.programs import build, data

EVERY = [
    ph.TraceELBO(3),
    ph.TraceELBO(gradient="stl"),
    ph.TraceELBO(gradient="score"),
    ph.LayerwiseELBO(2),
    ph.IWELBO(4),
    ph.IWELBO(3, "dreg", num_repeats=2),
    ph.VRBound(0.3, 4),
    ph.VRBound(3.0, 4),
    ph.ThermodynamicBound(4, 3),
    ph.CUBO(2, 4),
    ph.EUBO(4),
]


def within(values, expected, errors=4.0):
    """Means over dim 0 agree with ``expected`` within a number of standard errors, entry by entry."""
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - expected).abs() <= errors * error + 1e-10).all()


@pytest.mark.parametrize("bound", [bound for bound in EVERY if not isinstance(bound, ph.LayerwiseELBO)], ids=repr)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_every_value_is_log_p_at_the_exact_posterior(depth, full, bound):
    case = linear_gaussian(depth, full=full)
    evidence = Oracle(case.model).log_evidence(case.x).detach()
    value = bound.per_datum(case.model, case.exact, case.x)
    torch.testing.assert_close(value, evidence, rtol=0, atol=1e-10)
    torch.testing.assert_close(bound.loss(case.model, case.exact, case.x).abs(), evidence.sum().abs())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_closed_divergences_at_the_exact_posterior(depth, full):
    """A closed form takes the noise out of a layer, and with it what cancels that of the others: log p in the mean."""
    case = linear_gaussian(depth, full=full)
    evidence = Oracle(case.model).log_evidence(case.x).detach()
    assert f"kl_z{depth}" in ph.LayerwiseELBO().terms(case.model, case.exact, case.x)
    within(
        torch.stack([ph.LayerwiseELBO(50).per_datum(case.model, case.exact, case.x) for _ in range(40)]),
        evidence,
        4.5,
    )


@pytest.mark.parametrize("bound", [bound for bound in EVERY if not isinstance(bound, ph.LayerwiseELBO)], ids=repr)
@pytest.mark.parametrize("depth", [2, 5])
def test_a_top_down_posterior_is_as_good(depth, bound):
    case = linear_gaussian(depth)
    evidence = Oracle(case.model).log_evidence(case.x).detach()
    value = bound.per_datum(case.model, case.top_down, case.x)
    torch.testing.assert_close(value, evidence, rtol=0, atol=1e-10)


@pytest.mark.parametrize("which", ["other", "other_top_down"])
@pytest.mark.parametrize("bound", [ph.TraceELBO(400), ph.LayerwiseELBO(400)], ids=repr)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_gap_is_the_divergence_from_the_posterior(depth, bound, which):
    case = linear_gaussian(depth)
    guide, oracle = getattr(case, which), Oracle(case.model)
    values = torch.stack([bound.per_datum(case.model, guide, case.x) for _ in range(20)])
    divergence = oracle.kl(guide, case.x).detach()
    assert (divergence > 1e-3).all()
    within(oracle.log_evidence(case.x).detach() - values, divergence)


@pytest.mark.parametrize("which", ["other", "other_top_down"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_terms_are_those_of_the_decomposition(depth, which):
    case = linear_gaussian(depth)
    guide = getattr(case, which)
    expected = {name: term.detach() for name, term in Oracle(case.model).terms(guide, case.x).items()}
    runs = [ph.LayerwiseELBO(400).terms(case.model, guide, case.x) for _ in range(20)]
    is_true_kl = dict.fromkeys(expected, which == "other_top_down") | {f"z{depth}": True}
    names = {site: f"{'kl' if is_true_kl[site] else 'rate'}_{site}" for site in expected if site != "reconstruction"}
    assert set(runs[0]) == {"reconstruction", *names.values()}
    within(torch.stack([run["reconstruction"] for run in runs]), expected["reconstruction"])
    for site, name in names.items():
        within(torch.stack([run[name] for run in runs]), expected[site])
    plain = [ph.TraceELBO(400).terms(case.model, guide, case.x) for _ in range(20)]
    assert set(plain[0]) == {"reconstruction", *(f"rate_{site}" for site in names)}
    for site in names:
        within(torch.stack([run[f"rate_{site}"] for run in plain]), expected[site])


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def test_a_closed_form_has_the_scale_and_the_mask_of_its_site():
    mask = torch.tensor([True, True, False, True])

    def layer(loc, scale):
        with poutine.mask(mask=mask), poutine.scale(scale=2.5):
            return pyro.sample("z", dist.Normal(loc, scale))

    def model(x):
        with data(4):
            pyro.sample("x", dist.Normal(layer(torch.zeros(4), 1.0), 1.0), obs=x)

    def guide(x):
        with data(4):
            layer(x / 2, 0.6)

    x = torch.randn(4)
    terms = ph.LayerwiseELBO().terms(model, guide, x)
    exact = 0.5 * (0.36 + (x / 2) ** 2 - 1) - math.log(0.6)
    torch.testing.assert_close(terms["kl_z"], 2.5 * exact * mask)


@pytest.mark.parametrize("which", ["other", "other_top_down"])
@pytest.mark.parametrize(
    "bound", [ph.TraceELBO(200), ph.TraceELBO(200, "stl"), ph.LayerwiseELBO(200)], ids=lambda b: repr(b)
)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_gradients_are_those_of_the_closed_form(depth, bound, which):
    case = linear_gaussian(depth)
    guide = getattr(case, which)
    learned = [*case.model.parameters(), *guide.parameters()]
    exact = flat(torch.autograd.grad(-Oracle(case.model).elbo(guide, case.x).sum(), learned))
    assert exact.abs().max() > 0.1
    drawn = torch.stack(
        [flat(torch.autograd.grad(bound.differentiable_loss(case.model, guide, case.x), learned)) for _ in range(25)]
    )
    within(drawn, exact, errors=5.5)  # 4 standard errors for one normal variate; these are up to 100, from 25 runs


def test_layers_of_a_bottom_up_guide_are_not_divergences():
    """The pair on which a mean-field KL of z1 is off by 0.9 * 0.7 * 0.45^2 / 0.25 = 0.5103 nats a datum."""
    pair = build("by_hand")
    terms = ph.LayerwiseELBO(2000).terms(pair.model, pair.guide, *pair.args)
    assert set(terms) == {"reconstruction", "rate_z1", "kl_z2"}
    x = pair.args[0]
    mean, second = 0.6 * x, 0.45**2
    spread = (1 - 0.9 * 0.7) ** 2 * second + (0.9 * 0.6) ** 2
    rate = -math.log(0.45) - 0.5 + math.log(0.5) + 0.5 * ((mean * (1 - 0.9 * 0.7)) ** 2 + spread) / 0.25
    assert torch.allclose(terms["rate_z1"], rate, atol=0.1)
    naive = -math.log(0.45) - 0.5 + math.log(0.5)
    naive = naive + 0.5 * (second + (mean * (1 - 0.9 * 0.7)) ** 2 + (0.9 * 0.7) ** 2 * second + (0.9 * 0.6) ** 2) / 0.25
    torch.testing.assert_close(naive - rate, torch.full_like(rate, 0.5103), rtol=0, atol=1e-4)
    whole = torch.stack([ph.TraceELBO(500).per_datum(pair.model, pair.guide, x) for _ in range(20)])
    layers = torch.stack([ph.LayerwiseELBO(500).per_datum(pair.model, pair.guide, x) for _ in range(20)])
    within(whole - layers, 0.0)


def test_a_rate_may_be_negative():
    """z1|z2 ~ N(.99 z2, .14) against z1 ~ N(.3, .6), z2|z1 ~ N(.99 z1, .14): -1.46 nats."""

    def model():
        with data(2000):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("z1", dist.Normal(0.99 * z2, 0.14))

    def guide():
        with data(2000):
            z1 = pyro.sample("z1", dist.Normal(torch.tensor(0.3), 0.6))
            pyro.sample("z2", dist.Normal(0.99 * z1, 0.14))

    rate = ph.LayerwiseELBO(20).terms(model, guide)["rate_z1"]
    exact = math.log(0.14 / 0.6) - 0.5 + 0.5 * ((1 - 0.99**2) ** 2 * (0.36 + 0.09) + (0.99 * 0.14) ** 2) / 0.14**2
    assert round(exact, 2) == -1.46
    within(rate, torch.tensor(exact))


def test_a_chain_of_one_layer_is_analytic_throughout():
    case = linear_gaussian(1)
    terms = ph.LayerwiseELBO().terms(case.model, case.other, case.x)
    torch.testing.assert_close(terms["kl_z1"], Oracle(case.model).terms(case.other, case.x)["z1"].detach())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ph.TraceELBO(0), "num_particles.*0"),
        (lambda: ph.TraceELBO(1.5), "num_particles.*1.5"),
        (lambda: ph.LayerwiseELBO(-1), "num_particles.*-1"),
        (lambda: ph.TraceELBO(gradient="dreg"), "TraceELBO has no gradient 'dreg'.*pathwise, stl, score"),
        (lambda: ph.LayerwiseELBO(gradient="score"), "LayerwiseELBO has no gradient 'score'.*pathwise"),
    ],
)
def test_refusals_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()
