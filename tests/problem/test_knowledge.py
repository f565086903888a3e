"""What is remembered of a pair: bounded, keyed by what it depends on, and holding nothing alive."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from torch import Tensor, nn

import pyro_hvae as ph
from pyro_hvae.problem import Problem
from pyro_hvae.problem.cached import MOST
from pyro_hvae.problem.knowledge import argument_key, knowledge_of


class Model(nn.Module):
    """Counts its runs, in a list: a small number that rises would be taken for a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[int] = []
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *options: Any, **named: Any) -> None:
        self.runs.append(len(x))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)


class Guide(nn.Module):
    def forward(self, x: Tensor, *options: Any, **named: Any) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def truth(x: Tensor) -> Tensor:
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def sizes(model: Any, guide: Any) -> tuple[int, ...]:
    known = knowledge_of(model, guide)
    facts = [len(structure.facts) for structure in known._structures.values()]
    return len(known._structures), len(known._guesses), len(known.facts), *sorted(facts)


@pytest.mark.parametrize("verb", ["per_datum", "evidence", "gradient"])
def test_a_float_that_changes_at_each_call_is_no_new_kind_of_argument(verb: str) -> None:
    model, guide, x = Model(), Guide(), torch.randn(4)

    def call(weight: float) -> int:
        before = len(model.runs)
        if verb == "per_datum":
            ph.TraceELBO(3).per_datum(model, guide, x, weight, temperature=weight)
        elif verb == "evidence":
            ph.log_evidence(model, guide, x, weight, num_samples=20, temperature=weight)
        else:
            ph.IWELBO(3).differentiable_loss(model, guide, x, weight, temperature=weight)
        return len(model.runs) - before

    first = call(0.0)
    kept = sizes(model, guide)
    each = 2 if verb == "evidence" else 1  # one run compares the structure before draws are laid out by it
    assert [call(0.01 * step) for step in range(1, 30)] == [each] * 29
    assert first > each
    assert sizes(model, guide) == kept


def test_the_number_of_structures_is_bounded() -> None:
    model, guide = Model(), Guide()
    for size in range(1, 2 * MOST):
        x = torch.linspace(-1.0, 1.0, size)
        torch.testing.assert_close(ph.IWELBO(2).per_datum(model, guide, x), truth(x))
    structures, guesses, *_ = sizes(model, guide)
    assert structures <= MOST
    assert guesses <= MOST
    x = torch.tensor([0.3])
    torch.testing.assert_close(ph.IWELBO(2).per_datum(model, guide, x), truth(x))  # a forgotten one


def test_facts_are_bounded() -> None:
    """What was derived under one setting of a program's switches is forgotten after many others."""
    model, guide, x = Model(), Guide(), torch.randn(3)
    for step in range(2 * MOST):
        model.label = f"step {step}"
        torch.testing.assert_close(ph.IWELBO(2).per_datum(model, guide, x), truth(x))
        Problem(model, guide)(x).simulate()
    _, _, facts, *of_structures = sizes(model, guide)
    assert facts <= MOST
    assert max(of_structures) <= MOST


def test_arguments_and_programs_are_released() -> None:
    class Table:
        def __init__(self) -> None:
            self.values = torch.randn(10)

        def __len__(self) -> int:
            return 3

    def evaluate() -> list[weakref.ref]:
        model, guide, x = Model(), Guide(), torch.randn(3)
        table, plain = Table(), torch.randn(100)
        for verb in (ph.TraceELBO().per_datum, ph.IWELBO(2).loss, ph.log_evidence, ph.to_datatree):
            options = {"num_samples": 20} if verb is ph.log_evidence else {}
            options |= {"num_draws": 3} if verb is ph.to_datatree else {}
            verb(model, guide, x, table, plain, **options)
        found = [weakref.ref(item) for item in (x, table, plain)]
        del x, table, plain, verb
        gc.collect()
        assert [reference() for reference in found] == [None] * 3
        return [weakref.ref(model), weakref.ref(guide)]

    programs = evaluate()
    gc.collect()
    assert [reference() for reference in programs] == [None, None]


def test_kinds_of_arguments() -> None:
    x = torch.zeros(2)
    assert argument_key((x, 0.5), {}) == argument_key((x + 1, 0.7), {})
    others: list[tuple] = [
        (torch.zeros(3), 0.5), (x.double() if x.dtype != torch.double else x.float(), 0.5), (x, 1), (x, True),
        (x, "a"), (x, None), (x,), (x.numpy(), 0.5),
    ]  # fmt: skip
    keys = {argument_key((x, 0.5), {}), *(argument_key(args, {}) for args in others)}
    assert len(keys) == 1 + len(others)
    assert argument_key((), {"a": x}) != argument_key((), {"b": x})


