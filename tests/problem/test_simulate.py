"""Joint draws: what they are, and which models have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor, nn

from pyro_hvae.problem import Problem


def standard() -> dist.Normal:
    return dist.Normal(torch.zeros(()), 1.0)


def plain(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", standard())
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def test_latents_and_data_are_drawn_together() -> None:
    x = torch.zeros(4000)
    values, problem = Problem(plain)(x).simulate()
    assert set(values) == {"z"}
    drawn = problem.args[0]
    assert not bool((drawn == 0).any())
    assert (drawn - values["z"]).std() == pytest.approx(0.1, abs=0.01)
    assert values["z"].std() == pytest.approx(1.0, abs=0.05)
    assert bool((x == 0).all())


def test_data_are_drawn_in_evaluation_mode() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.9)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(self.drop(torch.full((len(x),), 5.0)), 0.1), obs=x)

    model = Model()
    drawn = Problem(model)(torch.zeros(50)).simulate().problem.args[0]
    assert bool(((drawn - 5.0).abs() < 1.0).all())
    assert model.training


def factor(x: Tensor) -> None:
    plain(x)
    pyro.factor("more", torch.ones(()))


def scaled(x: Tensor) -> None:
    with poutine.scale(scale=0.5):
        plain(x)


def twice(x: Tensor) -> None:
    pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)
    pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)


def part(x: Tensor) -> None:
    pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)
    pyro.sample("b", standard(), obs=x[0])


def reads(x: Tensor) -> None:
    pyro.sample("a", dist.Normal(x.mean(), 1.0).expand([3]).to_event(1), obs=x)


def reads_numbers(x: Tensor) -> None:
    mean = torch.tensor([float(value) for value in x.detach().numpy().copy()]).mean()
    pyro.sample("a", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=x)


def no_argument(x: Tensor) -> None:
    pyro.sample("a", standard(), obs=torch.ones(()))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (factor, "site 'more' is a pyro.factor"),
        (scaled, "site 'z' carries a poutine.scale"),
        (twice, r"sites \['a', 'b'\] observe one argument"),
        (part, r"site\(s\) \['b'\] observe tensors that are no arguments"),
        (reads, r"computes site\(s\) \['a'\] from its observed data"),
        (reads_numbers, r"computes site\(s\) \['a'\] from its observed data"),
        (no_argument, "no argument is an observed tensor"),
    ],
)
def test_models_whose_data_cannot_be_simulated(model: Callable[..., Any], message: str) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            Problem(model)(torch.tensor([1.0, 2.0, 4.0])).simulate()


def test_reads_of_copies_are_seen_in_the_densities() -> None:
    """A model that looks its data up by their place in memory."""
    kept: dict[int, float] = {}

    def model(x: Tensor) -> None:
        mean = kept.setdefault(x.data_ptr(), 3.0 * len(kept))  # another number for other data
        pyro.sample("a", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"computes site\(s\) \['a'\]"):
        Problem(model)(torch.tensor([1.0, 2.0, 4.0])).simulate()


def test_shapes_of_data_may_be_read() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), x.new_ones(x.shape)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert Problem(model)(torch.ones(5)).simulate().values["z"].shape == (5,)
