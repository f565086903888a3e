"""Chains in time: densities against the joint Gaussian, ragged minibatches, masks, histories, forecasts."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.chains import StateSpace, simulate
from pyro_hvae.kernels import Bernoulli, Categorical, Gaussian, LinearGaussian, Transition
from pyro_hvae.models import deep_markov, variational_rnn

D, C = 3, 2  # widths of x and of the context


def stderr(values):
    return values.std(0) / len(values) ** 0.5


def linear(context_dim=0, history=None):
    """A linear-Gaussian state space with two latents."""
    torch.manual_seed(0)
    wide = D if history == "previous" else 0
    model = StateSpace(
        initial=LinearGaussian(context_dim, 2, scale=1.3),
        transition=LinearGaussian(2 + context_dim + wide, 2, scale=0.5),
        emission=LinearGaussian(2 + context_dim + wide, D, scale=0.8),
        history=history,
    )
    guide = ph.Smoother(
        initial=Gaussian(nn.Linear(5 + context_dim, 4)),
        transition=Gaussian(nn.Linear(2 + 5 + context_dim, 4)),
        rnn=nn.GRU(D + context_dim, 5, batch_first=True),
    )
    return model, guide


def dense_evidence(model, x, context=None, observed=None):
    """log p(x) of one sequence (T, D) from the joint Gaussian, by unrolling the linear maps."""
    steps, kernels = len(x), model.kernels
    mean, rows = torch.zeros(0), []  # z_t = mean_t + M_t noise
    noise = 2 * steps
    means, maps = [], []
    for t in range(steps):
        kernel = kernels["initial" if t == 0 else "transition"]
        weight, own = kernel.weight, kernel.bias
        before = 0 if t == 0 else 2
        if context is not None:
            own = own + weight[:, before:] @ context[t]
        spread = torch.zeros(2, noise)
        spread[:, 2 * t : 2 * t + 2] = kernel.scale_tril
        if t == 0:
            means.append(own), maps.append(spread)
        else:
            means.append(own + weight[:, :2] @ means[-1]), maps.append(weight[:, :2] @ maps[-1] + spread)
    del mean, rows
    kernel = kernels["emission"]
    shift = [kernel.bias + (0 if context is None else kernel.weight[:, 2:] @ context[t]) for t in range(steps)]
    loc = torch.cat([kernel.weight[:, :2] @ means[t] + shift[t] for t in range(steps)])
    mixing = torch.cat([kernel.weight[:, :2] @ maps[t] for t in range(steps)])
    covariance = mixing @ mixing.mT + torch.block_diag(*[kernel.covariance] * steps)
    keep = torch.ones(steps * D, dtype=torch.bool) if observed is None else observed.reshape(-1)
    return dist.MultivariateNormal(loc[keep], covariance[keep][:, keep]).log_prob(x.reshape(-1)[keep])


@pytest.mark.parametrize("bound", [ph.IWELBO(8), ph.SMCBound(8, "multinomial", 1.0), ph.SMCBound(8)], ids=repr)
def test_evidence_against_the_joint_gaussian(bound):
    model, guide = linear(C)
    x, context, mask = torch.randn(5, D), torch.randn(5, C), torch.rand(5, D) > 0.3
    for observed in (None, mask):
        truth = dense_evidence(model, x, context, observed).detach()
        many = 6000
        options = {} if observed is None else {"mask": observed.expand(many, -1, -1)}
        hidden = x if observed is None else torch.where(observed, x, torch.nan)
        data = (hidden.expand(many, -1, -1), context.expand(many, -1, -1))
        ratio = (bound.per_datum(model, guide, *data, **options) - truth).exp()
        assert (ratio.mean() - 1).abs() < 4 * stderr(ratio)


def test_without_resampling_it_is_the_importance_weighted_bound():
    for history in (None, "previous"):
        model, guide = linear(C, history)
        x, context = torch.randn(4, 6, D), torch.randn(4, 6, C)
        lengths, mask = torch.tensor([6, 1, 4, 5]), torch.rand(4, 6, D) > 0.3
        with pyro.poutine.trace() as tape:
            z = guide(x, context, lengths, mask=mask)
        fn = tape.trace.nodes["z"]["fn"]
        torch.testing.assert_close(fn.steps_log_prob(z)[1, 1:], torch.zeros(5))
        values = particles_on(model, guide, z.unsqueeze(0), x, context, lengths, mask=mask)
        run = ph.Problem(model, guide)(x, context, lengths, mask=mask).run(1, {"z": z})
        torch.testing.assert_close(values, run.log_weights[0], rtol=1e-10, atol=1e-10)


def particles_on(model, guide, samples, *args, **kwargs):
    """log Zhat of one particle that is held on given draws."""
    steps = samples.shape[2]
    samples = {f"z{t + 1}": samples[:, :, t] for t in range(steps)}
    return ph.SMCBound(1, "none").from_posterior(model, guide, samples, *args, **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        linear,
        lambda: deep_markov(D, 2, hidden=4, gate=4, features=5, likelihood="gaussian"),
        lambda: variational_rnn(D, 2, hidden=4, likelihood="gaussian"),
        lambda: linear(0, "previous"),
    ],
)
def test_ragged_minibatches_are_the_sequences_one_by_one(make):
    torch.manual_seed(0)
    model, guide = make()
    lengths = torch.tensor([6, 1, 4, 2])
    x = torch.randn(4, 6, D)
    padded = torch.where((torch.arange(6) < lengths[:, None]).unsqueeze(-1), x, 1e30)
    z = guide(x, lengths=lengths).detach()
    problem = ph.Problem(model, guide)(padded, lengths=lengths)
    together = problem.run(1, {"z": z})
    stepwise = particles_on(model, guide, z.unsqueeze(0), padded, lengths=lengths)
    for n, length in enumerate(lengths):
        alone = x[n : n + 1, :length]
        run = ph.Problem(model, guide)(alone).run(1, {"z": z[n : n + 1, :length]})
        torch.testing.assert_close(run.log_p["z"][0, 0], together.log_p["z"][0, n])
        torch.testing.assert_close(run.log_p["x"][0, 0], together.log_p["x"][0, n])
        torch.testing.assert_close(run.log_q["z"][0, 0], together.log_q["z"][0, n])
        torch.testing.assert_close(run.log_weights[0, 0], stepwise[n])
    gradients = []
    for batch in (padded, torch.where(padded == 1e30, -7.0, padded)):
        model.zero_grad(), guide.zero_grad()
        torch.manual_seed(1)
        ph.TraceELBO(2)(model, guide)(batch, lengths=lengths).backward()
        gradients.append([p.grad.clone() for program in (model, guide) for p in program.parameters()])
    torch.testing.assert_close(*gradients)
    assert all(gradient.isfinite().all() for gradient in gradients[0])


@pytest.mark.parametrize("history", [None, "previous", "rnn"])
def test_a_density_integrates_to_one_and_draws_have_it(history):
    """E_prior[p(x|z) / p~(x)] against another factorisation: weights of the model's own draws have mean one."""
    torch.manual_seed(0)
    if history == "rnn":
        model, _ = variational_rnn(D, 2, hidden=4, likelihood="gaussian")
    else:
        model, _ = linear(0, history)
    other, _ = linear(0, None)
    z, x = simulate(model, size=20000, steps=3, width=D)
    for program, sign in ((model, 1), (other, -1)):
        trace = pyro.poutine.trace(pyro.poutine.condition(program, {"z": z})).get_trace(x)
        trace.compute_log_prob()
        density = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
        total = density if sign > 0 else density - total  # log other - log model
    ratio = total.detach().clamp(max=10).exp()
    assert (ratio.mean() - 1).abs() < 5 * stderr(ratio) + 0.02


