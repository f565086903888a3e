"""The products as guides: every bound, the tree of draws, the report; training further; and what is refused."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.factorized import ProductGuide, compare_guides, forward_kl, reverse_kl

BOUNDS = [
    ph.TraceELBO(4),
    ph.TraceELBO(4, gradient="stl"),
    ph.LayerwiseELBO(4),
    ph.IWELBO(4),
    ph.IWELBO(4, gradient="dreg"),
    ph.VRBound(0.5, 4),
    ph.ThermodynamicBound(4, betas=[0.0, 0.5, 1.0]),
    ph.CUBO(2, 4),
    ph.EUBO(4),
]
X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def local(x):
    with pyro.plate("data", len(x)):
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.5))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), scale), obs=x)


def gaussian(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def nested(x):
    """A global, a group with a plate inside, and a minibatch-free tower of plates."""
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3, dim=-2):
        group = pyro.sample("group", dist.Normal(level, 0.7))
        with pyro.plate("members", 2, dim=-1):
            member = pyro.sample("member", dist.Normal(group, 0.5))
            pyro.sample("x", dist.Normal(member, 0.6), obs=x[:, None])


@pytest.fixture(scope="module")
def fitted():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    guides = {
        (local, "forward"): forward_kl(local, X),
        (local, "block"): forward_kl(local, X, blocks=[("z", "scale")]),
        (nested, "forward"): forward_kl(nested, X),
        (gaussian, "reverse"): reverse_kl(gaussian, X),
    }
    torch.set_default_dtype(default)
    return guides


@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
@pytest.mark.parametrize("which", range(4))
def test_every_bound_takes_it(bound, which, fitted):
    (model, _), guide = list(fitted.items())[which]
    value = bound.per_datum(model, guide, X)
    assert value.shape == (() if model is nested else (3,))
    assert value.isfinite().all()
    guide = copy.deepcopy(guide)  # a bound trains it further, its own way
    loss = bound.differentiable_loss(model, guide, X)
    slopes = torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True)
    assert sum(float(slope.abs().sum()) for slope in slopes if slope is not None) > 0


def test_elbo_of_the_returned_guides_is_what_the_comparison_says(fitted):
    found = compare_guides(gaussian, X, num_samples=1000)
    elbo = ph.TraceELBO(20_000).per_datum(gaussian, fitted[gaussian, "reverse"], X)
    torch.testing.assert_close(elbo, found.elbo[1], rtol=0.0, atol=0.03)


def test_pyros_own_loop_trains_it_further(fitted):
    guide = copy.deepcopy(fitted[local, "forward"])
    optimiser = pyro.optim.Adam({"lr": 0.01})
    svi = pyro.infer.SVI(local, guide, optimiser, loss=ph.TraceELBO(16))
    before = float(ph.TraceELBO(4000).per_datum(local, guide, X).sum())
    for _ in range(60):
        svi.step(X)
    assert float(ph.TraceELBO(4000).per_datum(local, guide, X).sum()) > before


def test_tree_report_and_state(fitted):
    guide = fitted[nested, "forward"]
    tree = ph.to_datatree(nested, guide, X, num_draws=100)
    assert tree["posterior"]["member"].sizes["members"] == 2
    assert tree["posterior"]["group"].shape[:2] == (1, 100)
    assert str(ph.diagnose(local, fitted[local, "forward"], X))
    state = guide.state_dict()
    fresh = ProductGuide(guide.latents, name="forward_kl")
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.distribution("level").mean, guide.distribution("level").mean)


def test_nested_plates_have_the_marginals_of_their_joint_gaussian(fitted):
    guide = fitted[nested, "forward"]
    # By hand: sites level, group (3), member (3, 2).
    precision, linear = torch.zeros(10, 10), torch.zeros(10)
    precision[0, 0] += 1

    def edge(i, j, variance):
        for a, b, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
            precision[a, b] += sign / variance

    for n in range(3):
        edge(0, 1 + n, 0.49)
        for m in range(2):
            k = 4 + 2 * n + m
            edge(1 + n, k, 0.25)
            precision[k, k] += 1 / 0.36
            linear[k] += X[n] / 0.36
    mean, variance = torch.linalg.solve(precision, linear), precision.inverse().diagonal()
    for name, index, shape in (("level", [0], ()), ("group", [1, 2, 3], (3, 1)), ("member", range(4, 10), (3, 2))):
        q = guide.distribution(name)
        torch.testing.assert_close(q.mean, mean[list(index)].reshape(shape))
        torch.testing.assert_close(q.variance, variance[list(index)].reshape(shape))


def test_minibatch_of_local_latents_keeps_its_scale():
    def model(x):
        with pyro.plate("data", 30, subsample=torch.tensor([4, 9, 20])):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = forward_kl(model, X)
    torch.testing.assert_close(guide.distribution("z").mean, X / 2)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(X).sum()
    assert ph.TraceELBO().loss(model, guide, X) == pytest.approx(-10 * float(evidence))


def plain(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(torch.zeros(()), 1.0))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(a * b, 1.0), obs=x)


def mixed(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.Bernoulli(torch.tensor(0.5)))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(a * s, 1.0), obs=x)


def onehot(x):
    pyro.sample("h", dist.OneHotCategorical(torch.ones(3) / 3))
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x)


def observed(x):
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x)


def flat(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0).mask(False))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).mask(False))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def partial(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30, subsample=torch.arange(3)):
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def impossible(x):
    b = pyro.sample("b", dist.LogNormal(torch.zeros(()), 1.0))
    pyro.factor("never", -torch.inf * b)


def broken(x):
    b = pyro.sample("b", dist.LogNormal(torch.zeros(()), 1.0))
    pyro.factor("nan", torch.where(b > 6.5, torch.nan, 0.0))


class Wide(torch.nn.Module):
    def forward(self):
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (observed, {}, "no latent site to factorise"),
        (plain, {"families": {"c": "normal"}}, r"no latent site \['c'\]; the model has \['a', 'b'\]"),
        (plain, {"families": {"a": "cauchy"}}, "unknown family 'cauchy' for site 'a'; there are bernoulli"),
        (plain, {"families": {"a": "gamma"}}, "family 'gamma' is for positive numbers, and site 'a' has support"),
        (plain, {"blocks": ["a", "b"]}, "blocks is a list of groups of site names"),
        (plain, {"blocks": [("a", "b"), ("a",)]}, r"site\(s\) \['a'\] are in more than one block"),
        (plain, {"blocks": [("a", "b")], "families": {"a": "normal"}}, r"site\(s\) \['a'\] are in a block"),
        (mixed, {"blocks": [("a", "s")]}, "mixes discrete and continuous sites"),
        (nested, {"blocks": [("group", "member")]}, r"is in plate\(s\) \['groups'\], which a block"),
        (onehot, {}, "no family for site 'h' with support"),
        (flat, {}, "the posterior is improper: log p.* is quadratic in the 2 latent numbers"),
        (partial, {}, "plate 'data' shows 3 of 30 indices"),
        (plain, {"families": {"a": dist.Normal(0.0, 1.0)}}, "families\\['a'\\] is .*; it must be a name"),
        (plain, {"families": {"a": lambda: dist.Normal(0.0, 1.0)}}, "makes a Normal, which is no module"),
        (plain, {"families": {"a": Wide}}, r"has event shape \(2,\), and the site \(\)"),
    ],
)
@pytest.mark.parametrize("fit", [forward_kl, reverse_kl], ids=["forward", "reverse"])
def test_what_is_refused(fit, model, options, message):
    with pytest.raises(ValueError, match=message):
        fit(model, X, **options)


@pytest.mark.filterwarnings("ignore:k-hat of the weights")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forward_kl(plain, X, num_samples=10), "at least 100 draws, got num_samples=10"),
        (lambda: forward_kl(impossible, X), "the whole posterior has no draw with a positive weight"),
        (lambda: forward_kl(broken, X), "the whole posterior has a log-weight that is NaN"),
        (lambda: reverse_kl(broken, X, start={"b": 6.0}), r"the ELBO is nan at step \d"),
        (lambda: reverse_kl(plain, X, num_steps=0), "num_steps must be at least 1"),
        (lambda: reverse_kl(plain, X, start={"c": 0.0}), "start names 'c', which is no latent site"),
        (lambda: reverse_kl(plain, X, start={"b": -1.0}), "start of site 'b' lies outside of its support"),
        (lambda: reverse_kl(plain, X, start={"b": torch.ones(2)}), "does not broadcast to its"),
        (lambda: compare_guides(plain, X, guides={}), "guides is empty"),
        (lambda: compare_guides(plain, X, num_samples=5), "at least 100"),
        (lambda: forward_kl(plain, X).distribution("c"), "no latent site 'c'"),
        (lambda: forward_kl(plain, X, blocks=[("a", "b")]).distribution("b"), "is drawn given \\['a'\\]"),
    ],
)
def test_what_else_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_proposal_with_sites_of_its_own_is_refused():
    def proposal(x):
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("a", dist.Normal(u, 1.0))
        pyro.sample("b", dist.LogNormal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError, match=r"the guide draws \['u'\], which the model lacks"):
        forward_kl(plain, X, proposal=proposal)


def test_what_can_not_be_drawn_is_named():
    def improper(x):
        pyro.sample("a", dist.ImproperUniform(dist.constraints.real, torch.Size(), torch.Size()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    for fit in (forward_kl, reverse_kl):
        with pytest.raises(ValueError, match=r"site 'a' can't be drawn from its prior \(ImproperUniform\)"):
            fit(improper, X)

    def summed(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)

    def without(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError, match=r"draws nothing for site\(s\) \['c'\], which the model sums out"):
        compare_guides(summed, X, guides={"without": without})
