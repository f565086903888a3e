"""The objective of a pair as a module: what it remembers, who gets data_size, and what its loss is divided by."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_hvae.bounds import IWELBO, DiffusionELBO, Regularised, TraceELBO, warm_up
from pyro_hvae.models import vae, vdm
from pyro_hvae.nn import DenoisingMLP
from pyro_hvae.training import NonFiniteError, fit
from pyro_hvae.training import checkpoint as files
from pyro_hvae.training.objective import PairObjective
from tests.training.gaussian import Guide, Model, quiet, sgd


def warmed():
    return Regularised(TraceELBO(), kl_weight=warm_up(10))


def test_the_objectives_memory_is_saved_and_resumed(tmp_path, data):
    bounds = []
    for steps in (3, 7):
        pyro.clear_param_store()
        bounds.append(warmed())
        fit(Model(), Guide(), data, bound=bounds[-1], steps=steps, run_dir=tmp_path, resume=True, **quiet)
    assert [int(bound.step) for bound in bounds] == [3, 7]
    weights = files.read_weights(files.latest(tmp_path / "checkpoints"))
    assert int(weights["bound.step"]) == 7


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": "eager"}}], ids=["eager", "compiled"])
def test_a_new_run_starts_the_objective_anew_and_counts_steps(options, data):
    bound = warmed()
    for _ in range(2):
        pyro.clear_param_store()
        fit(Model(), Guide(), data, bound=bound, steps=4, batch_size=20, accumulate=2, **options, **quiet)
        assert int(bound.step) == 4


def test_steps_taken_back_are_not_counted():
    """A loss that is NaN from the fifth step on; the last good state is that of the third."""
    weight = nn.Parameter(torch.zeros(()))

    class Breaks(PyroModule):
        def __init__(self):
            super().__init__("breaks")
            self.weight = weight

        def forward(self, x):
            with pyro.plate("data", len(x)):
                loc = self.weight + torch.where(x == 99.0, torch.nan, 0.0)
                pyro.sample("z", dist.Normal(loc, 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    bound, x = warmed(), torch.zeros(12)
    x[9] = 99.0
    with pytest.raises(NonFiniteError) as caught:
        fit(model, Breaks(), x, bound=bound, epochs=1, batch_size=2, shuffle=False, check_every=3, **quiet)
    assert caught.value.step == 5
    assert int(bound.step) == 3


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": "eager"}}], ids=["eager", "compiled"])
def test_importance_sampled_times_are_learned_in_training_alone(options):
    torch.manual_seed(0)
    x = torch.randn(32, 2)
    seen = []
    for looks in ({}, {"validation": x, "validate_every": 1, "log_every": 1, "terms_every": 1}):
        torch.manual_seed(1)
        model, guide = vdm(DenoisingMLP(2), event_shape=(2,), num_layers=None)
        bound = DiffusionELBO(sampling="importance")
        fit(model, guide, x, bound=bound, steps=4, batch_size=8, seed=0, **looks, **options, **quiet)
        seen.append(bound.magnitudes.clone())
    assert not torch.equal(seen[0], torch.ones_like(seen[0]))
    assert torch.equal(*seen)


def test_compiled_and_eager_runs_of_a_warm_up_are_the_same(data):
    ends = []
    for compile in (False, {"backend": "eager"}):
        pyro.clear_param_store()
        torch.manual_seed(4)
        model, guide = Model(), Guide()
        fit(model, guide, data, bound=warmed(), steps=15, batch_size=50, seed=1, compile=compile, **quiet)
        ends.append(torch.cat([p.detach().flatten() for p in (*model.parameters(), *guide.parameters())]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


# -- data_size


def of_global_mean(x, data_size=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def plain_guide(x):
    loc = pyro.param("loc", torch.zeros(()))
    pyro.sample("mean", dist.Normal(loc, pyro.param("sd", torch.ones(()), constraint=dist.constraints.positive)))


@pytest.mark.parametrize("make", [lambda: AutoNormal(of_global_mean), lambda: plain_guide], ids=["auto", "plain"])
def test_data_size_reaches_a_model_whatever_its_guide_takes(make):
    """At q = N(m, s), the expected loss of a batch is that of N data, known in closed form, over N."""
    x, guide = 1.0 + torch.randn(20), make()
    objective = PairObjective(TraceELBO(20000), of_global_mean, guide, (x,), {}, 400)
    assert objective.data_size == 400
    if guide is plain_guide:
        m, s = 0.0, 1.0
    else:
        m, s = guide.locs.mean.item(), guide.scales.mean.item()
    likelihood = -0.5 * math.log(2 * math.pi) - 0.5 * ((x - m) ** 2 + s**2).mean()
    divergence = float(torch.distributions.kl_divergence(dist.Normal(m, s), dist.Normal(0.0, 10.0)))
    right = float(-likelihood) + divergence / 400
    with torch.no_grad():
        assert float(objective(x)) == pytest.approx(right, abs=0.05)


def test_a_guide_with_another_scale_than_its_model_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    with pytest.raises(ValueError, match=r"scales site 'z' to 100 data .* write def guide\(x, data_size=None\)"):
        fit(Model(), guide, torch.randn(100), bound=TraceELBO(), steps=1, batch_size=10, **quiet)


def test_an_autoguide_of_local_latents_is_refused_with_batches():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(100)
    with pytest.raises(ValueError, match=r"AutoNormal has parameters for 10 values of the latent site\(s\) \['z'\]"):
        fit(model, AutoNormal(model), x, bound=TraceELBO(), steps=1, batch_size=10, **quiet)
    fit(model, AutoNormal(model), x, bound=TraceELBO(), steps=1, batch_size=None, **quiet)


@pytest.mark.parametrize("batches", [[torch.randn(3), torch.randn(5)], [torch.randn(1)] * 3], ids=["ragged", "ones"])
def test_a_batch_that_is_one_datum_is_not_refused(batches):
    """Sequences without a plate, one a step: their number is not known, and each is a datum."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for t, value in enumerate(x):
            pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=value)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.zeros(())) * x.mean(), 1.0))

    assert fit(model, guide, batches, bound=TraceELBO(), epochs=1, **quiet).steps == len(batches)