def test_the_density_of_a_draw_is_that_of_a_copy():
    """The distributions of the steps that made a draw are kept for its density; they have the same gradient."""
    _, guide = linear()
    x, lengths = torch.randn(4, 5, D), torch.tensor([5, 1, 3, 5])
    with pyro.poutine.trace() as tape:
        z = guide(x, lengths=lengths)
    fn, parameters = tape.trace.nodes["z"]["fn"], list(guide.parameters())
    values, gradients = [], []
    for value in (z, z.clone()):
        values.append(fn.log_prob(value))
        gradients.append(torch.autograd.grad(values[-1].sum(), parameters, retain_graph=True))
    assert fn._own_steps(z) is not None
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        blind = fn.rsample()
    assert fn.log_prob(blind).requires_grad  # the draw has no gradient, its density has


def test_filter_sees_the_past_and_smoother_the_future():
    torch.manual_seed(0)
    kernels = {"initial": Gaussian(nn.Linear(5, 4)), "transition": Gaussian(nn.Linear(2 + 5, 4))}
    x = torch.randn(1, 6, D)
    changed = x.clone()
    changed[:, 3] += 1
    for family, reached in ((ph.Filter, [3, 4, 5]), (ph.Smoother, [0, 1, 2, 3])):
        guide = family(**kernels, rnn=nn.GRU(D, 5))  # batch_first=False is as good
        first, second = (guide.features(value, None) for value in (x, changed))
        moved = ((first - second).abs().sum(-1)[0] > 1e-9).nonzero().flatten().tolist()
        assert moved == reached


