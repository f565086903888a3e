"""Every bound on every pair of the registry, by every gradient: a right value, or the documented error.

Values are compared with log-weights that Pyro's own traces give, one draw at a time, reduced by the formulas below;
pathwise gradients with finite differences under one seed; the other gradients with the pathwise one in the mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pytest
import torch
from scipy import stats
from torch import Tensor

import pyro_hvae as ph
from pyro_hvae.bounds import log_spacing
from tests.programs import PAIRS, build, parameters, reference_weights

K = 4


def average(w: Tensor) -> Tensor:
    return w.mean(0)


def importance(w: Tensor) -> Tensor:
    return w.logsumexp(0) - math.log(len(w))


def renyi(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda w: importance((1 - alpha) * w) / (1 - alpha)


def chi(order: int) -> Callable[[Tensor], Tensor]:
    return lambda w: importance(order * w) / order


def self_normalised(power: float) -> Callable[[Tensor], Tensor]:
    return lambda w: ((power * w).softmax(0) * w).sum(0)


def thermodynamic(betas: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    ends = [*betas[1:], 1.0]
    return lambda w: sum((end - beta) * self_normalised(beta)(w) for beta, end in zip(betas, ends, strict=True))


@dataclass
class Entry:
    """A bound as the suite uses it; ``make`` takes a gradient, ``reduce`` K weights to the value by hand."""

    make: Callable
    reduce: Callable[[Tensor], Tensor]
    gradients: tuple[str, ...]
    above: bool = False
    single: bool = False


BOUNDS = {
    "TraceELBO": Entry(lambda g: ph.TraceELBO(K, g), average, ("pathwise", "stl", "score"), single=True),
    "LayerwiseELBO": Entry(lambda g: ph.LayerwiseELBO(K, g), average, ("pathwise",), single=True),
    "IWELBO": Entry(lambda g: ph.IWELBO(K, g), importance, ("pathwise", "stl", "dreg", "vimco")),
    "MIWAE": Entry(lambda g: ph.IWELBO(K, g, num_repeats=3), importance, ("pathwise", "stl", "dreg", "vimco")),
    "VR(.5)": Entry(lambda g: ph.VRBound(0.5, K, g), renyi(0.5), ("pathwise", "score")),
    "VR(2)": Entry(lambda g: ph.VRBound(2.0, K, g), renyi(2.0), ("pathwise", "score")),
    "TVO": Entry(lambda g: ph.ThermodynamicBound(K, 3, g), thermodynamic((0, 1 / 3, 2 / 3)), ("pathwise", "score")),
    "TVO(log)": Entry(
        lambda g: ph.ThermodynamicBound(K, log_spacing(3, 0.25), g),
        thermodynamic((0, 0.25, 0.5)),
        ("pathwise", "score"),
    ),
    "CUBO": Entry(lambda g: ph.CUBO(2, K), chi(2), ("pathwise",), above=True),
    "EUBO": Entry(lambda g: ph.EUBO(K), self_normalised(1.0), ("pathwise",), above=True),
}
UNREPARAMETERISED = ("score", "vimco")
MATRIX = [(name, bound, gradient) for name in PAIRS for bound in BOUNDS for gradient in BOUNDS[bound].gradients]


def total(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(-1)


def stderr(values: Tensor) -> Tensor:
    return values.std(0) / len(values) ** 0.5


def refusal(pair, entry: Entry, gradient: str) -> str | None:
    """What the message has to name, or None where the pair is to be accepted."""
    if pair.refused and not entry.single:
        return f"plate '{pair.refused[0]}'"
    if pair.moved and gradient in ("stl", "dreg"):
        return rf"site '{pair.moved}' is a Delta.*{gradient}.*gradient='pathwise'"
    if pair.discrete and entry.above:
        return rf"site\(s\) \[.*'{pair.discrete[0]}'.*WakePhase"
    if pair.discrete and gradient not in UNREPARAMETERISED:
        return rf"site\(s\) \[.*'{pair.discrete[0]}'.*gradient=.(score|vimco)"
    return None


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", PAIRS)
def test_value(name, bound):
    entry, pair = BOUNDS[bound], build(name)
    objective = entry.make("pathwise")
    if pair.refused and not entry.single:
        with pytest.raises(ValueError, match=f"plate '{pair.refused[0]}'"):
            objective.per_datum(pair.model, pair.guide, *pair.args, **pair.kwargs)
        return
    values = []
    for evaluate in (objective.per_datum, objective.loss):
        pyro.set_rng_seed(3)
        values.append(evaluate(pair.model, pair.guide, *pair.args, **pair.kwargs))
    first, loss = values
    sign = 1 if entry.above else -1
    torch.testing.assert_close(loss, sign * pair.scale * first.sum())
    draws = torch.stack([objective.per_datum(pair.model, pair.guide, *pair.args, **pair.kwargs) for _ in range(20)])
    weights = reference_weights(name)
    assert first.shape == weights.shape[1:]
    assert not first.requires_grad
    expected = total(torch.stack([entry.reduce(group) for group in weights.split(K)]))
    drawn = total(draws)
    error = (stderr(drawn) ** 2 + stderr(expected) ** 2).sqrt()
    assert (drawn.mean() - expected.mean()).abs() <= 4 * error + 1e-10
    if not entry.above and pair.log_evidence is not None:
        assert first.shape == pair.log_evidence.shape
        excess = drawn.mean() - pair.log_evidence.sum()
        assert excess <= 4 * stderr(drawn) + 1e-9
    if pair.exact and not isinstance(objective, ph.LayerwiseELBO):  # its closed forms are exact in the mean only
        torch.testing.assert_close(draws, pair.log_evidence.expand_as(draws), rtol=0, atol=1e-10)


def leaves(pair, objective) -> list[Tensor]:
    """Parameters of a pair, after the run that makes them."""
    pyro.set_rng_seed(1)
    objective.loss(pair.model, pair.guide, *pair.args, **pair.kwargs)
    return parameters(pair)


def gradients(pair, objective, found: list[Tensor]) -> Tensor:
    """The gradient in all parameters, flat."""
    for p in found:
        p.grad = None
    objective.loss_and_grads(pair.model, pair.guide, *pair.args, **pair.kwargs)
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in found])


def slope_along(pair, objective, found: list[Tensor], direction: list[Tensor], step: float = 1e-5) -> Tensor:
    """Central difference of the loss under one seed."""
    values = []
    for sign in (1, -1):
        for p, d in zip(found, direction, strict=True):
            p.data.add_(d, alpha=sign * step)
        pyro.set_rng_seed(5)
        values.append(objective.loss(pair.model, pair.guide, *pair.args, **pair.kwargs))
        for p, d in zip(found, direction, strict=True):
            p.data.sub_(d, alpha=sign * step)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize(("name", "bound", "gradient"), MATRIX)
def test_gradient(name, bound, gradient):
    entry, pair = BOUNDS[bound], build(name)
    objective = entry.make(gradient)
    message = refusal(pair, entry, gradient)
    if message:
        with pytest.raises(ValueError, match=message):
            objective.loss_and_grads(pair.model, pair.guide, *pair.args, **pair.kwargs)
        return
    found = leaves(pair, objective)
    assert found
    held = set()
    if entry.above and isinstance(pair.model, torch.nn.Module):
        held = {id(p) for p in pair.model.parameters()}
    elif entry.above:
        held = {id(p) for p in found if owned_by_model(pair, p)}
    direction = [torch.zeros_like(p) if id(p) in held else torch.randn_like(p) for p in found]
    flat = torch.cat([d.flatten() for d in direction])
    if pair.discrete:
        assert gradients(pair, objective, found).isfinite().all()
    elif gradient == "pathwise" or gradient in UNREPARAMETERISED:
        pyro.set_rng_seed(5)
        along = gradients(pair, objective, found) @ flat
        torch.testing.assert_close(along, slope_along(pair, objective, found, direction), rtol=2e-5, atol=1e-6)
    elif bound == "MIWAE":  # the mean of copies of IWELBO, which is what the two below average over
        assert gradients(pair, objective, found).isfinite().all()
    elif gradient == "stl":
        # unbiased for one particle only
        agree_in_the_mean(pair, *(many(bound, g, 1) for g in ("stl", "pathwise")), found)
    else:
        agree_in_the_mean(pair, *(many(bound, g, K) for g in (gradient, "pathwise")), found)


def owned_by_model(pair, parameter: Tensor) -> bool:
    """Whether a tensor of the store is a parameter of the model, found by running it alone."""
    trace = pyro.poutine.trace(pair.model, param_only=True).get_trace(*pair.args, **pair.kwargs)
    return any(
        pyro.param(name).unconstrained() is parameter for name in trace.nodes if trace.nodes[name]["type"] == "param"
    )


def many(bound: str, gradient: str, num_particles: int, copies: int = 80):
    """The mean of many independent copies of a bound, drawn at once."""
    if bound == "TraceELBO":
        return ph.TraceELBO(copies, gradient)
    return ph.IWELBO(num_particles, gradient, num_repeats=copies)


def agree_in_the_mean(pair, first, second, found: list[Tensor], runs: int = 16) -> None:
    """The mean gradient of two objectives is the same, parameter by parameter, on runs paired by their draws."""
    ours, theirs = [], []
    for seed in range(runs):
        for objective, into in ((first, ours), (second, theirs)):
            pyro.set_rng_seed(seed)
            into.append(gradients(pair, objective, found))
    ours, theirs = torch.stack(ours), torch.stack(theirs)
    difference = ours - theirs
    # as rare as 4 standard errors for a normal variate, for so many parameters and so few runs
    limit = stats.t.isf(3e-5 / difference.shape[1], runs - 1)
    assert (difference.mean(0).abs() <= limit * stderr(difference) + 1e-9).all()
