"""Particles along a chain: oracle 11, without resampling the importance-weighted bound, gradients, refusals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from torch import nn

import pyro_hvae as ph
from pyro_hvae.bounds.resampling import ancestors_of, gather
from pyro_hvae.bounds.stepwise import stages_of
from pyro_hvae.kernels import Bernoulli, Gaussian, LinearGaussian, StandardNormal, Transition
from pyro_hvae.nn import DenoisingMLP
from tests.linear_gaussian import Oracle, linear_gaussian
from tests.state_space import ORACLE_EVIDENCE, Bootstrap, Linear, oracle

EACH_STEP = {"resample": "multinomial", "ess_threshold": 1.0}


def stderr(values):
    return values.std(0) / len(values) ** 0.5


# -- oracle 11


def test_kalman():
    x = oracle()
    joint = torch.empty(5, 5)
    for s in range(5):
        for t in range(5):
            var = 0.81 ** min(s, t) + 0.25 * sum(0.81**i for i in range(min(s, t)))
            joint[s, t] = 0.9 ** abs(s - t) * var
    dense = dist.MultivariateNormal(torch.zeros(5), joint + 0.64 * torch.eye(5)).log_prob(x)
    torch.testing.assert_close(Linear().kalman(x), dense, rtol=0, atol=1e-10)
    assert abs(float(dense) - ORACLE_EVIDENCE) < 5e-8


@pytest.mark.parametrize(
    ("count", "resampled", "weighted"), [(4, -9.487, -9.552), (16, -8.940, -8.987), (64, -8.836, -8.853)]
)
def test_figures_of_the_oracle(count, resampled, weighted):
    model, x = Linear(), oracle(12000)
    error = {4: 0.011, 16: 0.004, 64: 0.002}[count]  # of the figures
    for bound, figure in ((ph.SMCBound(count, **EACH_STEP), resampled), (ph.SMCBound(count, "none"), weighted)):
        values = bound.per_datum(model, Bootstrap(model), x)
        assert (values.mean() - figure).abs() < 4 * (stderr(values) ** 2 + error**2).sqrt()
        assert values.mean() < ORACLE_EVIDENCE


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("scheme", ["systematic", "multinomial", "none"])
def test_mean_is_the_evidence(scheme, threshold):
    model = Linear()
    values = ph.SMCBound(8, scheme, threshold).per_datum(model, Bootstrap(model, wide=1.3), oracle(20000))
    ratio = (values - ORACLE_EVIDENCE).exp()
    assert (ratio.mean() - 1).abs() < 4 * stderr(ratio)


def test_resampling_beats_weighting_and_systematic_beats_multinomial():
    model = Linear()
    x = oracle(1).repeat(4000, 8)
    means = [
        ph.SMCBound(16, scheme, 1.0).per_datum(model, Bootstrap(model), x).mean()
        for scheme in ("none", "multinomial", "systematic")
    ]
    assert means[0] < means[1] - 5
    assert means[1] < means[2] - 0.05


@pytest.mark.parametrize("scheme", ["systematic", "multinomial"])
def test_exact_twist_has_no_variance(scheme):
    model = Linear()
    bound = ph.SMCBound(4, scheme, 1.0, twist=model.twist)
    x = torch.randn(50, 9)
    exact = bound.per_datum(model, Bootstrap(model, exact=True), x)
    torch.testing.assert_close(exact, model.kalman(x).detach(), rtol=0, atol=1e-10)
    repeated = bound.per_datum(model, Bootstrap(model, exact=True), x[:1].expand(200, -1))
    assert repeated.var() < 1e-20


def test_gradient_at_the_exact_twist_is_kalmans():
    model, x = Linear(), torch.randn(3, 6)
    guide, parameters = Bootstrap(model, exact=True), list(model.parameters())
    loss = ph.SMCBound(4, twist=model.twist).differentiable_loss(model, guide, x)
    expected = torch.autograd.grad(model.kalman(x).sum(), parameters)
    for mine, exact in zip(torch.autograd.grad(-loss, parameters), expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-9)


def test_twist_keeps_the_mean():
    model = Linear()
    values = ph.SMCBound(8, twist=lambda step, z, x: -0.3 * (z - 0.5 * step) ** 2).per_datum(
        model, Bootstrap(model), oracle(20000)
    )
    ratio = (values - ORACLE_EVIDENCE).exp()
    assert (ratio.mean() - 1).abs() < 4 * stderr(ratio)


def test_conditional_particles_bound_from_above():
    model, x = Linear(), oracle(20000)
    exact = ph.SMCBound(1, "none").filter(model, Bootstrap(model, exact=True), x)
    draws = exact.paths()
    for bound in (ph.SMCBound(8, **EACH_STEP), ph.SMCBound(8, "none"), ph.SMCBound(8, "multinomial", 0.5)):
        above = bound.from_posterior(model, Bootstrap(model, wide=1.3), draws, x)
        inverse = (ORACLE_EVIDENCE - above).exp()
        assert (inverse.mean() - 1).abs() < 4 * stderr(inverse)
        assert above.mean() > ORACLE_EVIDENCE + 3 * stderr(above)


def test_discrete_chain_against_the_forward_algorithm():
    torch.manual_seed(3)
    tables = [torch.rand(3), torch.rand(3, 4), torch.rand(4, 2)]
    tables = [table / table.sum(-1, keepdim=True) for table in tables]
    model = ph.TopDown(
        z2=Transition(3, probs=tables[0]), z1=Transition(4, 3, probs=tables[1]), x=Transition(2, 4, probs=tables[2])
    )
    guide = ph.BottomUp(z1=Transition(4, 2), z2=Transition(3, 4))
    forward = (tables[0] @ tables[1] @ tables[2]).log()
    x = torch.tensor([0, 1]).repeat(20000)
    values = ph.SMCBound(4, **EACH_STEP).per_datum(model, guide, x)
    for state in range(2):
        ratio = (values[x == state] - forward[state]).exp()
        assert (ratio.mean() - 1).abs() < 4 * stderr(ratio)


# -- gradients


def mean_gradients(bound, model, guide, x, repeats=25):
    parameters = list(model.parameters())
    drawn = []
    for _ in range(repeats):
        loss = bound(model, guide)(x) / len(x)
        drawn.append(torch.stack(torch.autograd.grad(-loss, parameters)))
    drawn = torch.stack(drawn)
    return drawn.mean(0), stderr(drawn)


def test_score_is_unbiased_and_ignore_is_not():
    # the truth is Kalman's gradient at many particles, up to the bias of log Zhat, which falls as 1/K
    model = Linear()
    guide, x = Bootstrap(model), oracle(1000)
    exact = torch.stack(torch.autograd.grad(model.kalman(oracle())[0], list(model.parameters())))
    for count, bias in ((32, 0.25), (128, 0.07)):
        mean, error = mean_gradients(ph.SMCBound(count, gradient="score", **EACH_STEP), model, guide, x, 10)
        assert ((mean - exact).abs() < 4 * error + bias).all()
    ignored, error = mean_gradients(ph.SMCBound(128, **EACH_STEP), model, guide, x, 5)
    assert ignored[2] - exact[2] < -1.0 - 4 * error[2]  # it misses 1.2 of 2.9 however many particles there are


def test_score_matches_differences_of_the_mean():
    model = Linear()
    guide = Bootstrap(model)
    bound = ph.SMCBound(4, gradient="score", **EACH_STEP)
    mean, error = mean_gradients(bound, model, guide, oracle(2000), 30)
    width = 0.1
    for index, parameter in enumerate(model.parameters()):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * width
            sides.append(bound.per_datum(model, guide, oracle(100_000)))
            with torch.no_grad():
                parameter -= sign * width
        slope = (sides[0].mean() - sides[1].mean()) / (2 * width)
        slope_error = (stderr(sides[0]) ** 2 + stderr(sides[1]) ** 2).sqrt() / (2 * width)
        assert (mean[index] - slope).abs() < 4 * (error[index] ** 2 + slope_error**2).sqrt() + 0.02


def test_score_of_discrete_draws():
    torch.manual_seed(3)
    model = ph.TopDown(z2=Transition(3), z1=Transition(4, 3), x=Transition(2, 4))
    guide = ph.BottomUp(z1=Transition(4, 2), z2=Transition(3, 4))
    bound = ph.SMCBound(3, gradient="score", **EACH_STEP)
    table, x = guide.kernels["z2"].logits, torch.ones(4000, dtype=torch.long)
    drawn = torch.stack([torch.autograd.grad(-bound(model, guide)(x) / len(x), table)[0][2, 1] for _ in range(25)])
    width, sides = 0.5, []
    for sign in (1, -1):
        with torch.no_grad():
            table[2, 1] += sign * width
        sides.append(bound.per_datum(model, guide, x.repeat(50)))
        with torch.no_grad():
            table[2, 1] -= sign * width
    slope = (sides[0].mean() - sides[1].mean()) / (2 * width)
    slope_error = (stderr(sides[0]) ** 2 + stderr(sides[1]) ** 2).sqrt() / (2 * width)
    assert (drawn.mean() - slope).abs() < 4 * (stderr(drawn) ** 2 + slope_error**2).sqrt() + 1e-3


# -- every chain of the package


def chains(name):
    torch.manual_seed(0)
    x = torch.rand(3, 6).round()
    if name == "hvae":
        return (*ph.hvae(6, (2, 3, 4), hidden=(8,)), x)
    if name == "ladder":
        return (*ph.ladder_vae(6, (2, 3, 4), hidden=(8,)), x)
    if name == "diffusion":
        return (*ph.vdm(DenoisingMLP(6), event_shape=6, num_layers=8), x)
    case = linear_gaussian(3)
    if name == "reversed":
        return case.model, ph.Reversed(case.other), case.x
    return case.model, case.other, case.x


CHAINS = ["hvae", "ladder", "diffusion", "reversed", "linear"]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", CHAINS)
def test_without_resampling_it_is_the_importance_weighted_bound(name, count):
    model, guide, x = chains(name)
    results = []
    for bound in (ph.IWELBO(count), ph.SMCBound(count, "none")):
        model.zero_grad(), guide.zero_grad()
        torch.manual_seed(1)
        value = bound.per_datum(model, guide, x)
        torch.manual_seed(2)
        bound(model, guide)(x).backward()
        gradients = [p.grad.clone() for program in (model, guide) for p in program.parameters()]
        results.append((value, gradients))
    (first, first_gradients), (second, second_gradients) = results
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first_gradients, second_gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "reversed"])
def test_evidence_of_linear_gaussian_chains(name):
    model, guide, x = chains(name)
    truth = Oracle(model).log_evidence(x).detach()
    draws = ph.SMCBound(8, ess_threshold=1.0).per_datum(model, guide, x.repeat_interleave(4000, 0))
    ratio = (draws.reshape(len(x), -1).T - truth).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * stderr(ratio)).all()


def test_exact_guides_and_the_marginals_as_twists_have_no_variance():
    case = linear_gaussian(3)
    known = Oracle(case.model)

    def log_marginal(step, z, x):
        return dist.MultivariateNormal(known.mean[step + 1], known.cov[step + 1]).log_prob(z)

    bound = ph.SMCBound(4, "multinomial", 1.0, twist=log_marginal)
    values = torch.stack([bound.per_datum(case.model, case.exact, case.x) for _ in range(5)])
    torch.testing.assert_close(values, known.log_evidence(case.x).detach().expand(5, -1), rtol=0, atol=1e-10)
    assert values.var(0).max() < 1e-20


@pytest.mark.parametrize("gradient", ["ignore", "score"])
@pytest.mark.parametrize("name", CHAINS)
def test_both_routes_train_every_parameter(name, gradient):
    model, guide, x = chains(name)
    bound = ph.SMCBound(3, gradient=gradient, **EACH_STEP)
    for program in (model, guide):
        for parameter in program.parameters():
            parameter.requires_grad_(True)
    bound(model, guide)(x).backward()
    pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), bound).step(x)
    for program in (model, guide):
        assert all(p.grad is not None for p in program.parameters())
    assert len(pyro.get_param_store()) == sum(1 for program in (model, guide) for _ in program.parameters())


def test_masks_context_and_minibatches():
    torch.manual_seed(0)
    model, guide = ph.hvae(6, (2, 3), hidden=(8,), context_dim=2)
    x, context, mask = torch.rand(3, 6).round(), torch.randn(3, 2), torch.rand(3, 6) > 0.3
    hidden = torch.where(mask, x, torch.nan)
    for options in ({}, {"mask": mask}, {"mask": mask[:, 0]}):
        values = []
        for bound in (ph.IWELBO(4), ph.SMCBound(4, "none")):
            torch.manual_seed(1)
            values.append(bound.per_datum(model, guide, x, context, **options))
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    assert ph.SMCBound(4).per_datum(model, guide, hidden, context=context, mask=mask).isfinite().all()
    torch.manual_seed(1)
    whole = ph.SMCBound(4).loss(model, guide, x, context=context)
    torch.manual_seed(1)
    part = ph.SMCBound(4).loss(model, guide, x, context=context, data_size=30)
    torch.testing.assert_close(part, 10 * whole)


def test_fit_trains_a_chain_and_its_twist():
    class Twist(nn.Module):
        def __init__(self):
            super().__init__()
            self.curvature = nn.Parameter(torch.zeros(()))

        def forward(self, step, z, x):
            return -0.5 * self.curvature * z.square().sum(-1)

    torch.set_default_dtype(torch.float32)
    model, guide = ph.hvae(6, (2, 3), hidden=(8,))
    twist = Twist()
    x = torch.rand(32, 6).round()
    bound = ph.SMCBound(4, ess_threshold=1.0, twist=twist)
    before = bound.loss(model, guide, x)
    ph.fit(model, guide, x, bound=bound, epochs=20, batch_size=16, progress=False)
    assert bound.loss(model, guide, x) < before
    assert twist.curvature != 0


# -- parts


@pytest.mark.parametrize("scheme", ["systematic", "multinomial"])
def test_ancestors_have_the_right_mean_for_each_datum(scheme):
    log_weights = torch.randn(5, 3).log_softmax(0)
    log_weights[2, 1] = -torch.inf
    drawn = ancestors_of(log_weights.repeat(1, 20000), scheme)
    copies = torch.stack([(drawn == k).sum(0) for k in range(5)]).reshape(5, -1, 3).to(log_weights)
    error = copies.std(1) / 20000**0.5
    expected = 5 * log_weights.softmax(0)
    assert ((copies.mean(1) - expected).abs() <= 4 * error + 1e-12).all()
    if scheme == "systematic":
        assert ((copies - expected.unsqueeze(1)).abs() < 1).all()
    assert copies[2, :, 1].sum() == 0


def test_gather_takes_ancestors_of_each_datum():
    value = torch.arange(24.0).reshape(3, 4, 2)
    ancestors = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 0], [1, 1, 1, 0]])
    taken = gather(value, ancestors)
    for k in range(3):
        for n in range(4):
            torch.testing.assert_close(taken[k, n], value[ancestors[k, n], n])


def test_data_without_a_possible_particle_have_evidence_zero():
    model = ph.TopDown(
        z=Transition(2, probs=torch.tensor([0.5, 0.5])), x=Transition(2, 2, probs=torch.eye(2)[:1].repeat(2, 1))
    )
    guide = ph.BottomUp(z=Transition(2, 2))
    values = ph.SMCBound(3, **EACH_STEP).per_datum(model, guide, torch.tensor([0, 1]))
    assert values[0].isfinite()
    assert values[1] == -torch.inf


def test_paths_of_the_particles_are_smoothed():
    model, x = Linear(), oracle(400)
    filtered = ph.SMCBound(200, ess_threshold=0.5).filter(model, Bootstrap(model), x)
    weights = filtered.log_weights.softmax(0)
    paths = filtered.paths()
    exact = ph.SMCBound(400, "none").filter(model, Bootstrap(model, exact=True), x[:100]).paths()
    for site in ("z0", "z4"):
        mean, second = (weights * paths[site]).sum(0), (weights * paths[site] ** 2).sum(0)
        for mine, power in ((mean, 1), (second, 2)):
            truth = (exact[site] ** power).mean()
            assert (mine.mean() - truth).abs() < 5 * stderr(mine) + 0.02
    assert filtered.ess.shape == filtered.resampled.shape == (5, 400)


def test_values_with_state_are_carried_with_their_particles():
    """A running sum as a value of the guide and of the model gives the same weights as sites that hold it."""

    class Summed(Linear):
        def transition(self, before):
            return super().transition(before)

        def stepwise(self, x):
            nodes = [("value", "s0", ("z0",), lambda z: z)]
            nodes += [("value", f"s{t}", (f"s{t - 1}", f"z{t}"), torch.add) for t in range(1, x.shape[1])]
            density = lambda s, t: dist.Normal(s, 1.0).log_prob(x[:, t])  # noqa: E731
            nodes += [("factor", f"x{t}", (f"s{t}",), lambda s, t=t: density(s, t)) for t in range(x.shape[1])]
            priors = [node for node in super().stepwise(x) if node[1].startswith("z")]
            return nodes + priors

        def forward(self, x, visit=None):
            if visit is not None:
                return visit(self)
            z, total = None, 0.0
            with pyro.plate("data", x.shape[0], dim=-1):
                for t in range(x.shape[1]):
                    z = pyro.sample(f"z{t}", self.transition(z))
                    total = total + z
                    pyro.sample(f"x{t}", dist.Normal(total, 1.0), obs=x[:, t])

    model, x = Summed(), oracle(20000)
    torch.manual_seed(1)
    first = ph.IWELBO(4).per_datum(model, Bootstrap(model), x[:50])
    torch.manual_seed(1)
    torch.testing.assert_close(ph.SMCBound(4, "none").per_datum(model, Bootstrap(model), x[:50]), first)
    one = (ph.SMCBound(16).per_datum(model, Bootstrap(model), x)).exp()
    other = (ph.IWELBO(16).per_datum(model, Bootstrap(model), x)).exp()
    assert (one.mean() - other.mean()).abs() < 4 * (stderr(one) ** 2 + stderr(other) ** 2).sqrt()


# -- refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resample": "residual"}, "unknown resample 'residual'"),
        ({"ess_threshold": 1.5}, "between 0 and 1; got 1.5"),
        ({"ess_threshold": float("nan")}, "between 0 and 1"),
        ({"gradient": "score"}, "resample='multinomial', ess_threshold=1.0"),
        ({"gradient": "score", "resample": "multinomial"}, "ess_threshold=1.0"),
        ({"gradient": "dreg"}, "no gradient 'dreg'"),
    ],
)
def test_arguments_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        ph.SMCBound(4, **options)


def test_programs_without_steps():
    from pyro_hvae.conjugate import guide, model

    with pytest.raises(TypeError, match=r"the model model has no method stepwise.*IWELBO"):
        ph.SMCBound(4).per_datum(model, guide(), torch.zeros(2))


def test_discrete_draws_need_the_score():
    model = ph.TopDown(z=Transition(2), x=Transition(2, 2))
    guide = ph.BottomUp(z=Transition(2, 2))
    with pytest.raises(ValueError, match="use gradient='score'"):
        ph.SMCBound(3)(model, guide)(torch.tensor([0, 1]))


def test_summed_out_and_global_latents():
    model = ph.TopDown(z=Transition(2, enumerate=True), x=Transition(2, 2))
    with pytest.raises(ValueError, match="summed out"):
        ph.SMCBound(3).per_datum(model, ph.BottomUp(z=Transition(2, 2, enumerate=True)), torch.tensor([0, 1]))
    kernel = LinearGaussian(2, 3)
    kernel.weight = PyroSample(dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    bayesian = ph.TopDown(z=StandardNormal(2), x=kernel)

    class Guide(ph.BottomUp):
        def forward(self, x, context=None, *, visit=None, **options):
            if visit is None:
                pyro.sample("model.x.weight", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
            return super().forward(x, context, visit=visit, **options)

    with pytest.raises(ValueError, match="plates"):
        ph.SMCBound(3).per_datum(bayesian, Guide(z=Gaussian(nn.Linear(3, 4))), torch.zeros(4, 3))


def test_data_outside_of_the_support():
    model, guide = ph.hvae(6, (2,), hidden=(4,))
    with pytest.raises(ValueError, match="support of Bernoulli"):
        ph.SMCBound(3).per_datum(model, guide, torch.full((2, 6), 0.5))
    assert isinstance(model.kernels["x"], Bernoulli)


def test_lists_that_do_not_fit():
    draw = ("draw", "z", (), lambda: None)
    with pytest.raises(ValueError, match=r"node 'x' of the model depends on \['y'\]"):
        stages_of([draw], [("factor", "x", ("y",), lambda y: y)])
    with pytest.raises(ValueError, match="node 'z' of the model is of kind 'draw'"):
        stages_of([draw], [draw])
    with pytest.raises(ValueError, match="draws nothing"):
        stages_of([], [])


def test_samples_of_the_posterior_that_do_not_fit():
    model, guide, x = chains("hvae")
    bound = ph.SMCBound(3, "multinomial")
    with pytest.raises(ValueError, match="resample='multinomial'"):
        ph.SMCBound(3).from_posterior(model, guide, {}, x)
    with pytest.raises(ValueError, match=r"'z1' have shape \(3, 2\)"):
        bound.from_posterior(model, guide, {"z1": torch.zeros(3, 2)}, x)
    with pytest.raises(ValueError, match="samples lack"):
        bound.from_posterior(model, guide, {"z1": torch.zeros(1, 3, 2)}, x)
