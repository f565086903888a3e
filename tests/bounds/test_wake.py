"""Wake and sleep: forward divergences in closed form, the model's own gradient, and who is trained."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from tests.bounds.test_gradients import Copies, gradients, importance, within
from tests.bounds.test_importance import LOC, MEAN, VARIANCE
from tests.linear_gaussian import Oracle, linear_gaussian
from tests.programs import build, data


def gaussian_guide(size):
    values = {"loc": torch.full((size,), LOC), "log_sd": torch.full((size,), 0.5 * math.log(0.8))}

    def guide(p, _):
        with data(size):
            pyro.sample("z", dist.Normal(p["loc"], p["log_sd"].exp()))

    def model():
        with data(size):
            pyro.sample("z", dist.Normal(torch.tensor(MEAN), VARIANCE**0.5))

    return model, Copies(guide, {name: nn.Parameter(value) for name, value in values.items()})


def test_wake_follows_the_forward_divergence():
    """-d KL(p||q): (m - loc)/s2 for the mean, (v + (m - loc)^2)/s2 - 1 for the log-sd; bias of order 1/K."""
    size, num_particles = 2000, 500
    model, guide = gaussian_guide(size)
    found = gradients(ph.WakePhase(num_particles), model, guide, dict(guide.values))
    exact = {"loc": (MEAN - LOC) / 0.8, "log_sd": (VARIANCE + (MEAN - LOC) ** 2) / 0.8 - 1}
    for name, values in found.items():
        error = values.std() / size**0.5
        assert (values.mean() - exact[name]).abs() < 4 * error + 2 / num_particles
    reverse = {"loc": (MEAN - LOC) / VARIANCE, "log_sd": 1 - 0.8 / VARIANCE}
    for name in exact:
        assert abs(exact[name] - reverse[name]) > 0.1  # so that the other divergence would not pass


def test_wake_is_the_self_normalised_log_q():
    pair = build("chain_2")
    pyro.set_rng_seed(4)
    loss = ph.WakePhase(6).loss(pair.model, pair.guide, *pair.args)
    pyro.set_rng_seed(4)
    with torch.no_grad():
        reading = ph.Problem(pair.model, pair.guide)(*pair.args).run(6)
    log_q = sum(reading.log_q.values())
    torch.testing.assert_close(loss, -(reading.log_weights.softmax(0) * log_q).sum())


@pytest.mark.parametrize("objective", [ph.WakePhase(5), ph.SleepPhase()], ids=repr)
def test_only_the_guide_is_trained(objective):
    case = linear_gaussian(2)
    assert objective.trains == ("guide",)
    objective.loss_and_grads(case.model, case.other, case.x)
    assert all(p.grad is None or (p.grad == 0).all() for p in case.model.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in case.other.parameters())


def test_wake_converges_to_the_posterior():
    case = linear_gaussian(2)
    oracle = Oracle(case.model)
    objective = ph.WakePhase(50)
    before = oracle.kl(case.other, case.x).sum()
    optimizer = torch.optim.Adam(case.other.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        objective.loss_and_grads(case.model, case.other, case.x)
        optimizer.step()
    assert oracle.kl(case.other, case.x).sum() < 0.5 * before


def discrete(size):
    """A model of one categorical latent with tables a copy, and its exact posterior."""
    prior = torch.tensor([0.2, 0.5, 0.3]).log()
    likelihood = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]]).log()
    tables = {
        "p": nn.Parameter(prior.expand(size, 3).clone()),
        "x": nn.Parameter(likelihood.expand(size, 3, 2).clone()),
    }

    def model(p, x):
        with data(size):
            z = pyro.sample("z", dist.Categorical(logits=p["p"]))
            pyro.sample("x", dist.Categorical(logits=p["x"][torch.arange(size), z]), obs=x)

    def guide(p, x):
        with data(size):
            pyro.sample("z", dist.Categorical(logits=p["q"]))

    start = nn.Parameter(torch.tensor([0.1, -0.3, 0.4]).expand(size, 3).clone())
    posterior = (prior + likelihood[:, 1]).softmax(0)
    return Copies(model, tables), Copies(guide, {"q": start}), posterior


def test_wake_of_discrete_draws():
    """The gradient in the logits is posterior - q, up to the bias of self-normalisation."""
    size, num_particles = 4000, 400
    model, guide, posterior = discrete(size)
    x = torch.ones(size, dtype=torch.long)
    found = gradients(ph.WakePhase(num_particles), model, guide, dict(guide.values), x)["q"]
    exact = posterior - guide.values["q"][0].detach().softmax(0)
    assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / size**0.5 + 2 / num_particles).all()
    assert exact.abs().max() > 0.05


def test_reweighted_wake_sleep_is_both():
    """The value is the importance-weighted bound; the model follows its gradient, the guide the wake phase."""
    pair = build("chain_2")
    objectives = {"rws": ph.ReweightedWakeSleep(5), "iwelbo": ph.IWELBO(5, "dreg"), "wake": ph.WakePhase(5)}
    losses, of_model, of_guide = {}, {}, {}
    for name, objective in objectives.items():
        pyro.set_rng_seed(3)
        losses[name] = objective.differentiable_loss(pair.model, pair.guide, *pair.args)
        for found, program in ((of_model, pair.model), (of_guide, pair.guide)):
            learned = list(program.parameters())
            found[name] = torch.autograd.grad(losses[name], learned, retain_graph=True, allow_unused=True)
    torch.testing.assert_close(losses["rws"], losses["iwelbo"])
    for ours, expected in zip(of_model["rws"], of_model["iwelbo"], strict=True):
        torch.testing.assert_close(ours, expected)
    for ours, expected in zip(of_guide["rws"], of_guide["wake"], strict=True):
        torch.testing.assert_close(ours, expected)
    assert all(g is None or (g == 0).all() for g in of_model["wake"])


def test_reweighted_wake_sleep_of_discrete_draws():
    """The model's gradient is that of IWELBO in its own tables, which a fixed proposal makes exact to enumerate."""
    size = 20_000
    model, guide, _ = discrete(size)
    x = torch.ones(size, dtype=torch.long)
    found = gradients(ph.ReweightedWakeSleep(2), model, guide, {"p": model.values["p"]}, x)["p"]
    free = model.values["p"][0].detach().clone().requires_grad_()
    log_q = guide.values["q"][0].detach().log_softmax(0)
    weights = free.log_softmax(0) + model.values["x"][0, :, 1].detach() - log_q
    value = sum((log_q[i] + log_q[j]).exp() * importance(weights[[i, j]]) for i in range(3) for j in range(3))
    within(found, torch.autograd.grad(value, free)[0])


