"""Supports of a guide's transformed distributions."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to
from torch.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform

from pyro_hvae.problem import Problem


def model():
    pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))


def guide_of(transform):
    def guide():
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(()), 1.0), [transform]))

    return guide


@pytest.mark.parametrize(
    "transform",
    [
        biject_to(dist.constraints.positive),
        ComposeTransform([ExpTransform(), AffineTransform(torch.tensor(0.0), torch.tensor(3.0))]),
        ComposeTransform([ExpTransform(), AffineTransform(1.0, 2.0), AffineTransform(-0.5, 0.5)]),
    ],
)
def test_an_affine_step_after_exp_stays_on_positive_numbers(transform):
    run = Problem(model, guide_of(transform))().run(50)
    z = run.values["z"]
    assert (z > 0).all()
    expected = dist.LogNormal(0.0, 1.0).log_prob(z) - guide_distribution(transform).log_prob(z)
    torch.testing.assert_close(run.log_weights, expected)


def guide_distribution(transform):
    return dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transform])


@pytest.mark.parametrize(
    ("transform", "where"),
    [
        (ComposeTransform([ExpTransform(), AffineTransform(0.0, -1.0)]), r"\(-inf, 0\)"),
        (ComposeTransform([ExpTransform(), AffineTransform(-2.0, 1.0)]), r"\(-2, inf\)"),
        (AffineTransform(1.0, 2.0), "the real line"),
    ],
)
def test_an_affine_step_that_leaves_positive_numbers_is_refused(transform, where):
    with pytest.raises(ValueError, match=rf"draws site 'z' on {where} .* and the model has it on \(0, inf\)"):
        Problem(model, guide_of(transform))().run()


@pytest.mark.parametrize("same", [True, False])
def test_masks_are_compared_entry_by_entry(same):
    x = torch.tensor([0.5, -1.0])
    first = torch.tensor([True, False])
    second = first.clone() if same else ~first

    def model(x):
        with pyro.plate("rows", 2):
            with pyro.poutine.mask(mask=first):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", 2), pyro.poutine.mask(mask=second):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    if same:
        Problem(model, guide)(x).run()
    else:
        with pytest.raises(ValueError, match="site 'z' is masked differently"):
            Problem(model, guide)(x).run()
