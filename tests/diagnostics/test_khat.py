"""k-hat flags what is wrong where it is wrong, and says 'exact' of what is exact."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalMessenger

from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.diagnostics import khats
from pyro_hvae.kernels import Gaussian, StandardNormal, WithoutContext
from pyro_hvae.nn import MLP
from pyro_hvae.weights import good_khat
from tests.diagnostics.schools import SCHOOLS, eight_schools
from tests.linear_gaussian import linear_gaussian


def scaled(guide, factor, *layers):
    """A guide whose layers have their standard deviations multiplied."""
    changed = copy.deepcopy(guide)
    for layer in layers:
        kernel = getattr(changed, layer)
        with torch.no_grad():  # the diagonal of ``tril`` is held as its logarithm
            kernel.tril.mul_(torch.where(torch.eye(len(kernel.tril), dtype=torch.bool), 1.0, factor))
            kernel.tril.diagonal().add_(math.log(factor))
    return changed


def test_an_exact_guide_is_exact_everywhere():
    case = linear_gaussian(3, size=4)
    for guide in (case.exact, case.top_down):
        found = khats(case.model, guide, case.x, num_draws=200)
        assert found.joint == -torch.inf
        assert (found.per_datum == -torch.inf).all()
        assert all((value == -torch.inf).all() for value in found.per_layer.values())
        assert set(found.flagged().values()) == {0}
        assert "exact" in str(found)
    assert list(found.per_layer) == ["z3", "z2", "z1"]  # in the guide's order


def test_bounded_weights_of_discrete_draws_are_not_called_exact():
    """The guide draws the likelier value too seldom: weights of .7/.5 and .3/.5, of which the largest is common."""

    def model():
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.7)))

    found = khats(model, lambda: pyro.sample("z", dist.Bernoulli(torch.tensor(0.5))), num_draws=200)
    assert found.joint == -torch.inf
    assert not found.exact
    assert "bounded" in str(found)
    assert khats(model, model, num_draws=200).exact


def test_a_narrow_guide_is_flagged_at_each_datum_and_each_layer():
    case = linear_gaussian(3, size=6)
    found = khats(case.model, scaled(case.exact, 0.2, "z1", "z2", "z3"), case.x, num_draws=2000)
    assert found.good == good_khat(2000)
    assert (found.per_datum > found.good).all()
    for name, value in found.per_layer.items():
        assert value.shape == (6,)
        assert (value > found.good).all(), name
    assert found.flagged() == {"joint": 1, "per_datum": 6, "z1": 6, "z2": 6, "z3": 6}


@pytest.mark.parametrize("layer", ["z1", "z2", "z3"])
def test_one_narrow_layer_is_the_last_that_is_flagged(layer):
    case = linear_gaussian(3, size=6)
    found = khats(case.model, scaled(case.exact, 0.2, layer), case.x, num_draws=2000)
    order = list(found.per_layer)
    for name in order[: order.index(layer) + 1]:  # the weights' tail has shape 1 - .2^2
        assert abs(found.per_layer[name].mean() - 0.96) < 4 * 0.2 / 6**0.5, name
        assert (found.per_layer[name] > found.good).sum() >= 4, name
    for name in order[order.index(layer) + 1 :]:
        assert (found.per_layer[name] == -torch.inf).all(), name


def test_a_wide_guide_is_not_flagged():
    """Its weights are bounded; the fit of k then is at or below zero, up to its error."""
    case = linear_gaussian(1, size=6)
    found = khats(case.model, scaled(case.exact, 1.5, "z1"), case.x, num_draws=2000)
    assert (found.per_datum < 0.3).all()


def test_of_each_datum_khat_does_not_drift_with_their_number():
    """The joint k-hat of one and the same quality grows from harmless to useless; of a datum it stays."""
    quality, joint = {}, {}
    for size in (1, 10, 100, 1000):
        case = linear_gaussian(1, size=size)
        found = khats(case.model, scaled(case.exact, 0.85, "z1"), case.x, num_draws=500)
        assert found.per_datum.shape == (size,)
        quality[size], joint[size] = found.per_datum, float(found.joint)
    whole = quality[1000]
    error = whole.std()
    assert error < 0.3
    for size in (1, 10, 100):
        assert abs(quality[size].mean() - whole.mean()) < 4 * error / size**0.5
    assert joint[1000] > 1.0
    assert joint[1000] > joint[1] + 0.5


def shared(x):
    """A global latent, and one local to each datum."""
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_local_latents_under_a_global_one_are_judged_given_it():
    x = torch.randn(5)
    mean, precision = 0.5 * x.sum() / (1 + 2.5), 1 + 2.5  # of g given x, as x ~ N(g, 2)

    def guide(x, local=1.0, outer=1.0):
        g = pyro.sample("g", dist.Normal(mean, outer * precision**-0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((g + x) / 2, local * 0.5**0.5))

    found = khats(shared, guide, x, num_draws=500)
    assert found.joint == -torch.inf
    assert found.conditioned_on == ("g",)
    assert found.plates == ("data",)
    assert (found.per_datum == -torch.inf).all()
    found = khats(shared, lambda x: guide(x, outer=0.2), x, num_draws=2000)
    assert found.joint > found.good
    assert found.per_layer["g"] == found.joint
    assert (found.per_datum == -torch.inf).all()
    found = khats(shared, lambda x: guide(x, local=0.2), x, num_draws=2000, chunk_size=300)
    assert (found.per_datum > found.good).all()
    assert (found.per_layer["z"] == found.per_datum).all()
    data = found.to_dataset()
    assert data["per_layer"].dims == ("layer", "data")
    assert data["per_layer"].coords["layer"].values.tolist() == ["g", "z"]
    assert data["per_datum"].dims == ("data",)


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
def test_auto_guides(auto):
    x = torch.randn(5)
    guide = auto(shared)
    found = khats(shared, guide, x, num_draws=100)
    if auto is AutoNormal:
        assert list(found.per_layer) == ["g", "z"]
        assert found.per_datum.shape == (5,)
    else:  # what is computed from one draw for all data is no layer of its own
        assert list(found.per_layer) == ["_AutoMultivariateNormal_latent"]
        assert found.per_datum is None
        assert "per_datum" not in found.flagged()


def test_eight_schools():
    """Mean field on the centred model can't be corrected by weights, on the non-centred one it can."""
    bad = torch.stack([khats(*eight_schools(True), SCHOOLS, num_draws=4000).joint for _ in range(5)])
    good = torch.stack([khats(*eight_schools(False), SCHOOLS, num_draws=4000).joint for _ in range(5)])
    assert bad.median() > 0.7
    assert good.median() < 0.7
    assert good.mean() < bad.mean() - 0.15


