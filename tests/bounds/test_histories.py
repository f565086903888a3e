"""Whatever was called before: values and gradients under one seed are those of a pair that was never called.

Each history calls the objective on the pair; afterwards the outcome on the pair's own data must be that of new
programs.  The ordinary suite lets every program go through all histories in a row, with two bounds; the slow one takes
each history by itself, for every program, bound and gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from tests.bounds.test_programs import BOUNDS, MATRIX, refusal
from tests.programs import PAIRS, Pair, build

Outcome = dict[str, Any]


def call(pair: Pair, objective: Any, args: tuple | None = None) -> None:
    """Value and gradient on other arguments, or a refusal of them."""
    args = pair.args if args is None else args
    for evaluate in (objective.per_datum, objective.loss_and_grads):
        try:
            evaluate(pair.model, pair.guide, *args, **pair.kwargs)
        except (ValueError, RuntimeError, IndexError):  # impossible data may be an error of torch's
            continue


def other_data(pair: Pair, objective: Any) -> None:
    call(pair, objective, tuple(x.flip(0) for x in pair.args))


def fewer_rows(pair: Pair, objective: Any) -> None:
    if pair.rows is not None:
        call(pair, objective, tuple(x.narrow(d, 0, x.shape[d] - 1) for x, d in zip(pair.args, pair.rows, strict=True)))


def more_rows(pair: Pair, objective: Any) -> None:
    if pair.rows is not None:
        call(pair, objective, tuple(torch.cat([x, x], d) for x, d in zip(pair.args, pair.rows, strict=True)))


def one_row(pair: Pair, objective: Any) -> None:
    if pair.rows is not None:
        call(pair, objective, tuple(x.narrow(d, 1, 1) for x, d in zip(pair.args, pair.rows, strict=True)))


def impossible_data(pair: Pair, objective: Any) -> None:
    bad = tuple(x * torch.nan if x.is_floating_point() else x + 1000 for x in pair.args)
    call(pair, objective, bad)


def other_modes(pair: Pair, objective: Any) -> None:
    modules = [program for program in (pair.model, pair.guide) if isinstance(program, nn.Module)]
    for training in (False, True):
        for module in modules:
            module.train(training)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                call(pair, objective)


def another_thread(pair: Pair, objective: Any) -> None:
    failed: list[BaseException] = []

    def evaluate() -> None:
        try:
            for _ in range(2):
                call(pair, objective)
                more_rows(pair, objective)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=evaluate)
    thread.start()
    evaluate()
    thread.join()
    assert not failed


HISTORIES: dict[str, Callable[[Pair, Any], None]] = {
    made.__name__: made
    for made in (other_data, fewer_rows, more_rows, one_row, impossible_data, other_modes, another_thread)
}


def named_parameters(pair: Pair) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for which, program in (("model", pair.model), ("guide", pair.guide)):
        if isinstance(program, nn.Module):
            found |= {f"{which}.{name}": parameter for name, parameter in program.named_parameters()}
    owned = {id(parameter) for parameter in found.values()}
    stored = pyro.get_param_store().named_parameters()
    return found | {name: parameter for name, parameter in stored if id(parameter) not in owned}


def value_of(pair: Pair, objective: Any) -> Outcome:
    pyro.set_rng_seed(3)
    try:
        return {"value": objective.per_datum(pair.model, pair.guide, *pair.args, **pair.kwargs)}
    except ValueError as error:
        return {"value": str(error)}


def gradients_of(pair: Pair, objective: Any) -> Outcome:
    for parameter in named_parameters(pair).values():
        parameter.grad = None
    pyro.set_rng_seed(4)
    try:
        loss = objective.loss_and_grads(pair.model, pair.guide, *pair.args, **pair.kwargs)
    except ValueError as error:
        return {"loss": str(error)}
    return {"loss": loss, **{name: parameter.grad for name, parameter in named_parameters(pair).items()}}


@cache
def outcome_of_new_programs(name: str, bound: str, gradient: str) -> Outcome:
    """Value and gradient, each of programs that nothing has been asked of before."""
    found: Outcome = {}
    for ask in (value_of, gradients_of):
        pyro.clear_param_store()
        found |= ask(build(name), BOUNDS[bound].make(gradient))
    pyro.clear_param_store()
    return found


def same_outcome(found: Outcome, expected: Outcome, after: str) -> None:
    assert found.keys() == expected.keys(), after
    for key, value in expected.items():
        if isinstance(value, Tensor):
            where = f"{key} {after}: "
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12, msg=where.__add__)
        else:
            assert found[key] == value, f"{key} {after}"


def compare(name: str, bound: str, gradient: str, histories: tuple[str, ...]) -> None:
    expected = outcome_of_new_programs(name, bound, gradient)
    pair, objective = build(name), BOUNDS[bound].make(gradient)
    for history in histories:
        HISTORIES[history](pair, objective)
        found = value_of(pair, objective) | gradients_of(pair, objective)
        same_outcome(found, expected, f"after {history}")


def thinned() -> list[tuple[str, str, str]]:
    """Two bounds for each program, in turns, of those that it is not refused."""
    chosen = []
    kinds = [(bound, gradient) for bound, entry in BOUNDS.items() for gradient in entry.gradients]
    for place, name in enumerate(PAIRS):
        pair = build(name)
        turned = kinds[2 * place % len(kinds) :] + kinds[: 2 * place % len(kinds)]
        accepted = [(b, g) for b, g in turned if refusal(pair, BOUNDS[b], g) is None]
        first = accepted[0]
        chosen += [(name, *first), (name, *next(kind for kind in accepted if kind[0] != first[0]))]
    return chosen


THINNED = thinned()


def test_every_bound_has_two_programs():
    for bound in BOUNDS:
        assert len({name for name, other, _ in THINNED if other == bound}) >= 2


@pytest.mark.parametrize(("name", "bound", "gradient"), THINNED)
def test_all_histories_in_a_row(name, bound, gradient):
    compare(name, bound, gradient, tuple(HISTORIES))


@pytest.mark.slow
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(("name", "bound", "gradient"), MATRIX)
def test_each_history(name, bound, gradient, history):
    compare(name, bound, gradient, (history,))
