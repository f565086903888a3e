"""Kind D: guides that draw several values of a marked site (``num_samples``), and marks that a program can't follow."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hvae as ph

GROUPS = {"enumerate": "parallel", "num_samples": 500}


def program(x, infer=None, loc=0.0):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.as_tensor(loc), 1.0), infer=infer)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("particles", [1, 3])
def test_groups_of_continuous_draws_are_averaged(particles):
    """The ELBO of q = N(.4, 1) is E log N(x; z, 1) - KL, and its gradient in the mean x - 2 * .4."""
    loc = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.3, -1.0], dtype=torch.float64)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0), infer=GROUPS)

    bound = ph.TraceELBO(particles)
    values = torch.stack([bound.per_datum(program, guide, x) for _ in range(40)])
    right = dist.Normal(x, 1.0).log_prob(torch.tensor(0.4)) - 0.5 - 0.5 * 0.16
    assert ((values.mean(0) - right).abs() < 5 * values.std(0) / 40**0.5).all()
    assert (values.std(0) < 0.2).all()  # one draw has 1.2
    slopes = torch.stack([torch.autograd.grad(bound.differentiable_loss(program, guide, x), loc)[0] for _ in range(40)])
    assert abs(-slopes.mean() - (x - 0.8).sum()) < 5 * slopes.std() / 40**0.5


def test_each_particle_draws_a_group_of_its_own():
    """KL(N(0, 1) || N(1, 1)) = 1/2 from 100 particles of 5 draws each: error .045, where one shared group has .45."""

    def model():
        for name in ("a", "b"):
            pyro.sample(name, dist.Normal(1.0, 1.0))

    def guide():
        for name in ("a", "b"):
            pyro.sample(name, dist.Normal(0.0, 1.0), infer={"enumerate": "parallel", "num_samples": 5})

    torch.manual_seed(0)
    for bound in (ph.TraceELBO(100), ph.TraceELBO(100, gradient="score")):
        values = torch.stack([bound.per_datum(model, guide) for _ in range(30)])
        assert abs(values.mean() + 1.0) < 5 * values.std() / 30**0.5
        assert values.std() < 0.15
    run = ph.Problem(model, guide)().run(100)
    assert run.guide_trace.nodes["b"]["value"].unique().numel() == 500


def test_groups_of_discrete_draws_have_no_gradient():
    logits = torch.zeros((), requires_grad=True)

    def model():
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(0.3)), 1.0), obs=torch.tensor(0.2))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=logits), infer=GROUPS)

    for bound in (ph.TraceELBO(), ph.TraceELBO(gradient="score"), ph.IWELBO(2, "vimco")):
        with pytest.raises(ValueError, match=r"'z'.*remove num_samples"):
            bound.differentiable_loss(model, guide)
    assert ph.TraceELBO().per_datum(model, guide).isfinite()


def test_a_program_that_reads_an_enumerated_value_is_told_what_to_write():
    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "sequential"})
        loc = 2.0 if z.item() > 0 else -1.0
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.2))

    def guide():
        pass

    with pytest.raises(ValueError, match=r"\['z'\] are enumerated at once.*torch.where"):
        ph.TraceELBO().per_datum(model, guide)