def test_two_methods_of_one_object_are_two_programs() -> None:
    class Both:
        def model(self, x: Tensor) -> None:
            Model().forward(x)

        def guide(self, x: Tensor) -> None:
            Guide().forward(x)

        def wide(self, x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 2.0))

    both, x = Both(), torch.randn(4)
    assert knowledge_of(both.model, both.guide) is knowledge_of(both.model, both.guide)
    assert knowledge_of(both.model, both.guide) is not knowledge_of(both.model, both.wide)
    torch.testing.assert_close(ph.IWELBO(3).per_datum(both.model, both.guide, x), truth(x))


def test_a_guide_that_becomes_a_point_is_noticed() -> None:
    """The class of its distribution is another one, and nothing else that a run shows."""
    setting = SimpleNamespace(point=False)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Delta(x / 2) if setting.point else dist.Normal(x / 2, 0.5**0.5))

    model, x = Model(), torch.randn(3)
    torch.testing.assert_close(ph.IWELBO(2).per_datum(model, guide, x), truth(x))
    setting.point = True
    with pytest.raises(ValueError, match=r"point estimate of \['z'\]"):
        ph.IWELBO(2).per_datum(model, guide, x)


def test_a_base_without_reparameterised_draws_is_noticed() -> None:
    """The distribution is of the same class, and only its base has no rsample any more."""
    base = SimpleNamespace(of=dist.Normal)
    loc = torch.zeros((), requires_grad=True)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            made = base.of(x / 2 + loc, torch.tensor(0.7))
            pyro.sample("z", dist.TransformedDistribution(made, [dist.transforms.AffineTransform(0.0, 1.0)]))

    model, x = Model(), torch.randn(3)
    problem = Problem(model, guide)
    assert problem(x).run().structure.sites["z"].has_rsample
    base.of = NonreparameterizedNormal
    assert not problem(x).run().structure.sites["z"].has_rsample
    with pytest.raises(ValueError, match=r"\['z'\] have no reparameterised draws"):
        ph.TraceELBO().differentiable_loss(model, guide, x)


def test_the_first_call_draws_the_minibatch_that_later_ones_draw() -> None:
    x = torch.randn(30)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 30, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 30, subsample_size=4) as index:
            pyro.sample("z", dist.Normal(x[index] / 3, 1.0))

    def value() -> Tensor:
        pyro.set_rng_seed(2)
        return ph.IWELBO(3).per_datum(model, guide, x)

    torch.testing.assert_close(value(), value(), rtol=0.0, atol=0.0)
    bad = torch.full_like(x, torch.nan)
    with pytest.raises(ValueError, match="4 of 4 observed values at site 'x' are NaN"):
        ph.IWELBO(3).per_datum(model, guide, bad)


@pytest.mark.parametrize(
    "verb",
    [
        lambda *pair: ph.log_evidence(*pair, num_samples=20),
        lambda *pair: ph.log_evidence(*pair, num_samples=20, method="bayes"),
        lambda *pair: ph.evidence_sandwich(*pair, num_chains=2, betas=3),
        lambda *pair: ph.diagnostics.khats(*pair, num_draws=30),
    ],
    ids=["importance", "bayes", "sandwich", "khats"],
)
def test_a_plate_that_becomes_a_minibatch_is_noticed_before_draws_are_laid_out(verb: Any) -> None:
    setting = SimpleNamespace(size=4)
    x = torch.randn(4)

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("rows", setting.size, subsample=torch.arange(4)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(x.sum() / 5, 0.5))

    verb(model, guide, x)
    setting.size = 400
    with pytest.raises(ValueError, match="subsampled plate 'rows' shows 4 of 400"):
        verb(model, guide, x)


def test_what_was_computed_is_kept() -> None:
    problem = Problem(Model(), Guide())(torch.randn(3))
    run = problem.run(2)
    assert run.log_weights is run.log_weights
    assert problem.template is problem.template


def test_a_mark_that_appears_in_the_guide_is_noticed() -> None:
    """The site keeps its distribution and is enumerated from then on, so that nothing depends on draws any more."""
    infer: dict[str, Any] = {}

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(2 * k, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer=dict(infer))

    x = torch.randn(3)
    ph.TraceELBO().per_datum(model, guide, x)
    infer["enumerate"] = "parallel"
    terms = [dist.Bernoulli(0.3).log_prob(k) + dist.Normal(2 * k, 1.0).log_prob(x) for k in torch.tensor([0.0, 1.0])]
    expected = torch.stack(terms).mean(0) - torch.tensor(0.5).log()
    torch.testing.assert_close(ph.TraceELBO().per_datum(model, guide, x), expected)
