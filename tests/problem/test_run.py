"""What a run says of a pair: plates, scales, weights; against sums written out by hand."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.nn import Flattened
from pyro_hvae.problem import Problem


def normal(value, loc, scale):
    return dist.Normal(torch.as_tensor(loc), torch.as_tensor(scale)).log_prob(value)


def nested_model(x, size=None, inner=None):
    """g; a_m ~ N(g, 1); x_mj ~ N(a_m, 2), with M on dimension -2 and J on dimension -1."""
    g = pyro.sample("g", dist.Normal(x.new_zeros(()), 1.0))
    rows = pyro.plate("rows", size or x.shape[0], subsample=torch.arange(x.shape[0]), dim=-2)
    columns = pyro.plate("columns", inner or x.shape[1], subsample=torch.arange(x.shape[1]), dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(g, 1.0))
        with columns:
            pyro.sample("x", dist.Normal(a, 2.0), obs=x)


def nested_guide(x, size=None, inner=None):
    g = pyro.sample("g", dist.Normal(x.new_tensor(0.2), 0.5))
    with pyro.plate("rows", size or x.shape[0], subsample=torch.arange(x.shape[0]), dim=-2):
        pyro.sample("a", dist.Normal(g + x.mean(-1, keepdim=True), 0.7))


@pytest.mark.parametrize("num_particles", [1, 5])
@pytest.mark.parametrize(("size", "inner"), [(None, None), (12, None), (12, 20)])
def test_weights_are_the_sums_written_out(num_particles, size, inner):
    x = torch.randn(3, 4)
    run = Problem(nested_model, nested_guide, (x,), {"size": size, "inner": inner}).run(num_particles)
    g = run.values["g"].reshape(-1)
    a = run.values["a"].reshape(num_particles, 3)
    rows, columns = (size or 3) / 3, (inner or 4) / 4
    expected = normal(g, 0.0, 1.0) - normal(g, 0.2, 0.5)
    expected = expected + rows * (normal(a, g[:, None], 1.0) - normal(a, g[:, None] + x.mean(-1), 0.7)).sum(
        -1
    )
    expected = expected + rows * columns * normal(x, a[..., None], 2.0).sum((-1, -2))
    assert run.structure.common == ()
    assert run.log_weights.shape == (num_particles,)
    torch.testing.assert_close(run.log_weights, expected)


def test_common_plates_keep_their_scale_outside():
    def model(x, size):
        with pyro.plate("data", size, subsample=torch.arange(len(x))), poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, size):
        with pyro.plate("data", size, subsample=torch.arange(len(x))), poutine.scale(scale=0.5):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.randn(4)
    run = Problem(model, guide, (x, 40)).run(3)
    z = run.values["z"]
    expected = 0.5 * (normal(z, 0.0, 1.0) + normal(x, z, 1.0) - normal(z, x / 2, 1.0))
    assert run.scale == 10.0
    assert [plate.name for plate in run.structure.common] == ["data"]
    torch.testing.assert_close(run.log_weights, expected)


def test_a_guide_may_name_its_plate_otherwise():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("elsewhere", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    assert Problem(model, guide, (torch.randn(4),)).run(2).log_weights.shape == (2, 4)


def test_a_joint_guide_leaves_no_common_plate():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = pyro.infer.autoguide.AutoMultivariateNormal(model)
    x = torch.randn(4)
    guide(x)
    assert Problem(model, guide, (x,)).run(2).log_weights.shape == (2,)


def test_chunks_change_nothing_but_the_draws():
    def program():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    weights = torch.cat([run.log_weights for run in Problem(program, program).runs([3, 3, 1])])
    torch.testing.assert_close(weights, torch.zeros(7))


def test_given_draws_have_the_densities_written_out():
    x = torch.randn(3, 4)
    values = {"g": torch.randn(5), "a": torch.randn(5, 3, 1)}
    run = Problem(nested_model, nested_guide, (x,)).run(5, values)
    g, a = values["g"], values["a"].squeeze(-1)
    log_p = (
        normal(g, 0.0, 1.0) + normal(a, g[:, None], 1.0).sum(-1) + normal(x, a[..., None], 2.0).sum((-1, -2))
    )
    log_q = normal(g, 0.2, 0.5) + normal(a, g[:, None] + x.mean(-1), 0.7).sum(-1)
    torch.testing.assert_close(run.log_weights, log_p - log_q)


def test_structure_roles_and_order():
    found = Problem(nested_model, nested_guide, (torch.randn(3, 4),)).structure
    assert (found.latent, found.observed, found.auxiliary) == (("g", "a"), ("x",), ())
    assert found.max_plate_nesting == 2


def test_a_run_whose_control_flow_changed_is_read_as_it_ran():
    switch = {"extra": False}

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            if switch["extra"]:
                z = z + pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))
            if switch["extra"]:
                pyro.sample("u", dist.Normal(x / 2, 1.0))

    x = torch.randn(4)
    assert Problem(model, guide, (x,)).run().structure.latent == ("z",)
    switch["extra"] = True
    assert Problem(model, guide, (x,)).run().structure.latent == ("z", "u")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: None, r"the guide draws nothing for the model's \['a', 'g'\]"),
        (
            lambda x: (nested_guide(x), pyro.sample("extra", dist.Normal(x.new_zeros(()), 1.0))),
            r"the model has no latent site \['extra'\]",
        ),
    ],
)
def test_sites_that_do_not_match_are_named(broken, message):
    with pytest.raises(ValueError, match=message):
        Problem(nested_model, broken, (torch.randn(3, 4),)).run()


def test_bad_observations_are_counted_and_located():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z[..., None].expand(-1, 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    grey = torch.zeros(4, 3)
    grey[2, 1] = 0.25
    with pytest.raises(
        ValueError, match=r"1 of 12 observed values at site 'x' lie outside .*Bernoulli.*\(2, 1\).*binarize"
    ):
        Problem(model, guide, (grey,)).run()
    broken = torch.zeros(4, 3)
    broken[1:, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"3 of 12 observed values at site 'x' are NaN or infinite.*\(1, 0\)"
    ):
        Problem(model, guide, (broken,)).run()


def test_masked_entries_may_be_anything():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with poutine.mask(mask=torch.tensor([True, True, False])):
                pyro.sample("x", dist.Bernoulli(logits=z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    with pyro.validation_enabled(False):
        Problem(model, guide, (torch.tensor([0.0, 1.0, 0.5]),)).run()


def test_a_shape_that_does_not_fit_its_plate():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(-1, 2), 1.0), obs=x[..., None].expand(-1, 2))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    with pytest.raises(ValueError, match="x"):
        Problem(model, guide, (torch.randn(4),)).run()


def test_no_particles():
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="num_particles must be an integer of at least 1"):
            ph.TraceELBO(num_particles=count)


def test_an_event_that_becomes_a_batch_is_refused_where_particles_would_mix():
    """With one particle it fits by luck; with more, the site's values would be crossed with one another."""
    y = torch.randn(5)

    def model(y):
        steps = pyro.sample("steps", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("time", 5):
            pyro.sample("y", dist.Normal(steps, 1.0), obs=y)

    def guide(y):
        pyro.sample("steps", dist.Normal(y / 2, 0.7).to_event(1))

    assert Problem(model, guide, (y,)).run().log_weights.shape == (1,)
    with pytest.raises(ValueError, match=r"site 'y' has batch shape .* for \d+ particles"):
        _ = Problem(model, guide, (y,)).run(8).log_weights


def gaussian_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


@pytest.mark.parametrize(
    ("reduce", "mixes"),
    [
        (lambda z: z.sum(), True),
        (lambda z: z.mean(0), True),
        (lambda z: z[0], True),
        (lambda z: z - z.logsumexp(0), True),
        (lambda z: z.sum(-1, keepdim=True), False),
        (lambda z: z[..., :1], False),
    ],
    ids=["sum", "mean(0)", "[0]", "logsumexp(0)", "sum(-1)", "[..., :1]"],
)
def test_programs_that_mix_their_particles_are_refused(reduce, mixes):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(reduce(z), 1.0), obs=x)

    x = torch.randn(6)
    assert Problem(model, gaussian_guide, (x,)).run().log_weights.isfinite().all()
    if mixes:
        for _ in range(2):  # no second try gets through
            with pytest.raises(
                ValueError, match=r"site\(s\) \['x'\] in one particle depends on the draws of another"
            ):
                Problem(model, gaussian_guide, (x,)).run(3)
    else:
        state = torch.get_rng_state()
        Problem(model, gaussian_guide, (x,)).run(3)
        torch.set_rng_state(state)
        again = Problem(model, gaussian_guide, (x,)).run(3)
        assert again.log_weights.shape[0] == 3


