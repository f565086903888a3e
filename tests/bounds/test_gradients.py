"""Gradient estimators: zero variance where it is promised, no bias where none is allowed.

Most pairs here give every datum parameters of its own, tensors of shape (N,), on N copies of one datum: one
backward pass yields N independent gradients.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from tests.bounds.test_importance import LOC, MEAN, VARIANCE
from tests.linear_gaussian import linear_gaussian
from tests.programs import data


def within(values, expected, errors=4.0):
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - expected).abs() <= errors * error + 1e-12).all(), (values.mean(0), expected, error)


def copies(size, **values):
    """Parameters, one row a copy."""
    return {
        name: torch.tensor(v).expand(size, *torch.tensor(v).shape).clone().requires_grad_()
        for name, v in values.items()
    }


def gradients(bound, model, guide, learned, *args):
    """Gradients of the value (not of the loss) in the parameters of each copy."""
    loss = bound.differentiable_loss(model, guide, *args)
    found = torch.autograd.grad(-loss, list(learned.values()))
    return dict(zip(learned, found, strict=True))


class Copies(nn.Module):
    """A program with parameters of its own, or another's."""

    def __init__(self, run, parameters):
        super().__init__()
        self.run = run
        self.values = nn.ParameterDict(parameters)

    def forward(self, x=None):
        return self.run(self.values, x)


# Sticking the landing


@pytest.mark.parametrize("which", ["exact", "top_down"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_stl_has_no_variance_at_the_exact_posterior(depth, which):
    case = linear_gaussian(depth)
    guide = getattr(case, which)
    learned = list(guide.parameters())
    spread = {}
    for bound in (ph.TraceELBO(1, "stl"), ph.IWELBO(1, "stl"), ph.TraceELBO(7, "stl"), ph.TraceELBO(1)):
        runs = []
        for _ in range(6):
            loss = bound.differentiable_loss(case.model, guide, case.x)
            runs.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, learned)]))
        spread[repr(bound)] = torch.stack(runs).var(0).max()
        if bound.gradient == "stl":
            assert torch.stack(runs).abs().max() < 1e-10
            assert spread[repr(bound)] < 1e-20
    assert spread[repr(ph.TraceELBO(1))] > 1e-3


def gaussian_copies(size):
    """Weights p(z|x)/q(z) with the guide's mean and log-sd free in every copy."""
    learned = copies(size, loc=LOC, log_scale=0.5 * math.log(0.8))

    def model():
        with data(size):
            pyro.sample("z", dist.Normal(torch.tensor(MEAN), VARIANCE**0.5))

    def guide(p, _):
        with data(size):
            pyro.sample("z", dist.Normal(p["loc"], p["log_scale"].exp()))

    owner = Copies(guide, {name: nn.Parameter(value) for name, value in learned.items()})
    return model, owner, dict(owner.values)


@pytest.mark.parametrize("bound", [ph.TraceELBO(1, "stl"), ph.IWELBO(3, "dreg")], ids=repr)
def test_tensors_that_cannot_be_held_are_refused(bound):
    loc = torch.tensor(LOC, requires_grad=True)

    def model():
        pyro.sample("z", dist.Normal(torch.tensor(MEAN), VARIANCE**0.5))

    def guide():
        pyro.sample("z", dist.Normal(loc, 0.9))

    with pytest.raises(ValueError, match=f"shapes \\[\\(\\)\\].*{bound.gradient}.*pathwise"):
        bound.differentiable_loss(model, guide)


@pytest.mark.parametrize(("num_particles", "unbiased", "biased"), [(5, 0.0715, 0.402), (20, 0.0165, 0.381)])
def test_stl_is_biased_for_several_particles_and_dreg_is_not(num_particles, unbiased, biased):
    size = 40_000
    found = {}
    for gradient in ("pathwise", "dreg", "stl"):
        model, guide, learned = gaussian_copies(size)
        found[gradient] = gradients(ph.IWELBO(num_particles, gradient), model, guide, learned)["loc"]
    error = (found["pathwise"].var() / size + found["dreg"].var() / size).sqrt()
    difference = found["pathwise"].mean() - found["dreg"].mean()
    assert difference.abs() < 4 * error
    assert (found["stl"].mean() - found["pathwise"].mean()).abs() > 20 * error
    assert found["dreg"].var() < found["pathwise"].var()
    assert abs(found["dreg"].mean() - unbiased) < 0.0015
    assert abs(found["stl"].mean() - biased) < 0.005