@pytest.mark.parametrize("bound", [ph.TraceELBO(2), ph.LayerwiseELBO(), ph.IWELBO(2, "dreg"), ph.SMCBound(2)], ids=repr)
@pytest.mark.parametrize(
    "make",
    [lambda: linear(0), lambda: linear(0, "previous"), lambda: variational_rnn(D, 2, likelihood="gaussian", hidden=4)],
)
def test_both_routes_train_every_parameter(make, bound):
    model, guide = make()
    x = torch.randn(4, 5, D)
    bound(model, guide)(x).backward()
    assert all(p.grad is not None for program in (model, guide) for p in program.parameters())
    pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), bound).step(x)
    stored = {id(value.unconstrained()) for value in pyro.get_param_store().values()}
    assert stored == {id(p) for program in (model, guide) for p in program.parameters()}


def test_discrete_chain_against_the_forward_algorithm():
    torch.manual_seed(2)
    first, step, table = torch.rand(3), torch.rand(3, 3), torch.rand(3, 4)
    first, step, table = (value / value.sum(-1, keepdim=True) for value in (first, step, table))
    model = StateSpace(
        initial=Transition(3, probs=first),
        transition=Transition(3, 3, probs=step),
        emission=Transition(4, 3, probs=table),
    )
    guide = ph.Filter(initial=Categorical(nn.Linear(1, 3), 0), transition=OfFeatures())
    x = torch.tensor([0, 3, 1, 1, 2])
    forward = first * table[:, x[0]]
    for symbol in x[1:]:
        forward = (forward @ step) * table[:, symbol]
    values = ph.SMCBound(8, "multinomial", 1.0).per_datum(model, guide, x.expand(20000, -1))
    ratio = (values - forward.sum().log()).exp()
    assert (ratio.mean() - 1).abs() < 4 * stderr(ratio)


class OfFeatures(nn.Module):
    """q(z_t | x_t), whatever z_{t-1} is."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 3)

    def forward(self, parent, context=None):
        return dist.Categorical(logits=self.net(context).expand(*parent.shape, 3))


def test_forecasts_of_a_linear_model():
    model, guide = linear(C)
    x, context = torch.randn(2, 5, D), torch.randn(2, 8, C)
    lengths = torch.tensor([5, 3])
    draws = ph.forecast(model, guide, x, steps=3, num_draws=20000, context=context, lengths=lengths)
    assert draws.shape == (20000, 2, 3, D)
    z = ph.Problem(model, guide)(x, context[:, :5], lengths).run(20000).values["z"]
    last = torch.stack([z[:, 0, 4], z[:, 1, 2]], 1)
    mean = last.mean(0).detach()
    for t in range(3):
        kernel = model.kernels["transition"]
        mean = mean @ kernel.weight[:, :2].mT + context[:, 5 + t] @ kernel.weight[:, 2:].mT + kernel.bias
        emitted = model.kernels["emission"]
        expected = mean @ emitted.weight[:, :2].mT + context[:, 5 + t] @ emitted.weight[:, 2:].mT + emitted.bias
        assert ((draws[:, :, t].mean(0) - expected).abs() < 6 * draws[:, :, t].std(0) / 20000**0.5 + 1e-6).all()


@pytest.mark.parametrize("history", ["previous", "rnn"])
def test_forecasts_go_on_from_the_history(history):
    """A forecast from a cut sequence is distributed as the model's own next step given the same past."""
    torch.manual_seed(0)
    if history == "rnn":
        model, guide = variational_rnn(D, 2, hidden=4, likelihood="gaussian")
    else:
        model, guide = linear(0, "previous")
    x = torch.randn(1, 4, D)
    draws = ph.forecast(model, guide, x, steps=1, num_draws=20000)[:, 0, 0]
    ragged = ph.forecast(model, guide, torch.cat([x, x], 1), steps=1, num_draws=20000, lengths=torch.tensor([4]))[
        :, 0, 0
    ]
    assert ((draws.mean(0) - ragged.mean(0)).abs() < 6 * stderr(draws)).all()
    # by the program: z of the data from the guide, then one more step of the model given them
    z = ph.Problem(model, guide)(x).run(20000).values["z"].detach()
    longer = torch.cat([x, torch.zeros(1, 1, D)], 1)
    data = model.bind(longer)
    h = data.history.all_features(torch.cat([z, torch.zeros_like(z[:, :, :1])], 2))[..., 4, :]
    following = model.transition(z[:, :, 3], h.expand(20000, 1, -1)).sample()
    emitted = model.emission(following, h.expand(20000, 1, -1)).sample()[:, 0]
    assert ((draws.mean(0) - emitted.mean(0)).abs() < 6 * stderr(draws)).all()
    assert ((draws.var(0) / emitted.var(0)).log().abs() < 0.1).all()


