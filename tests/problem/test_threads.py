"""Threads: pairs are evaluated side by side, while another one trains, and every value is the single-threaded one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_hvae as ph
from pyro_hvae.nn import Flattened
from pyro_hvae.problem import Problem
from pyro_hvae.problem.isolation import evaluating
from tests.linear_gaussian import Oracle, linear_gaussian


class Noisy(nn.Module):
    """A program of its own number of rows, with batch norm and dropout in training mode, and a minibatch it draws."""

    def __init__(self, size: int, batch: int) -> None:
        super().__init__()
        self.size, self.batch = size, batch
        self.net = Flattened(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Dropout(0.5)), 1)

    def latent(self) -> Tensor:
        return pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))


class Model(Noisy):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("rows", self.size, subsample_size=self.batch) as index:
            z = self.latent()
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x[index])


class Guide(Noisy):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("rows", self.size, subsample_size=self.batch):
            self.latent()


def together(*tasks: Callable[[], Any]) -> None:
    """Run tasks at once, each in a thread, and pass on the first error."""
    failed: list[BaseException] = []
    start = threading.Barrier(len(tasks))

    def guarded(task: Callable[[], Any]) -> None:
        try:
            start.wait()
            task()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def test_eight_evaluations_and_a_fit():
    """The guides are exact, so that no value depends on the draws, which come from one generator."""
    cases = [linear_gaussian(depth, size=3 + place, nudge=0.05) for place, depth in enumerate([1, 2, 3, 1, 2, 3, 1, 2])]
    truths = [Oracle(case.model).log_evidence(case.x).detach() for case in cases]
    verbs: list[Callable[..., Tensor]] = [
        lambda *pair: ph.IWELBO(4, chunk_size=2).per_datum(*pair),
        lambda *pair: ph.log_evidence(*pair, num_samples=20, chunk_size=5).value,
        lambda *pair: ph.evidence_sandwich(*pair, num_chains=2, betas=3).upper,
        lambda *pair: torch.as_tensor(
            ph.to_datatree(*pair, num_draws=3, groups=["sample_stats"])["sample_stats"]["log_weight"].values[0, 1]
        ),
    ]
    trained = linear_gaussian(1, size=40, nudge=0.05)
    found: dict[tuple[int, int], Tensor] = {}

    def evaluate(place: int) -> None:
        case = cases[place]
        for turn in range(len(verbs)):
            found[place, turn] = verbs[(place + turn) % len(verbs)](case.model, case.exact, case.x)

    def fit() -> None:
        ph.fit(
            trained.model, trained.other, trained.x, bound=ph.TraceELBO(), steps=20, batch_size=40, progress=False
        )

    before = [p.detach().clone() for p in trained.other.parameters()]
    together(fit, *(lambda place=place: evaluate(place) for place in range(8)))
    assert len(found) == 8 * len(verbs)
    for (place, _), value in found.items():
        torch.testing.assert_close(value.double(), truths[place], rtol=0.0, atol=1e-6)
    assert any(not torch.equal(p, old) for p, old in zip(trained.other.parameters(), before, strict=True))
    assert all(m.training for case in cases for program in (case.model, case.exact) for m in program.modules())


def test_densities_of_given_draws():
    """Modes, minibatches and switches of one thread are not those of another."""
    sizes = [(6, 2), (6, 6), (9, 4), (5, 1)]
    problems, draws, expected = [], [], []
    for size, batch in sizes:
        model, guide = Model(size, batch), Guide(size, batch)
        problem = Problem(model, guide)(torch.randn(size, 1))
        run = problem.run(3)
        problems.append(problem)
        draws.append(run.values)
        expected.append(run.log_weights)

    def evaluate(place: int) -> None:
        for _ in range(10):
            found = problems[place].run(3, draws[place]).log_weights
            torch.testing.assert_close(found, expected[place], rtol=0.0, atol=0.0)

    together(*(lambda place=place: evaluate(place) for place in [*range(4), *range(4)]))
    for problem in problems:
        assert all(module.training for module in [*problem.model.modules(), *problem.guide.modules()])


def test_one_pair_in_two_threads_with_different_numbers_of_rows():
    case = linear_gaussian(2, size=8, nudge=0.05)
    truth = Oracle(case.model).log_evidence(case.x).detach()

    def evaluate(rows: int) -> None:
        for _ in range(5):
            value = ph.IWELBO(3).per_datum(case.model, case.exact, case.x[:rows])
            torch.testing.assert_close(value, truth[:rows], rtol=0.0, atol=1e-9)

    together(*(lambda rows=rows: evaluate(rows) for rows in (8, 3, 1, 5)))


def test_looking_in_one_thread_leaves_the_draws_of_another_alone():
    """What is looked at without side effects puts torch's generator back, and no draw of another thread with it."""
    case = linear_gaussian(1, size=4, nudge=0.05)
    other = linear_gaussian(1, size=4, nudge=0.05)
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            Problem(other.model, other.other)(other.x).look()

    seen: list[Tensor] = []

    def draw() -> None:
        problem = Problem(case.model, case.other)(case.x)
        seen.extend(problem.run(2).values["z1"] for _ in range(60))
        done.set()

    together(look, draw)
    assert len({tuple(value.flatten().tolist()) for value in seen}) == 60


def test_an_evaluation_leaves_the_parameters_that_another_thread_makes():
    """It takes out of Pyro's store what its own programs added, and nothing that training has added meanwhile."""
    entered, made = threading.Event(), threading.Event()

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("of_model", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    def evaluate() -> None:
        problem = Problem(model, guide)(torch.zeros(3))
        with evaluating():
            problem.run()
            entered.set()
            assert made.wait(60)
            problem.run()

    def train() -> None:
        assert entered.wait(60)
        pyro.param("of_training", torch.ones(()))
        made.set()

    together(evaluate, train)
    assert list(pyro.get_param_store().keys()) == ["of_training"]


def test_a_gradient_is_whole_while_another_thread_holds_the_parameters_constant():
    """``stl``, ``dreg`` and CUBO hold them for a moment.  The prior's mean b has the gradient N (b - a) of the KL."""
    x = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("b", 0.3 * one), one))
            pyro.sample("x", dist.Normal(z, one), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", 0.8 * one), one))

    ph.TraceELBO().loss(model, guide, x)
    b = pyro.param("b")

    def hold() -> None:
        for _ in range(100):
            for bound in (ph.IWELBO(2, "stl"), ph.IWELBO(2, "dreg"), ph.CUBO(2, num_particles=2)):
                bound.differentiable_loss(model, guide, x)

    def train() -> None:
        for _ in range(300):
            b.grad = None
            ph.LayerwiseELBO().loss_and_grads(model, guide, x)
            assert b.grad is not None
            assert abs(float(b.grad) - 5 * (0.3 - 0.8)) < 1e-12

    together(hold, train)
