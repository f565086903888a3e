"""Which posteriors count as Gaussian: linear-Gaussian programs, and none that merely looks like one at some points."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from torch.distributions.transforms import AffineTransform, ComposeTransform

from pyro_hvae.factorized import forward_kl, gaussian
from pyro_hvae.factorized.affine import is_linear_gaussian
from pyro_hvae.problem import Problem


def tensor(value):
    return torch.tensor(value)


def standard():
    return pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))


def observe(loc, scale=1.0, x=0.5):
    pyro.sample("x", dist.Normal(loc, scale), obs=tensor(x))


# Linear-Gaussian programs, with their posterior's mean and variance where these are short to write


def normal():
    observe(2 * standard() - 1)


def full_covariance():
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), tensor([[1.0, 0.5], [0.5, 2.0]])))
    observe(torch.einsum("ij,...j->...i", tensor([[1.0, -1.0]]), z)[..., 0])


def low_rank():
    z = pyro.sample("z", dist.LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3)))
    observe(z.sum(-1))


def affine_transform():
    steps = [AffineTransform(1.0, tensor(2.0)), ComposeTransform([AffineTransform(tensor(-1.0), -0.5)])]
    z = pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(()), 1.0), steps))
    observe(z)


def autoregression():
    z = standard()
    for step in range(4):
        z = pyro.sample(f"z{step}", dist.Normal(0.9 * z + 0.1, 0.5))
        pyro.sample(f"x{step}", dist.Normal(z, 1.0), obs=tensor(float(step)))


def written_in_place():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = torch.zeros(*z.shape[:-1], 4)
    mean[..., 1:] = z.cumsum(-1)
    mean[..., 0] += z[..., 2] / 3
    pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=torch.ones(4))


def convolved():
    z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
    mean = torch.nn.functional.conv1d(z.reshape(-1, 1, 6), tensor([[[1.0, -2.0, 0.5]]])).reshape(*z.shape[:-1], 4)
    pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=torch.ones(4))


def masked():
    z = standard()
    pyro.sample("x", dist.Normal(z, 1.0).expand([3]).mask(tensor([True, False, True])).to_event(1), obs=torch.ones(3))


def beside_another_likelihood():
    observe(standard())
    pyro.sample("count", dist.Poisson(tensor(3.0)), obs=tensor(2.0))
    pyro.factor("constant", tensor(-1.5))


def tempered():
    z = standard()
    with poutine.scale(scale=0.3):
        observe(z)


def remembered():
    z = standard()
    pyro.deterministic("positive", z.exp())
    observe(z)


def observed_difference():
    z = standard()
    pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=0.5 - z)


@poutine.reparam(config={"w": LocScaleReparam(0.0)})
def decentred():
    z = standard()
    observe(pyro.sample("w", dist.Normal(z, 0.7)))


GAUSSIAN = [
    normal,
    full_covariance,
    low_rank,
    affine_transform,
    autoregression,
    written_in_place,
    convolved,
    masked,
    beside_another_likelihood,
    tempered,
    remembered,
    observed_difference,
    decentred,
]


@pytest.mark.parametrize("model", GAUSSIAN)
def test_linear_gaussian_programs_are_solved(model):
    guide = forward_kl(model)
    assert guide.how == "marginals by a Gaussian"
    assert (guide.khat == -torch.inf).all()


def test_a_solved_posterior_is_the_right_one():
    q = forward_kl(affine_transform).distribution("z")  # the prior is N(-1.5, 1)
    assert float(q.mean) == pytest.approx(-0.5)
    assert float(q.variance) == pytest.approx(0.5)
    q = forward_kl(tempered).distribution("z")
    assert float(q.variance) == pytest.approx(1 / 1.3)


# Programs that are Gaussian nearly everywhere, or nearly


def second_mode():
    parts = dist.Normal(tensor([0.0, 30.0]), tensor([1.0, 1.0]))
    z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(tensor([0.5, 0.5])), parts))
    observe(z, 30.0, 30.0)


def wall():
    z = pyro.sample("z", dist.Uniform(-1e6, 1e6))
    observe(z)


def far_step():
    z = standard()
    pyro.factor("step", torch.where(z > 40.0, 900.0, 0.0))
    observe(z)


def heavy_tail():
    observe(pyro.sample("z", dist.StudentT(1e12, torch.zeros(()), 1.0)))


def heavy_likelihood():
    pyro.sample("x", dist.StudentT(1e12, standard(), 1.0), obs=tensor(0.5))


def rectified():
    observe((standard() + 60.0).relu() - 60.0)


def clamped():
    observe(standard().clamp(-60.0, 60.0))


def leaky():
    observe(torch.nn.functional.leaky_relu(standard() + 60.0) - 60.0)


def far_scale():
    z = standard()
    observe(z, torch.where(z > 60.0, 1e-3, 1.0))


def far_mask():
    z = standard()
    pyro.sample("x", dist.Normal(z, 1.0).mask(z < 60.0), obs=tensor(0.5))


def outer_mask():
    z = standard()
    with poutine.mask(mask=z < 60.0):
        observe(z)


def tiny_square():
    z = standard()
    observe(z + 1e-13 * z * z)


def rounded():
    z = standard()
    observe(z + 0.0 * z.round())


def in_place():
    z = standard()
    mean = torch.zeros(2)
    mean[0] = (z + 60.0).relu()
    observe(mean[0] - 60.0)


def chosen():
    z = standard()
    observe(torch.where(z < 60.0, z, 0.0 * z))


def read():
    z = standard()
    observe(z if float(z) < 60.0 else 0.0 * z)


def through_numpy():
    z = standard()
    observe(z + torch.as_tensor((z.detach().numpy() > 60.0) * 1.0))


def indexed():
    z = standard()
    observe(z + tensor([0.0, 7.0])[(z > 60.0).long()])


def cast():
    z = standard()
    observe(z + (z / 60.0).long().double())


@torch.library.custom_op("factorized_tests::mul", mutates_args=())
def own_operation(z: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.relu(z) * factor


def opaque():
    observe(own_operation(standard() + 60.0, 1.0) - 60.0)


def batched():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    observe(torch.func.vmap(lambda one: torch.relu(one + 60.0))(z).sum(-1) - 120.0)


class Doubled(dist.Normal):
    """A subclass, whose density is not that of a Normal."""

    def log_prob(self, value):
        return super().log_prob(value) + torch.where(value > 60.0, 900.0, 0.0)


def subclass():
    observe(pyro.sample("z", Doubled(torch.zeros(()), 1.0)))


class Half(torch.distributions.Transform):
    """Identity below 60."""

    domain = codomain = constraints.real
    bijective = True

    def _call(self, x):
        return torch.where(x < 60.0, x, 2 * x - 60.0)

    def _inverse(self, y):
        return torch.where(y < 60.0, y, (y + 60.0) / 2)

    def log_abs_det_jacobian(self, x, y):
        return torch.where(x < 60.0, 0.0, math.log(2.0)).to(x)


def bent():
    observe(pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(()), 1.0), [Half()])))


NEARLY = [
    second_mode,
    wall,
    far_step,
    heavy_tail,
    heavy_likelihood,
    rectified,
    clamped,
    leaky,
    far_scale,
    far_mask,
    outer_mask,
    tiny_square,
    rounded,
    in_place,
    chosen,
    read,
    through_numpy,
    indexed,
    cast,
    opaque,
    batched,
    subclass,
    bent,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", NEARLY)
def test_what_is_nearly_gaussian_is_not(model):
    assert not is_linear_gaussian(Problem(model)())


@pytest.mark.parametrize("model", [second_mode, heavy_tail, rectified, far_scale, bent])
def test_what_is_nearly_gaussian_is_weighted(model):
    guide = forward_kl(model, num_samples=1000)
    assert guide.how == "marginals by importance weights"
    assert (guide.khat > -torch.inf).all()


def bent_at_the_posterior():
    """Gradients are those of a Gaussian on both sides of the step; values are not."""
    z = standard()
    pyro.factor("step", torch.where(z > 9.0, 5.0, 0.0))
    observe(z, 0.1, 9.0)


def sine():
    observe(standard().sin())


@pytest.mark.filterwarnings("ignore:k-hat of the weights")
@pytest.mark.parametrize("model", [bent_at_the_posterior, sine])
def test_values_and_gradients_are_looked_at_besides(model, monkeypatch):
    """They show what an operation that can't be followed hides."""
    monkeypatch.setattr(gaussian, "is_linear_gaussian", lambda problem: True)
    assert "importance weights" in forward_kl(model, num_samples=2000).how


def test_a_second_mode_far_away_is_seen():
    """z | x is a mixture of N(0, 1) and N(30, 1), weighed by the densities of x."""
    odds = torch.stack([dist.Normal(mode, 901.0**0.5).log_prob(tensor(30.0)) for mode in (0.0, 30.0)]).softmax(0)
    means = tensor([30.0 / 901, 30.0])
    guide = forward_kl(second_mode, num_samples=40_000)
    assert float(guide.distribution("z").mean) == pytest.approx(float((odds * means).sum()), abs=0.3)


def test_the_analysis_changes_nothing():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self):
            self.calls += 1
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = self.norm(z.reshape(-1, 2)).reshape(z.shape)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=torch.ones(2))

    model = Model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    is_linear_gaussian(Problem(model)())
    assert torch.equal(generator, torch.get_rng_state())
    assert model.training
    assert model.norm.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