def test_draws_in_a_tree_have_a_dim_of_time():
    model, guide = linear()
    tree = ph.to_datatree(model, guide, torch.randn(4, 6, D), num_draws=10)
    assert tree["posterior"]["z"].shape == (1, 10, 4, 6, 2)


def test_fit_learns_a_ragged_data_set():
    torch.set_default_dtype(torch.float32)
    model, guide = deep_markov(4, 2, hidden=8, gate=8, features=8)
    x, lengths = torch.rand(40, 6, 4).round(), torch.randint(1, 7, (40,))
    before = ph.TraceELBO(20).loss(model, guide, x, None, lengths)
    ph.fit(
        model,
        guide,
        {"x": x, "lengths": lengths},
        epochs=15,
        batch_size=20,
        progress=False,
        bound=ph.TraceELBO(),
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
    )
    assert ph.TraceELBO(20).loss(model, guide, x, None, lengths) < before - 10


def test_one_sequence_one_step_and_static_context():
    model, guide = linear(C)
    x, context = torch.randn(1, 1, D), torch.randn(1, C)
    both = [
        ph.IWELBO(3).per_datum(model, guide, x, given)
        for given in (context, context.unsqueeze(1))
        if torch.manual_seed(0) is not None
    ]
    torch.testing.assert_close(*both)
    assert ph.SMCBound(3).per_datum(model, guide, x, context).shape == (1,)
    assert model(size=2, steps=4, context=torch.randn(2, C)).shape == (2, 4, D)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lengths": torch.tensor([3, 9])}, r"between 1 and the 4 steps of the data, got \[3, 9\]"),
        ({"lengths": torch.tensor([0, 3])}, "between 1"),
        ({"lengths": torch.tensor([3])}, r"integers of shape \(2,\)"),
        ({"lengths": torch.tensor([3.0, 2.0])}, "integers"),
        ({"mask": torch.ones(2, 4)}, "mask must be boolean"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, r"of the shape of x \(2, 4, 3\) or \(2, 4\)"),
        ({"context": torch.zeros(2, 5, 2)}, "context has 5 steps where 4"),
    ],
)
def test_arguments_that_do_not_fit(arguments, match):
    model, guide = linear(C if "context" in arguments else 0)
    for program in (model, guide):
        with pytest.raises(ValueError, match=match):
            program(torch.zeros(2, 4, D), **arguments)


def test_programs_that_do_not_fit():
    with pytest.raises(ValueError, match="history is None, 'previous' or a recurrent network, got 'last'"):
        linear(0, "last")
    with pytest.raises(TypeError, match=r"rnn is an nn.RNN, nn.GRU or nn.LSTM over steps, got Linear"):
        ph.Smoother(initial=nn.Linear(1, 1), transition=nn.Linear(1, 1), rnn=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="bidirectional=False"):
        ph.Smoother(initial=nn.Linear(1, 1), transition=nn.Linear(1, 1), rnn=nn.GRU(1, 1, bidirectional=True))
    with pytest.raises(TypeError, match="take a TopDown chain, got StateSpace"):
        ph.impute(*linear(), torch.zeros(2, 4, D), torch.ones(2, 4, D, dtype=torch.bool))
    model, _ = linear(0, "previous")
    with pytest.raises(ValueError, match="simulate"):
        model(size=2, steps=3)
    with pytest.raises(ValueError, match="pass width="):
        simulate(model, size=2, steps=3)
    with pytest.raises(ValueError, match="pass steps="):
        linear()[0](size=2)
    with pytest.raises(ValueError, match=r"events of shape \(3,\), but an observation has shape \(5,\)"):
        linear()[0](torch.zeros(2, 4, 5))
    wide = StateSpace(
        initial=LinearGaussian(0, 2),
        transition=LinearGaussian(2, 2),
        emission=LinearGaussian(2, D, covariance=torch.eye(D)),
    )
    with pytest.raises(ValueError, match="does not factorise"):
        wide(torch.zeros(2, 4, D), mask=torch.ones(2, 4, D, dtype=torch.bool))
    assert wide(torch.zeros(2, 4, D), mask=torch.ones(2, 4, dtype=torch.bool)).shape == (2, 4, D)
    assert isinstance(deep_markov(4, 2)[0].kernels["emission"], Bernoulli)


def test_explain_says_that_a_sequence_has_no_closed_divergence():
    model, guide = deep_markov(2, 3, hidden=4, gate=4, features=4)
    (row, _) = ph.explain(ph.LayerwiseELBO(), model, guide, torch.zeros(2, 5, 2)).rows
    assert row.treatment == "Monte Carlo"
    assert "no closed form" in row.why