def test_context_reaches_both_programs_and_layers_can_be_chosen():
    model = TopDown(z2=WithoutContext(StandardNormal(1)), z1=Gaussian(MLP(2, 2)), x=Gaussian(MLP(2, 2)))
    guide = BottomUp(z1=Gaussian(MLP(2, 2)), z2=Gaussian(MLP(2, 2)))
    x, context = torch.randn(3, 1), torch.randn(3, 1)
    found = khats(model, guide, x, context=context, num_draws=40, chunk_size=15, layers=["z2"])
    assert list(found.per_layer) == ["z2"]
    assert found.per_layer["z2"].isfinite().all()
    with pytest.raises(ValueError, match=r"layers names \['z9'\].*it draws \['z1', 'z2'\]"):
        khats(model, guide, x, context=context, layers=["z9"])


def test_a_guide_that_is_a_handler_keeps_what_is_held():
    """The layers before are at one draw in AutoNormalMessenger too: given g, equal weights of an exact z."""

    def model(x):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.randn(4)
    guide = AutoNormalMessenger(model, init_scale=1.0)
    guide(x)
    with torch.no_grad():
        for value in guide.locs.z, guide.locs.g:
            value.fill_(0.0)
    found = khats(model, guide, x, num_draws=60, chunk_size=25)
    assert (found.per_layer["z"] == -torch.inf).all()
    assert found.joint.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 10}, "needs at least 20 draws, got num_draws=10"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_what_is_refused(options, message):
    case = linear_gaussian(1, size=2)
    with pytest.raises(ValueError, match=message):
        khats(case.model, case.exact, case.x, **options)


def test_nothing_drawn():
    def known(x):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="the guide draws nothing"):
        khats(known, lambda x: None, torch.tensor(0.0))
