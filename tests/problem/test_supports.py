"""Supports of transformed distributions: torch says "the real line" of all that end in an affine map."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to
from torch.distributions.transforms import AffineTransform, SigmoidTransform

from pyro_hvae.problem import Problem


def transformed(base, *transforms):
    return dist.TransformedDistribution(base, list(transforms))


LOW, HIGH = 0.2, 0.9  # LOW + (HIGH - LOW) is below HIGH by rounding


def on_positive(loc):
    """A normal variable on the half-line: torch's own map to it ends in an affine one."""
    return transformed(dist.Normal(torch.tensor(loc), 1.0), biject_to(dist.constraints.nonnegative))


def problem(model_distribution, guide_distribution):
    return Problem(
        lambda: pyro.sample("z", model_distribution),
        lambda: pyro.sample("z", guide_distribution),
    )()


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (dist.Gamma(torch.tensor(2.0), 1.0), on_positive(0.5)),
        (
            dist.Uniform(torch.tensor(-1.0), 3.0),
            transformed(dist.Normal(0.0, torch.tensor(1.0)), SigmoidTransform()),
        ),
        (
            dist.Uniform(torch.tensor(-1.0), 3.0),
            transformed(dist.Normal(0.0, torch.tensor(1.0)), SigmoidTransform(), AffineTransform(3.0, -4.0)),
        ),
        (
            dist.Uniform(torch.tensor(LOW), HIGH),  # the mapped end is LOW + (HIGH - LOW)
            transformed(dist.Normal(0.0, torch.tensor(1.0)), biject_to(dist.constraints.interval(LOW, HIGH))),
        ),
        (
            dist.Normal(torch.tensor(0.0), 1.0),
            transformed(dist.Uniform(0.0, torch.tensor(1.0)), SigmoidTransform().inv),
        ),
        (dist.Gumbel(torch.tensor(0.0), 1.0), dist.Normal(torch.tensor(0.0), 1.0)),
        (
            transformed(dist.Beta(torch.tensor(2.0), 2.0), AffineTransform(0.0, 2.0)),
            dist.Uniform(torch.tensor(0.5), 1.5),
        ),
    ],
    ids=["half_line", "sigmoid", "decreasing", "rounded", "logit", "gumbel", "stretched_beta"],
)
def test_a_guide_inside_of_the_models_support(model, guide):
    torch.testing.assert_close(problem(model, guide).run(50).log_weights.isfinite(), torch.ones(50) > 0)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (
            on_positive(0.5),
            dist.Normal(torch.tensor(2.0), 1.0),
            r"on the real line \(Normal\).* on \(0, inf\)",
        ),
        (
            dist.Gamma(torch.tensor(2.0), 1.0),
            transformed(dist.Normal(0.0, torch.tensor(1.0)), AffineTransform(9.0, 1.0)),
            r"on the real line",
        ),
        (
            dist.Gamma(torch.tensor(2.0), 1.0),
            transformed(dist.Exponential(torch.tensor(1.0)), AffineTransform(5.0, -1.0)),
            r"on \(-inf, 5\)",
        ),
        (
            dist.Exponential(torch.tensor(1.0)),  # its formula is a finite number below zero
            dist.Normal(torch.tensor(2.0), 1.0),
            r"on the real line \(Normal\).* on \(0, inf\)",
        ),
        (dist.Poisson(torch.tensor(1.0)), dist.Exponential(torch.tensor(1.0)), "discrete in the model"),
        (dist.Normal(torch.tensor(0.0), 1.0), dist.Poisson(torch.tensor(1.0)), "continuous in the model"),
    ],
    ids=["model", "guide", "decreasing", "finite_outside", "discrete", "continuous"],
)
def test_a_guide_that_reaches_outside(model, guide, message):
    with pytest.raises(ValueError, match=message):
        problem(model, guide).run()


@pytest.mark.parametrize(
    ("model", "guide", "covered"),
    [
        (
            dist.Uniform(torch.tensor(LOW), HIGH),
            transformed(dist.Normal(0.0, torch.tensor(1.0)), biject_to(dist.constraints.interval(LOW, HIGH))),
            True,
        ),
        (dist.Gamma(torch.tensor(2.0), 1.0), on_positive(0.5), True),
        (
            dist.Normal(torch.tensor(0.0), 1.0),
            transformed(dist.Exponential(torch.tensor(1.0)), AffineTransform(5.0, -1.0)),
            False,
        ),
    ],
    ids=["rounded", "half_line", "shifted"],
)
def test_which_guides_cover_the_support(model, guide, covered):
    assert (problem(model, guide).structure.uncovered == ()) is covered


def test_ends_that_are_parameters():
    """The ends of a support may have a gradient; they are compared without a warning from torch."""
    half = torch.tensor(1.0, requires_grad=True)
    whole = dist.Uniform(torch.tensor(-3.0), 3.0)
    assert problem(whole, dist.Uniform(-half, half)).structure.uncovered == ("z",)
    with pytest.raises(ValueError, match=r"on \(-1, 1\) .* has it on \(0, inf\)"):
        _ = problem(dist.LogNormal(torch.tensor(0.0), 1.0), dist.Uniform(-half, half)).structure


@pytest.mark.parametrize("name", ["_InverseTransform", "Inverse"])
def test_images_under_inverses_of_any_name(name):
    """Importing zuko renames torch's class of inverse transforms."""
    to_positive = biject_to(dist.constraints.nonnegative)
    model = dist.Gamma(torch.tensor(2.0), 1.0)
    refined = transformed(dist.Gamma(torch.tensor(3.0), 1.0), to_positive.inv, AffineTransform(0.5, 2.0), to_positive)
    inverse = type(AffineTransform(0.0, 1.0).inv)
    before = inverse.__name__
    try:
        inverse.__name__ = name
        assert problem(model, refined).structure.uncovered == ()
    finally:
        inverse.__name__ = before