def test_one_particle_makes_stl_exact_in_the_mean():
    """d ELBO / d loc = (m - loc)/v and d ELBO / d log sd = 1 - sd^2/v."""
    exact = {"loc": (MEAN - LOC) / VARIANCE, "log_scale": 1 - 0.8 / VARIANCE}
    for bound in (ph.TraceELBO(1, "stl"), ph.TraceELBO(3, "stl"), ph.IWELBO(1, "stl"), ph.TraceELBO(2)):
        model, guide, learned = gaussian_copies(20_000)
        for name, values in gradients(bound, model, guide, learned).items():
            within(values, exact[name])


# Signal to noise (Rainforth et al., 2018; Tucker et al., 2019)


def test_signal_to_noise_of_the_guide():
    ratios = {}
    for gradient, num_particles in itertools.product(("pathwise", "dreg"), (4, 64)):
        model, guide, learned = gaussian_copies(20_000)
        values = gradients(ph.IWELBO(num_particles, gradient), model, guide, learned)["loc"]
        ratios[gradient, num_particles] = (values.mean().abs() / values.std()).item()
    order = math.log(ratios["pathwise", 64] / ratios["pathwise", 4]) / math.log(16)
    assert -0.75 < order < -0.3
    assert ratios["dreg", 64] > ratios["dreg", 4]
    assert ratios["dreg", 64] > 5 * ratios["pathwise", 64]


# Hierarchies


X = torch.tensor(1.3)


def bottom_up(size):
    def model(p, x):
        with data(size):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(p["tie"] * z2, 0.6))
            pyro.sample("x", dist.Normal(p["on_x"] * z1, 0.8), obs=x)

    def guide(p, x):
        with data(size):
            z1 = pyro.sample("z1", dist.Normal(p["gain"] * x, p["log_sd"].exp()))
            pyro.sample("z2", dist.Normal(p["upper"] * z1, 0.75))

    ours = {"tie": 0.9, "on_x": 1.1}, {"gain": 0.35, "log_sd": -0.4, "upper": 0.3}
    model, guide = (
        Copies(run, {k: nn.Parameter(v) for k, v in copies(size, **values).items()})
        for run, values in zip((model, guide), ours, strict=True)
    )
    return model, guide


def shared(size):
    """A guide that runs top-down and uses the model's own prior of z1, as a ladder does."""
    tie = nn.Parameter(torch.full((size,), 0.9))

    def model(p, x):
        with data(size):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(p["tie"] * z2, 0.6))
            pyro.sample("x", dist.Normal(z1, 0.8), obs=x)

    def guide(p, x):
        with data(size):
            z2 = pyro.sample("z2", dist.Normal(p["top"] * x, 0.8))
            pyro.sample("z1", dist.Normal(0.5 * (p["tie"] * z2 + p["gain"] * x), 0.6))

    own = {k: nn.Parameter(v) for k, v in copies(size, top=0.3, gain=0.8).items()}
    return Copies(model, {"tie": tie}), Copies(guide, {**own, "tie": tie})


@pytest.mark.parametrize("make", [bottom_up, shared])
@pytest.mark.parametrize("num_particles", [2, 5])
def test_dreg_keeps_the_paths_between_layers(make, num_particles):
    size = 30_000
    x = X.double().expand(size)
    found = {}
    for gradient in ("pathwise", "dreg"):
        model, guide = make(size)
        learned = {
            f"{i}.{name}": p for i, program in enumerate((model, guide)) for name, p in program.named_parameters()
        }
        learned = {name: p for name, p in learned.items() if name not in ("1.values.tie",)}
        pyro.set_rng_seed(1)
        found[gradient] = gradients(ph.IWELBO(num_particles, gradient), model, guide, learned, x)
    for name, values in found["dreg"].items():
        within(values - found["pathwise"][name], 0.0)
    strongest = max(values.mean().abs() for values in found["dreg"].values())
    assert strongest > 0.1


