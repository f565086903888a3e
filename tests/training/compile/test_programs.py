"""Compiled equals eager under the same noise: every program of the registry, as a flat graph and by Inductor."""

import pytest
import torch

from pyro_hvae.bounds import IWELBO, LayerwiseELBO, TraceELBO
from pyro_hvae.training.compile import CompiledStep, trace
from pyro_hvae.training.compile.graph import split_batch
from pyro_hvae.training.objective import PairObjective
from tests.programs import PAIRS, build

BOUNDS = {
    "elbo": TraceELBO(),
    "stl": TraceELBO(gradient="stl"),
    "score": TraceELBO(num_particles=3, gradient="score"),
    "layerwise": LayerwiseELBO(),
    "iwelbo": IWELBO(num_particles=3),
    "dreg": IWELBO(num_particles=3, gradient="dreg"),
    "vimco": IWELBO(num_particles=3, gradient="vimco"),
}


def relative_error(found, expected):
    return max(float((a - b).norm() / (b.norm() + 1e-12)) for a, b in zip(found, expected, strict=True))


def objective_of(name, bound):
    """The objective of a registered pair; skips where the bound refuses the pair."""
    made = build(name)
    try:
        objective = PairObjective(bound, made.model, made.guide, made.args, made.kwargs, None)
        objective(*made.args, **made.kwargs)
    except ValueError as error:
        pytest.skip(f"the bound refuses this pair: {str(error)[:60]}")
    return objective, made


# Every program under one bound that takes it, and every bound on two programs; the rest is for the slow suite.
SCORE_ONLY = ("discrete_chain", "mixed", "absorbing", "any_order", "ordinal_noise", "uniform_noise")
QUICK = {(name, "score" if name in SCORE_ONLY else "elbo") for name in PAIRS}
QUICK |= {(name, bound) for name in ("chain_2", "ladder") for bound in BOUNDS}


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        pytest.param(name, bound, marks=() if (name, bound) in QUICK else pytest.mark.slow)
        for name in PAIRS
        for bound in BOUNDS
    ],
)
def test_flat_graph_equals_eager_under_the_same_noise(name, bound):
    objective, made = objective_of(name, BOUNDS[bound])
    parameters = [p for p in objective.parameters() if p.requires_grad]
    before = torch.get_rng_state()
    flat = trace(objective, parameters, made.args, made.kwargs)
    assert torch.equal(before, torch.get_rng_state())
    for seed in (3, 4):
        torch.manual_seed(seed)
        found = flat(*split_batch(made.args, made.kwargs)[0])
        torch.manual_seed(seed)
        loss = objective(*made.args, **made.kwargs)
        gradients = torch.autograd.grad(loss, flat.trained)
        assert relative_error(found, (loss.detach(), *gradients)) < 1e-10
    assert len(flat.trained) == len(parameters)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_inductor_equals_eager_for_every_program(name):
    objective, made = objective_of(name, TraceELBO(num_particles=2, gradient="score"))
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad])
    step = CompiledStep(objective, optimizer)
    program = step.prepare(made.args, made.kwargs)  # compares, and raises on a mismatch
    assert program is not None
    assert torch.isfinite(step(*made.args, **made.kwargs))