def test_sleep_is_the_entropy_of_the_posterior_at_its_best():
    """E log q(z|x) under the joint is minus the posterior's entropy where the guide is exact, and less elsewhere."""
    case = linear_gaussian(2, size=400)
    _, covariance = Oracle(case.model).posterior(case.x)
    dims = covariance.shape[0]
    entropy = (0.5 * torch.logdet(covariance) + 0.5 * dims * (1 + math.log(2 * math.pi))).item()
    exact, other = (
        torch.stack([ph.SleepPhase().loss(case.model, guide, case.x) / 400 for _ in range(40)])
        for guide in (case.exact, case.other)
    )
    within(exact, entropy)
    assert other.mean() > exact.mean() + 4 * (exact.std() + other.std()) / 40**0.5


def test_sleep_has_no_gradient_in_expectation_at_the_posterior():
    case = linear_gaussian(2, size=400)
    learned = list(case.exact.parameters())
    runs = []
    for _ in range(30):
        loss = ph.SleepPhase().differentiable_loss(case.model, case.exact, case.x)
        runs.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, learned)]))
    within(torch.stack(runs), 0.0, errors=5)


def test_sleep_shows_the_guide_the_dream():
    """Not the data: with an observation far from all that the model dreams the loss is finite and as before."""
    case = linear_gaussian(1, size=300)
    near, far = (
        torch.stack([ph.SleepPhase().loss(case.model, case.exact, x) / 300 for _ in range(20)])
        for x in (case.x, case.x + 1e4)
    )
    assert (near.mean() - far.mean()).abs() < 4 * (near.std() + far.std()) / 20**0.5


def test_sleep_needs_the_data_as_an_argument():
    fixed = torch.randn(4)

    def model():
        with data(4):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=fixed)

    def guide():
        with data(4):
            pyro.sample("z", dist.Normal(fixed, pyro.param("sd", torch.ones(()))))

    with pytest.raises(ValueError, match=r"no argument is an observed tensor.*\['x'\]"):
        ph.SleepPhase().loss(model, guide)


@pytest.mark.parametrize("make", [ph.WakePhase, ph.ReweightedWakeSleep])
def test_refusals(make):
    with pytest.raises(ValueError, match="num_particles >= 2, got 1"):
        make(1)
    pair = build("nested_subsampled")
    with pytest.raises(ValueError, match="plate 'columns' shows 3 of 15"):
        make(4).loss(pair.model, pair.guide, *pair.args)
    assert not make(4).is_bound
