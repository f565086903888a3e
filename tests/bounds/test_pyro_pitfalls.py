"""Cases in which an estimator of Pyro is wrong, silently, and ours is right: each shown on both sides."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.inspect import get_dependencies

import pyro_hvae as ph
from tests.linear_gaussian import linear_gaussian
from tests.programs import build, data, normal

FULL, MINI = 40, 4


def mean_and_error(values):
    values = torch.as_tensor(values)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def quiet(evaluate, *args):
    with warnings.catch_warnings(), pyro.validation_enabled(False):
        warnings.simplefilter("ignore")
        return evaluate(*args)


# TraceMeanField_ELBO


def test_mean_field_elbo_of_a_bottom_up_guide():
    """Pyro takes KL(q(z1|x) || p(z1|z2)) at a z2 that descends from z1, and loses .5103 nats a datum."""
    pair = build("by_hand")
    size = len(pair.args[0])
    theirs, ours, truth = (
        mean_and_error([quiet(bound.loss, pair.model, pair.guide, *pair.args) / size for _ in range(40)])
        for bound in (
            TraceMeanField_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1),
            ph.LayerwiseELBO(200),
            Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1),
        )
    )
    assert abs(theirs[0] - truth[0] - 0.5103) < 4 * math.hypot(theirs[1], truth[1])
    assert abs(ours[0] - truth[0]) < 4 * math.hypot(ours[1], truth[1])


def test_mean_field_elbo_has_gradients_of_another_sign():
    found = {}
    for name, bound in (
        ("theirs", TraceMeanField_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)),
        ("ours", ph.LayerwiseELBO(4000)),
        ("truth", ph.TraceELBO(4000)),
    ):
        pyro.clear_param_store()
        pair = build("by_hand")
        pyro.set_rng_seed(1)
        quiet(bound.loss_and_grads, pair.model, pair.guide, *pair.args)
        found[name] = pyro.param("upper").unconstrained().grad.item()
    assert abs(found["ours"] - found["truth"]) < 0.1
    assert found["truth"] * found["theirs"] < 0
    assert abs(found["truth"]) > 0.2


def scaled(scale_model, scale_guide):
    x = torch.tensor([0.4, -1.2, 0.9])

    def model():
        with data(3), poutine.scale(scale=scale_model):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        with data(3), poutine.scale(scale=scale_guide):
            pyro.sample("z", dist.Normal(0.4 * x, 0.8))

    loc, s = 0.4 * x, 0.8
    cross = -0.5 * (s**2 + loc**2) - 0.5 * math.log(2 * math.pi)
    entropy = 0.5 * (1 + math.log(2 * math.pi)) + math.log(s)
    likelihood = -0.5 * ((x - loc) ** 2 + s**2) - 0.5 * math.log(2 * math.pi)
    return model, guide, (scale_model * (cross + likelihood) + scale_guide * entropy).sum().item()


@pytest.mark.parametrize(("scale_model", "scale_guide"), [(0.5, 0.5), (0.5, 2.0), (1.0, 0.3)])
def test_mean_field_elbo_takes_the_guides_scale_for_the_models(scale_model, scale_guide):
    model, guide, truth = scaled(scale_model, scale_guide)
    ours = mean_and_error([-ph.LayerwiseELBO(500).loss(model, guide).item() for _ in range(30)])
    assert abs(ours[0] - truth) < 4 * ours[1] + 1e-9
    pyros = TraceMeanField_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    theirs = mean_and_error([-quiet(pyros.loss, model, guide) for _ in range(30)])
    assert (abs(theirs[0] - truth) > 0.3) == (scale_model != scale_guide)


# RenyiELBO


def regression(size):
    def model(x):
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(loc, 1.3).expand([len(x)]))

    return model, guide


def test_renyi_elbo_of_a_minibatch():
    """The scale of the plate enters the logarithm: a "bound" far above the evidence."""
    torch.manual_seed(1)
    x = 2**0.5 * torch.randn(FULL)
    evidence = normal(x, 0.0, 2**0.5).sum().item()
    model, guide = regression(FULL)
    pyros = RenyiELBO(alpha=0, num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    results = {}
    for name, bound in (("theirs", pyros), ("ours", ph.IWELBO(10))):
        whole = mean_and_error([-float(quiet(bound.loss, model, guide, x)) for _ in range(60)])
        parts = [[-float(quiet(bound.loss, model, guide, part)) for part in x.split(MINI)] for _ in range(20)]
        results[name] = whole, mean_and_error(torch.tensor(parts).mean(1))
    (ours, error), (few, few_error) = results["ours"]
    assert abs(few - ours) < 4 * math.hypot(error, few_error)
    assert few < evidence + 4 * few_error
    _, (theirs, their_error) = results["theirs"]
    assert theirs > evidence + 10 * their_error


def test_renyi_elbo_of_a_minibatch_has_a_flipped_gradient():
    """The mean over the minibatches of a partition, against the whole data set, in the guide's location."""
    torch.manual_seed(0)
    x = 2**0.5 * torch.randn(FULL)
    model, guide = regression(FULL)
    found = {}
    for name, bound in (
        ("theirs", RenyiELBO(alpha=0, num_particles=10, vectorize_particles=True, max_plate_nesting=1)),
        ("ours", ph.IWELBO(10)),
    ):
        pyro.clear_param_store()
        loc = pyro.param("loc", torch.tensor(1.0))
        for size in (MINI, FULL):
            runs = []
            for _ in range(20):
                loc.grad = None
                for part in x.split(size):
                    quiet(bound.loss_and_grads, model, guide, part)
                runs.append(loc.grad.item() * size / FULL)
            found[name, size] = mean_and_error(runs)
    (few, error), (whole, whole_error) = found["ours", MINI], found["ours", FULL]
    assert abs(few - whole) < 4 * math.hypot(error, whole_error)
    assert few > 4 * error
    (few, error), (whole, whole_error) = found["theirs", MINI], found["theirs", FULL]
    assert whole > 4 * whole_error
    assert few < -4 * error


