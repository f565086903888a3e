"""What amortize reads, refuses and returns; families; ways of training; new data of another size."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.amortized import amortize
from pyro_hvae.amortized.families import make_head
from pyro_hvae.amortized.transforms import PackedCholesky, Skew


def pair(x, data_size=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def evidence(x):
    covariance = 2 * torch.eye(len(x)) + 1
    return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def fit(model, guide, data, bound, steps, **options):
    ph.fit(
        model, guide, data, bound=bound, steps=steps, progress=False, check_every=None, terms_every=10**6,
        optimizer=adam, **{"batch_size": None, **options},
    )  # fmt: skip


def test_minibatches_are_scaled_to_the_whole_data():
    torch.manual_seed(0)
    x = 1 + torch.randn(60)
    guide = amortize(pair, x, hidden=())
    fit(pair, guide, x, ph.TraceELBO(num_particles=4, gradient="stl"), 200, batch_size=20)
    elbo = ph.TraceELBO(num_particles=500).per_datum(pair, guide, x).sum()
    assert abs(evidence(x) - elbo) < 0.01 * len(x)


def test_pyro_svi_trains_every_parameter():
    torch.manual_seed(0)
    x = 1 + torch.randn(30)
    guide = amortize(pair, x, hidden=())
    before = {name: value.clone() for name, value in guide.named_parameters()}
    svi = pyro.infer.SVI(pair, guide, pyro.optim.Adam({"lr": 0.01}), loss=pyro.infer.Trace_ELBO())
    for _ in range(5):
        svi.step(x)
    assert not [name for name, value in guide.named_parameters() if torch.equal(value, before[name])]
    assert not [name for name, _ in guide.named_parameters() if name.startswith("model")]


def test_a_minibatch_that_the_model_draws_is_that_of_the_guide():
    torch.manual_seed(0)

    def model(x):
        with pyro.plate("data", len(x), subsample_size=5) as indices:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x[indices])

    x = torch.arange(20.0)
    guide = amortize(model, x, hidden=())
    part = guide.conditional("z")
    with torch.no_grad():  # set it by hand to draw z at x
        part.encoder.skip.weight[0] = guide.input("x").scale / part.head.scale
        part.encoder.bias[0] = (guide.input("x").center - part.head.loc) / part.head.scale
    run = ph.Problem(model, guide)(x).run(1)
    seen, drawn = run.model_trace.nodes["x"]["value"], run.guide_trace.nodes["z"]["value"]
    assert run.guide_trace.nodes["z"]["scale"] == 4.0
    assert ((drawn - seen).abs() < 2.0).all()
    assert not torch.equal(run.model_trace.nodes["data"]["value"], torch.arange(5))


@pytest.mark.parametrize(("family", "bound"), [
    ("enumerate", ph.TraceELBO()), ("logits", ph.TraceELBO(num_particles=10, gradient="score")),
])  # fmt: skip
def test_discrete_latents(family, bound):
    torch.manual_seed(0)
    probs = torch.tensor([0.3, 0.7])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(probs))
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    x = 2.0 * torch.distributions.Categorical(probs).sample((100,)) + torch.randn(100)
    guide = amortize(model, x, hidden=(), families={"k": family})  # the logits of the posterior are linear in x
    fit(model, guide, x, bound, 150)
    joint = torch.stack([dist.Normal(2.0 * k, 1.0).log_prob(x) + probs[k].log() for k in range(2)])
    gap = (
        joint.logsumexp(0).mean()
        - ph.TraceELBO(num_particles=1 if family == "enumerate" else 200).per_datum(model, guide, x).mean()
    )
    assert -0.01 < gap < 0.01


def test_discrete_latents_that_the_model_sums_out_are_not_drawn():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(1.0 * k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = amortize(model, torch.randn(5))
    assert guide.inverse.inputs == {"z": ("x",)}
    fit(model, guide, torch.randn(5), ph.TraceELBO(), 2)


def test_data_of_another_size_and_the_same_masks():
    def model(x, mask):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", x.shape[1], dim=-1), poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    torch.manual_seed(0)
    guide = amortize(model, torch.randn(6, 3), torch.rand(6, 3) < 0.7)
    x = torch.randn(4, 5)
    x[0, 1] = float("nan")
    mask = ~x.isnan()
    value = guide(x, mask)["z"]
    assert value.shape == (4, 1)
    assert value.isfinite().all()


def test_observations_of_obs_mask():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            value = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x, obs_mask=mask)
            pyro.sample("y", dist.Normal(value, 1.0), obs=x + 1.0)

    torch.manual_seed(0)
    x, mask = torch.randn(30), torch.rand(30) < 0.6
    guide = amortize(model, x, mask, hidden=())
    fit(model, guide, {"x": x, "mask": mask}, ph.TraceELBO(gradient="stl"), 200)
    elbo = ph.TraceELBO(num_particles=300).per_datum(model, guide, x, mask).sum()
    both = dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(x, 1.0).log_prob(x + 1)
    exact = torch.where(mask, both, dist.Normal(0.0, 2**0.5).log_prob(x + 1)).sum()
    assert abs(exact - elbo) < 0.01 * len(x)


def test_simulated_data_alone_and_pooled_data():
    """Sleep phase on m ~ N(0, 1), x_n ~ N(m, 1): the posterior mean is the sum of x over N + 1."""
    torch.manual_seed(0)

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    guide = amortize(model, torch.zeros(9), hidden=(), pooled=True)
    assert guide.inverse.how == {"m": "pooled"}
    fit(model, guide, torch.zeros(9), ph.SleepPhase(), 800, schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(
        o, lambda step: max(0.01, 1 - step / 800)))  # fmt: skip
    errors, spreads = [], []
    for _ in range(20):
        x = torch.randn(()) + torch.randn(9)
        drawn = ph.Problem(model, guide)(x).run(2000).guide_trace.nodes["m"]["value"].flatten()
        errors.append(drawn.mean() - x.sum() / 10)
        spreads.append(drawn.std())
    assert torch.stack(errors).abs().mean() < 0.05
    assert abs(torch.stack(spreads).mean() - 0.1**0.5) < 0.03


def test_programs_of_the_user_sites_left_out_and_merged():
    torch.manual_seed(0)
    x = torch.randn(6)

    class Mean(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__("own")
            self.loc = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, data_size=None):
            pyro.sample("mean", dist.Normal(self.loc, 0.5))

    guide = amortize(pair, x, guides=[Mean()])
    assert guide.inverse.inputs == {"z": ("mean", "x")}
    assert "given0.loc" in dict(guide.named_parameters())
    fit(pair, guide, x, ph.TraceELBO(), 3)
    without = amortize(pair, x, leave_out=["mean"])
    assert without.inverse.inputs == {"z": ("x",)}
    assert list(without(x)) == ["z"]

    def two(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    assert amortize(two, x).inverse.inputs == {"b": ("x",), "a": ("b",)}
    assert amortize(two, x, merge=[("a", "b")]).inverse.inputs == {"a": ("x",), "b": ("a", "x")}


def test_covariates_groups_and_reasons():
    def schools(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    guide = amortize(schools, torch.ones(8) + torch.rand(8), torch.randn(8))
    assert guide.inverse.inputs["theta"] == ("sigma (argument)", "mu", "tau", "y")
    assert guide.inverse.reasons["theta"] == {
        "sigma (argument)": "parent of the child y", "mu": "parent", "tau": "parent", "y": "child",
    }  # fmt: skip
    assert guide.inverse.how == {"tau": "free", "mu": "free", "theta": "encoded"}
    assert {name: value.shape for name, value in guide(torch.ones(3), torch.zeros(3)).items()}["theta"] == (3,)


def test_elements_that_the_posterior_couples_are_named():
    def regression(group, y):
        with pyro.plate("groups", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[..., group], 1.0), obs=y)

    guide = amortize(regression, torch.tensor([0, 1, 2, 1, 0]), torch.randn(5))
    assert guide.inverse.how == {"a": "free"}
    assert guide.inverse.coupled == {"a": "y"}
    assert "may depend on each other through y" in str(guide.inverse)


SUPPORTS = [
    dist.Normal(torch.zeros(5, 3), 1.0).to_event(1), dist.HalfCauchy(torch.ones(5)), dist.Dirichlet(torch.ones(5, 4)),
    dist.LKJCholesky(3, torch.tensor(1.0)), dist.Wishart(torch.tensor(5.0), torch.eye(3)),
    dist.Normal(torch.zeros(5, 2, 2), 1.0).to_event(2), dist.Uniform(torch.zeros(2, 3), 2.0).to_event(1),
    dist.MultivariateNormal(torch.zeros(60), torch.eye(60)), dist.Beta(torch.ones(2), 1.0),
    dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()),
]  # fmt: skip


@pytest.mark.parametrize("fn", SUPPORTS, ids=lambda fn: type(fn).__name__)
@pytest.mark.parametrize("family", [None, "skewed", "low_rank", "diagonal"])
@pytest.mark.filterwarnings("ignore:Singular sample")
def test_families_are_on_the_support_and_start_near_the_prior(fn, family):
    torch.manual_seed(0)
    head = make_head("z", fn, family, fn.sample((200,)))
    made = head(torch.zeros(*fn.batch_shape, head.outputs), fn)
    value = made.rsample()
    assert (made.batch_shape, made.event_shape) == (fn.batch_shape, fn.event_shape)
    assert fn.support.check(value).all()
    assert made.log_prob(value.detach().clone()).isfinite().all()


@pytest.mark.parametrize(("skew", "tail"), [(0.0, 1.0), (1.3, 1.0), (-1.9, 0.5), (0.4, 2.5)])
def test_bent_line(skew, tail):
    bend, x = Skew(torch.tensor(skew), torch.tensor(tail)), torch.linspace(-6, 6, 101)
    slope = torch.autograd.functional.jacobian(lambda v: bend(v).sum(), x)
    torch.testing.assert_close(bend.log_abs_det_jacobian(x, bend(x)), slope.log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bend.inv(bend(x)), x, rtol=1e-8, atol=1e-8)
    assert float(bend(torch.zeros(()))) == 0
    assert float(slope[50]) == pytest.approx(1.0)  # median and scale stay
    assert ((bend(x) + bend(-x)).mean() > 0) == (skew > 0)


def test_skewed_head_is_a_density():
    """Of two dependent positive numbers: its integral, by importance from a wide Gaussian on the real line, is 1."""
    fn = dist.HalfCauchy(torch.ones(2)).to_event(1)
    head = make_head("z", fn, None, fn.sample((2000,)))
    assert repr(head) == "skewed Gaussian in 2 dims"
    made = head(torch.tensor([0.3, -0.2, 0.5, 0.1, 0.9, -0.7, 0.3, -0.2, 0.6]), fn)
    with torch.no_grad():
        free = made.sample((20_000,)).log()
        wide = dist.MultivariateNormal(free.mean(0), 4 * free.mT.cov())
        z = wide.sample((100_000,))
        ratio = (made.log_prob(z.exp()) + z.sum(-1) - wide.log_prob(z)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 100_000**0.5
    assert ratio.std() < 10


@pytest.mark.parametrize("product", [False, True])
def test_packed_triangular_matrices(product):
    transform, x = PackedCholesky(product), torch.randn(6)
    rows, columns = torch.tril_indices(3, 3)
    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v)[rows, columns], x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, transform(x)), torch.linalg.slogdet(jacobian)[1])
    torch.testing.assert_close(transform.inv(transform(x)), x)


def depends(x):
    a = pyro.sample("a", dist.HalfNormal(1.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def improper(x):
    a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def unobserved(x):
    pyro.sample("a", dist.Normal(0.0, 1.0))


def branches(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    if a > 0.1:
        pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def no_latents(x):
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


@pytest.mark.parametrize(("model", "message"), [
    (depends, "support of site 'b' depends on other draws"), (improper, "can't be drawn from its prior"),
    (unobserved, "observes nothing"), (branches, "change from draw to draw"), (no_latents, "draws no latent"),
])  # fmt: skip
def test_models_that_can_not_be_inverted(model, message):
    with pytest.raises(ValueError, match=message):
        amortize(model, torch.tensor(0.5))


@pytest.mark.parametrize(("options", "message"), [
    ({"families": {"z": "logits"}}, "continuous"), ({"families": {"y": "full"}}, "this guide draws"),
    ({"leave_out": ["y"]}, "latents are"), ({"merge": [("mean", "z")]}, "different plates"),
    ({"leave_out": "z"}, "write a list"), ({"guides": [lambda x: None]}, "must draw some of these"),
])  # fmt: skip
def test_options_that_do_not_fit_the_model(options, message):
    with pytest.raises(ValueError, match=message):
        amortize(pair, torch.randn(4), **options)


def test_other_sites_and_sizes_at_a_call():
    def either(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if y is not None:
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = amortize(either, torch.randn(4), torch.randn(4))
    with pytest.raises(ValueError, match="'y': 'absent'"):
        guide(torch.randn(4))

    def sized(x, size):
        with pyro.plate("elements", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    guide = amortize(sized, torch.tensor(1.0), 3)
    with pytest.raises(ValueError, match="parameters of its own for"):
        guide(torch.tensor(1.0), 4)
    with pytest.raises(TypeError, match="must be a Pyro program"):
        amortize(3)


def test_a_chain_has_the_inverse_chain():
    torch.manual_seed(0)
    model, hand_made = ph.hvae(6, (3, 2), hidden=(8,))
    x = torch.bernoulli(torch.full((5, 6), 0.5))
    guide = amortize(model, x, hidden=(8,))
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (guide, hand_made)]
    assert isinstance(guide, ph.BottomUp)
    assert shapes[0] == shapes[1]
    fit(model, guide, x, ph.LayerwiseELBO(), 2)
    images = torch.bernoulli(torch.full((5, 2, 3), 0.5))
    model, _ = ph.vae((2, 3), 2, hidden=(8,))
    assert amortize(model, images, hidden=(8,))(images[:2])["z1"].shape == (2, 2)
    model, _ = ph.vae(6, 2, hidden=(8,), context_dim=1)
    assert amortize(model, x, context=x[:, :1], hidden=())(x, x[:, :1])["z1"].shape == (5, 2)
    general = amortize(model, x, context=x[:, :1], mask=x > 0, families={"z1": "diagonal"})
    assert general.inverse.inputs == {"z1": ("context (argument)", "mask (argument)", "x")}


def test_a_state_is_restored():
    torch.manual_seed(0)
    x = torch.randn(6)
    guide, other = amortize(pair, x), amortize(pair, 3 * torch.randn(6))
    fit(pair, guide, x, ph.TraceELBO(), 3)
    other.load_state_dict(guide.state_dict())
    torch.manual_seed(1)
    first = guide(x)["z"]
    torch.manual_seed(1)
    torch.testing.assert_close(first, other(x)["z"])