@pytest.mark.parametrize(
    "wrap", [lambda p: p, lambda p: poutine.scale(p, scale=1.0), lambda p: poutine.mask(p, mask=True)]
)
def test_modules_inside_of_handlers_are_evaluated_in_evaluation_mode(wrap):
    """Dropout of all entries but in evaluation mode: log p(x) = log N(x; 1, 1) only if the layer is the identity."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(1.0)

        def forward(self, x):
            pyro.sample("x", dist.Normal(self.drop(torch.ones(3)), 1.0).to_event(1), obs=x)

    x, model = torch.tensor([0.5, 1.0, -2.0]), Model()
    for _ in range(2):
        weights = Problem(wrap(model), lambda x: None)(x).run().log_weights
        torch.testing.assert_close(weights, normal(x, 1.0, 1.0).sum()[None])
    assert model.training
    assert model.drop.training


def test_a_switch_inside_of_a_handler_is_seen():
    """The particles are mixed by a switch of the wrapped program, after a run in which they were not."""
    setting = SimpleNamespace(mixed=False)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum() if setting.mixed else z.sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    problem = Problem(poutine.scale(model, scale=1.0), guide)()
    problem.run(4)
    setting.mixed = True
    with pytest.raises(ValueError, match=r"\['x'\] in one particle depends on the draws of another"):
        problem.run(4)


def test_given_values_in_runs_of_several_numbers_of_particles():
    """What enumeration notes in one run stays out of the next, whose particles take the dim of its states."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(2.0 * k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.tensor([0.5, -1.0, 2.0])
    problem = Problem(model, guide)(x)
    for count in (1, 8, 1, 5):
        z = torch.randn(count, 3)
        prior = torch.logaddexp(math.log(0.3) + normal(z, 0.0, 1.0), math.log(0.7) + normal(z, 2.0, 1.0))
        expected = prior + normal(x, z, 1.0) - normal(z, x, 1.0)
        torch.testing.assert_close(problem.run(count, {"z": z}).log_weights, expected)


def test_noise_of_other_libraries_is_no_mixing():
    """Each run draws its own numbers, so that densities are compared under the same ones."""

    def noisy(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + np.random.rand(), 1.0 + random.random()), obs=x)  # noqa: NPY002

    def drawn(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    assert Problem(noisy, drawn)(torch.zeros(3)).run(4).log_weights.shape == (4, 3)


def test_batch_norm_that_trains_is_no_mixing():
    """It normalises by all particles together, as it does by all data; particles are compared in evaluation mode."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Flattened(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), 1)

        def forward(self, x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    def drawn(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    decoder, x = Decoder(), torch.randn(3, 1)
    assert Problem(decoder, drawn, (x,), training=True).run(4).log_weights.shape == (4, 3)