def test_renyi_elbo_with_a_global_latent_weighs_the_whole_batch():
    """One global latent, and local weights are multiplied over the data before the mean is taken."""
    torch.manual_seed(3)
    x = torch.randn(30)

    def model():
        pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
        with data(30):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
        with data(30):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.3).expand([30]))

    evidence = normal(x, 0.0, 2**0.5).sum().item()
    pyros = RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    theirs = mean_and_error([-quiet(pyros.loss, model, guide) for _ in range(40)])
    hybrid = ph.IWELBO(50, share_globals=True)
    ours = mean_and_error([-hybrid.loss(model, guide).item() for _ in range(40)])
    assert evidence - theirs[0] > 5
    assert abs(evidence - ours[0]) < 0.5
    assert ph.IWELBO(50).per_datum(model, guide).shape == ()  # the joint weight is had too, and its shape says so


def test_renyi_elbo_has_no_module_form():
    case = linear_gaussian(1)
    with pytest.raises(AttributeError):
        RenyiELBO(num_particles=2)(case.model, case.other)(case.x)
    assert ph.IWELBO(2)(case.model, case.other)(case.x).isfinite()


# Particles and minibatches


def test_pyros_particles_redraw_the_minibatch():
    drawn = []

    def model():
        with pyro.plate("data", FULL, subsample_size=MINI):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(MINI))

    def guide():
        with pyro.plate("data", FULL, subsample_size=MINI) as index:
            drawn.append(tuple(index.tolist()))
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0).expand([MINI]))

    for bound in (Trace_ELBO(num_particles=5), RenyiELBO(num_particles=5)):
        drawn.clear()
        quiet(bound.loss, model, guide)
        assert len(set(drawn)) == 5
    bound = ph.IWELBO(5)
    bound.loss(model, guide)
    drawn.clear()
    bound.loss(model, guide)
    assert len(drawn) == 1


