"""A path from a latent to its own parent is found, however the programs hide it (DESIGN rule 2, oracle 2)."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.problem.dependencies import Dependencies

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def model(x):
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(x.new_zeros(()), 1.0))
        z1 = pyro.sample("z1", dist.Normal(0.9 * z2, 0.5))
        pyro.sample("x", dist.Normal(1.2 * z1, 0.7), obs=x)


def plain(z):
    return 0.7 * z


def by_copy(z):
    buffer = torch.zeros_like(z.detach())
    buffer.copy_(0.7 * z)
    return buffer


def by_slice(z):
    buffer = torch.zeros(3, dtype=z.dtype)
    buffer[:] = 0.7 * z
    return buffer


def by_vmap(z):
    return torch.func.vmap(lambda value: 0.7 * value)(z)


def by_detach(z):
    return 0.7 * z.detach()


def by_relu_at_zero(z):
    return torch.relu(z - 1e6) + 0.7 * z


def bottom_up(connect):
    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.6 * x, 0.45))
            pyro.sample("z2", dist.Normal(connect(z1), 0.6))

    return guide


@pytest.mark.parametrize("connect", [plain, by_copy, by_slice, by_vmap, by_detach, by_relu_at_zero])
def test_hidden_path_is_never_analytic(connect):
    terms = ph.LayerwiseELBO().terms(model, bottom_up(connect), X)
    assert set(terms) == {"reconstruction", "rate_z1", "kl_z2"}


@pytest.mark.parametrize("connect", [plain, by_copy, by_slice, by_vmap])
def test_hidden_path_in_the_model(connect):
    def hidden(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(connect(z2), 0.5))
            pyro.sample("x", dist.Normal(1.2 * z1, 0.7), obs=x)

    terms = ph.LayerwiseELBO().terms(hidden, bottom_up(plain), X)
    assert set(terms) == {"reconstruction", "rate_z1", "kl_z2"}


def test_mean_field_is_analytic_in_any_order():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(0.6 * x, 0.45))
            pyro.sample("z2", dist.Normal(0.3 * x, 0.6))

    assert set(ph.LayerwiseELBO().terms(model, guide, X)) == {"reconstruction", "kl_z1", "kl_z2"}


def test_top_down_is_analytic():
    def guide(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.3 * x, 0.6))
            pyro.sample("z1", dist.Normal(0.6 * x + 0.1 * z2, 0.45))

    assert set(ph.LayerwiseELBO().terms(model, guide, X)) == {"reconstruction", "kl_z1", "kl_z2"}


def test_path_through_a_third_site():
    def deep(x):
        with pyro.plate("data", len(x)):
            z3 = pyro.sample("z3", dist.Normal(x.new_zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(0.5 * z3, 1.0))
            z1 = pyro.sample("z1", dist.Normal(0.9 * z3 + 0 * z2, 0.5))
            pyro.sample("x", dist.Normal(1.2 * z1, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.6 * x, 0.45))
            z2 = pyro.sample("z2", dist.Normal(0.7 * z1, 0.6))
            pyro.sample("z3", dist.Normal(0.7 * z2, 0.6))

    terms = ph.LayerwiseELBO().terms(deep, guide, X)
    assert set(terms) == {"reconstruction", "rate_z1", "rate_z2", "kl_z3"}


def test_a_discrete_draw_is_taken_to_reach_what_follows():
    def discrete(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Bernoulli(x.new_full((), 0.4)))
            z1 = pyro.sample("z1", dist.Bernoulli(0.2 + 0.5 * z2))
            pyro.sample("x", dist.Normal(1.2 * z1, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Bernoulli(torch.sigmoid(x)))
            buffer = torch.zeros(3, dtype=z1.dtype)
            buffer.copy_(0.2 + 0.5 * z1)
            pyro.sample("z2", dist.Bernoulli(buffer))

    explained = ph.explain(ph.LayerwiseELBO(), discrete, guide, X)
    assert {row.site: row.treatment for row in explained.rows}["z1"] == "Monte Carlo"


def test_a_program_that_refuses_the_analysis_falls_back_to_order():
    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            if type(z) is not torch.Tensor:
                raise TypeError("plain tensors only")
            return 0.7 * z

        @staticmethod
        def backward(ctx, gradient):
            return 0.7 * gradient

    def connect(z):
        if type(z) is not torch.Tensor:
            raise TypeError("plain tensors only")
        return Stubborn.apply(z)

    terms = ph.LayerwiseELBO().terms(model, bottom_up(connect), X)
    assert set(terms) == {"reconstruction", "rate_z1", "kl_z2"}


def test_the_generator_and_the_store_are_left_alone():
    ph.LayerwiseELBO().loss(model, bottom_up(plain), X)  # another pair first
    guide = bottom_up(plain)
    torch.manual_seed(3)
    first = ph.LayerwiseELBO().loss(model, guide, X)
    torch.manual_seed(3)
    second = ph.LayerwiseELBO().loss(model, guide, X)
    assert first == second


def test_explain_says_why():
    text = str(ph.explain(ph.LayerwiseELBO(), model, bottom_up(plain), X))
    assert "its model parent(s) ['z2'] descend from it in the guide" in text
    assert "a datum is an index of: data" in text


def test_descendants_of_descendants():
    guide = {"a": frozenset(), "b": frozenset({"a"}), "c": frozenset({"b"}), "d": frozenset()}
    found = Dependencies(model={"a": frozenset({"c"})}, guide=guide, order=("a", "b", "c", "d"), complete=True)
    assert found.descendants("a") == {"b", "c"}
    assert found.descendants("b") == {"c"}
    assert found.broken_by("a") == {"c"}
