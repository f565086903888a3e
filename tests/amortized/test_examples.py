"""The models of benchmarks/example_models.py: guides made from them train, and answer for another number of groups."""

import sys
from pathlib import Path

import pytest
import torch

import pyro_hvae as ph

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from example_models import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_guides_train_and_answer_for_new_groups(name):
    case = MODELS[name]
    torch.manual_seed(0)
    data = case.simulate(20)
    guide = ph.amortize(case.model, *data, hidden=(8, 8))
    before = ph.TraceELBO(num_particles=50).loss(case.model, guide, *data)
    ph.fit(
        case.model, guide, data, bound=ph.TraceELBO(num_particles=4), lr=0.01, steps=60, batch_size=None, progress=False
    )  # fmt: skip
    after = ph.TraceELBO(num_particles=50).loss(case.model, guide, *data)
    assert torch.isfinite(after)
    assert after < before
    if case.local:
        new = case.simulate(7)
        assert torch.isfinite(ph.Problem(case.model, guide)(*new).run(10).log_weights).all()