def test_stl_keeps_the_paths_between_layers():
    size = 30_000
    x = X.double().expand(size)
    for make in (bottom_up, shared):
        found = {}
        for gradient in ("pathwise", "stl"):
            model, guide = make(size)
            learned = dict(guide.named_parameters())
            pyro.set_rng_seed(1)
            found[gradient] = gradients(ph.TraceELBO(1, gradient), model, guide, learned, x)
        for name, values in found["stl"].items():
            within(values - found["pathwise"][name], 0.0)


# Discrete draws, against enumeration


def discrete_pair(size):
    """z2 in {0, 1}, z1 in {0, 1, 2}, x in {0, 1, 2}; every table free in every copy."""
    generator = torch.Generator().manual_seed(4)

    def table(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tables = {"p2": table(2), "p1": table(2, 3), "px": table(3, 3), "q1": table(3), "q2": table(3, 2)}
    learned = {name: t.expand(size, *t.shape).clone().requires_grad_() for name, t in tables.items()}
    each = torch.arange(size)

    def model(x):
        with data(size):
            z2 = pyro.sample("z2", dist.Categorical(logits=learned["p2"]))
            z1 = pyro.sample("z1", dist.Categorical(logits=learned["p1"][each, z2]))
            pyro.sample("x", dist.Categorical(logits=learned["px"][each, z1]), obs=x)

    def guide(x):
        with data(size):
            z1 = pyro.sample("z1", dist.Categorical(logits=learned["q1"]))
            pyro.sample("z2", dist.Categorical(logits=learned["q2"][each, z1]))

    return model, guide, learned, tables


def enumerated_value(tables, x, num_particles, reduce):
    """E over all K-tuples of draws of a function of their log-weights."""
    log = {name: t.log_softmax(-1) for name, t in tables.items()}
    states = list(itertools.product(range(3), range(2)))
    log_q = torch.stack([log["q1"][a] + log["q2"][a, b] for a, b in states])
    log_p = torch.stack([log["p2"][b] + log["p1"][b, a] + log["px"][a, x] for a, b in states])
    weights = log_p - log_q
    total = 0.0
    for chosen in itertools.product(range(len(states)), repeat=num_particles):
        chosen = list(chosen)
        total = total + log_q[chosen].sum().exp() * reduce(weights[chosen])
    return total


def importance(w):
    return w.logsumexp(0) - math.log(len(w))


def renyi(w):
    return 2 * importance(0.5 * w)


def thermodynamic(w):
    return 0.5 * w.mean() + 0.5 * ((0.5 * w).softmax(0) * w).sum()


CASES = {
    "elbo, K=1": (ph.TraceELBO(1, "score"), 1, torch.mean),
    "elbo, K=3": (ph.TraceELBO(3, "score"), 3, torch.mean),
    "vimco, K=1": (ph.IWELBO(1, "vimco"), 1, importance),
    "vimco, K=2": (ph.IWELBO(2, "vimco"), 2, importance),
    "vimco, K=3": (ph.IWELBO(3, "vimco"), 3, importance),
    "vimco, repeated": (ph.IWELBO(2, "vimco", num_repeats=2), 2, importance),
    "renyi": (ph.VRBound(0.5, 2, "score"), 2, renyi),
    "thermodynamic": (ph.ThermodynamicBound(2, 2, "score"), 2, thermodynamic),
}


@pytest.mark.parametrize("case", CASES)
def test_discrete_gradients_against_enumeration(case):
    bound, num_particles, reduce = CASES[case]
    size = 20_000
    model, guide, learned, tables = discrete_pair(size)
    x = torch.full((size,), 2)
    found = gradients(bound, model, guide, learned, x)
    free = {name: t.clone().requires_grad_() for name, t in tables.items()}
    exact = torch.autograd.grad(enumerated_value(free, 2, num_particles, reduce), list(free.values()))
    for name, expected in zip(free, exact, strict=True):
        assert expected.abs().max() > 1e-3
        within(found[name], expected, errors=4.5)
    value = bound.per_datum(model, guide, x)
    within(value, enumerated_value(tables, 2, num_particles, reduce))


def test_more_particles_have_a_baseline():
    """Leave-one-out takes variance away: two particles are much better than half of one's variance."""
    spread = {}
    for num_particles in (1, 2):
        model, guide, learned, _ = discrete_pair(20_000)
        found = gradients(ph.TraceELBO(num_particles, "score"), model, guide, learned, torch.full((20_000,), 2))
        spread[num_particles] = found["q1"].var(0).sum()
    assert spread[2] < 0.25 * spread[1]


@pytest.mark.parametrize(
    "bound",
    [ph.IWELBO(4, "vimco"), ph.VRBound(0.5, 4, "score"), ph.ThermodynamicBound(4, 2, "score")],
    ids=["vimco", "renyi", "thermodynamic"],
)
def test_baselines_of_other_draws_take_variance_away(bound, monkeypatch):
    spread = []
    for _ in range(2):
        torch.manual_seed(0)
        model, guide, learned, _ = discrete_pair(5_000)
        found = gradients(bound, model, guide, learned, torch.full((5_000,), 2))
        spread.append(found["q1"].var(0).sum())
        monkeypatch.setattr(type(bound), "leave_one_out", lambda self, weights: self.reduce(weights).expand_as(weights))
    assert spread[0] < 0.5 * spread[1]


def mixed_pair(size):
    learned = copies(size, tilt=0.4, gain=0.5, shift=0.3, spread=0.6, reach=1.5)

    def model(x):
        with data(size):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)))
            z = pyro.sample("z", dist.Normal(learned["reach"] * c - 1.0, 0.8))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with data(size):
            c = pyro.sample("c", dist.Bernoulli(logits=learned["tilt"] * x))
            pyro.sample("z", dist.Normal(learned["gain"] * x + learned["shift"] * c, learned["spread"]))

    return model, guide, learned