def test_pyros_wake_phase_weighs_the_whole_batch():
    """With many data one particle takes all of Pyro's weight; per datum the effective sample size stays."""
    case = linear_gaussian(2, size=200)
    runs = {}
    for name in ("theirs", "ours"):
        gradients = []
        for _ in range(30):
            for p in case.other.parameters():
                p.grad = None
            if name == "ours":
                ph.WakePhase(20).loss_and_grads(case.model, case.other, case.x)
            else:
                pyro.clear_param_store()
                pyros = ReweightedWakeSleep(
                    num_particles=20, insomnia=1.0, vectorize_particles=True, max_plate_nesting=1
                )
                quiet(pyros.loss_and_grads, case.model, case.other, case.x)
            gradients.append(torch.cat([p.grad.flatten() for p in case.other.parameters()]))
        runs[name] = torch.stack(gradients)
    assert runs["theirs"].var(0).sum() > 2 * runs["ours"].var(0).sum()
    weights = ph.Problem(case.model, case.other)(case.x).run(20).log_weights
    whole = weights.sum(1).softmax(0)
    each = weights.softmax(0)
    assert 1 / (whole**2).sum() < 4
    assert (1 / (each**2).sum(0)).mean() > 10


# Dependencies


def hidden(how):
    def model(x):
        with data(len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("z1", dist.Normal(how(z2), 0.5))

    def guide(x):
        with data(len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.6 * x, 0.45))
            pyro.sample("z2", dist.Normal(how(z1), 0.6))

    return model, guide


def by_copy(z):
    out = torch.empty(z.shape)
    out.copy_(z)
    return out


def by_slice(z):
    out = torch.zeros(z.shape)
    out[...] = z
    return out


@pytest.mark.parametrize(
    "how", [by_copy, by_slice, lambda z: torch.func.vmap(torch.sin)(z)], ids=["copy", "slice", "vmap"]
)
def test_pyro_loses_a_dependency_and_the_layer_stays_monte_carlo(how):
    model, guide = hidden(how)
    x = torch.randn(3)
    lost = get_dependencies(model, (x,))["prior_dependencies"]["z1"]
    assert "z2" not in lost
    found = ph.Problem(model, guide)(x).dependencies
    assert found.broken_by("z1") == {"z2"}
    assert set(ph.LayerwiseELBO().terms(model, guide, x)) == {"rate_z1", "kl_z2"}


# Sticking the landing, and estimators reused


def test_pyros_elbo_keeps_the_score_part():
    """At the exact posterior its gradient has variance; with the score part gone it has none."""
    case = linear_gaussian(2)
    found = {}
    for name, bound in (("theirs", Trace_ELBO()), ("ours", ph.TraceELBO(gradient="stl"))):
        runs = []
        for _ in range(20):
            loss = quiet(bound.differentiable_loss, case.model, case.exact, case.x)
            runs.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(case.exact.parameters()))]))
        found[name] = torch.stack(runs).var(0).max()
    assert found["theirs"] > 1e-3
    assert found["ours"] < 1e-20


def test_pyros_plate_nesting_is_stale_on_a_second_model():
    """An estimator remembers the first model's plates; ours is asked anew for every pair."""
    flat, nested = build("minibatch"), build("nested_plates")
    pyros = Trace_ELBO(num_particles=3, vectorize_particles=True)
    quiet(pyros.loss, flat.model, flat.guide, *flat.args)
    bound = ph.TraceELBO(3)
    bound.loss(flat.model, flat.guide, *flat.args)
    with pytest.raises(ValueError, match="collide"):
        quiet(pyros.loss, nested.model, nested.guide, *nested.args)
    pyro.set_rng_seed(2)
    again = bound.per_datum(nested.model, nested.guide, *nested.args)
    pyro.set_rng_seed(2)
    torch.testing.assert_close(again, ph.TraceELBO(3).per_datum(nested.model, nested.guide, *nested.args))
    assert again.shape == (4,)