def test_two_autoguides_of_one_name_keep_their_parameters():
    """Pyro's store has one entry for both, AutoNormal.locs.mean."""
    x, adam = torch.randn(50), functools.partial(torch.optim.Adam, lr=0.05)
    ends = []
    for shift in (3.0, -3.0):
        guide = AutoNormal(of_global_mean)
        fit(of_global_mean, guide, x + shift, bound=TraceELBO(4), optimizer=adam, steps=300, batch_size=None, **quiet)
        ends.append(guide)
    found = [float(guide.median()["mean"]) for guide in ends]
    assert found == pytest.approx([float(x.mean()) + 3.0, float(x.mean()) - 3.0], abs=0.2)


def test_parameters_of_an_autoguide_are_held_where_a_gradient_needs_it():
    """Statements of Pyro's store turn the gradient of a plain parameter on: ``stl`` was refused."""

    def model(x):
        pair = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pair.sum(-1), 1.0), obs=x)

    x = torch.arange(3.0)
    guide = AutoMultivariateNormal(model)
    objective = PairObjective(IWELBO(4, "stl"), model, guide, (x,), {}, None)
    found = []
    for loss in (lambda: 3 * objective(x), lambda: IWELBO(4, "stl").differentiable_loss(model, guide, x)):
        pyro.set_rng_seed(1)
        found.append(torch.autograd.grad(loss(), list(guide.parameters())))
    assert all(torch.allclose(*pair) for pair in zip(*found, strict=True))
    assert float(found[0][0].abs().max()) > 0
    pyro.clear_param_store()
    guide.loc.requires_grad_(False)
    before = guide.loc.clone()
    fit(model, guide, x, bound=TraceELBO(), steps=3, batch_size=3, optimizer=sgd, **quiet)
    assert torch.equal(guide.loc, before)
    assert not guide.loc.requires_grad


# -- records


def test_records_weigh_batches_by_their_rows():
    """With the exact guide the loss is -log p(x) to round-off: 12 data in batches of 5, 5 and 2."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Exact(PyroModule):
        def __init__(self):
            super().__init__("exact")
            self.slope = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.slope * x, 0.5**0.5))

    x = torch.arange(12.0)
    still = functools.partial(torch.optim.SGD, lr=0.0)
    result = fit(model, Exact(), x, bound=TraceELBO(), epochs=1, batch_size=5, shuffle=False, optimizer=still, **quiet)
    exact = -dist.Normal(0.0, 2**0.5).log_prob(x).mean()
    assert result.history[-1]["loss"] == pytest.approx(float(exact), abs=1e-10)


def test_a_vae_that_takes_data_size_is_scaled_once():
    torch.manual_seed(0)
    model, guide = vae(6, 2, hidden=(4,))
    x = (torch.rand(40, 6) < 0.5).double()
    fit(model, guide, x, bound=TraceELBO(), optimizer=sgd, steps=2, batch_size=10, **quiet)
    objective = PairObjective(TraceELBO(400), model, guide, (x,), {}, 40)
    with torch.no_grad():
        whole, part = float(objective(x)), float(objective(x[:20]))
    assert abs(whole - part) < 0.5