@pytest.mark.parametrize(
    ("bound", "count", "reduce"),
    [
        (ph.TraceELBO(1, "score"), 1, lambda w: w.mean(0)),
        (ph.TraceELBO(2, "score"), 2, lambda w: w.mean(0)),
        (ph.IWELBO(2, "vimco"), 2, lambda w: w.logsumexp(0) - math.log(2)),
    ],
    ids=["score, K=1", "score, K=2", "vimco"],
)
def test_mixed_layers(bound, count, reduce):
    """Score at the discrete site, pathwise at the other: against the discrete one summed out by hand."""
    size = 100_000
    x = X.double().expand(size)
    model, guide, learned = mixed_pair(size)
    found = gradients(bound, model, guide, learned, x)
    _, _, p = mixed_pair(size)
    logits = p["tilt"] * x
    noise = torch.randn(count, size)
    total = 0.0
    for pattern in itertools.product((0.0, 1.0), repeat=count):
        c = torch.tensor(pattern)[:, None]
        log_c = dist.Bernoulli(logits=logits).log_prob(c.expand(count, size))
        loc = p["gain"] * x + p["shift"] * c
        z = loc + p["spread"] * noise
        w = dist.Bernoulli(0.3).log_prob(c) + dist.Normal(p["reach"] * c - 1.0, 0.8).log_prob(z)
        w = w + dist.Normal(z, 0.5).log_prob(x) - log_c - dist.Normal(loc, p["spread"]).log_prob(z)
        total = total + log_c.sum(0).exp() * reduce(w)
    reference = dict(zip(p, torch.autograd.grad(total.sum(), list(p.values())), strict=True))
    for name, values in found.items():
        error = (values.var() / size + reference[name].var() / size).sqrt()
        assert (values.mean() - reference[name].mean()).abs() < 4 * error, name
