"""Guides made from every model of the registry: they train, and importance sampling with them gives the evidence."""

import pytest
import torch

import pyro_hvae as ph
import tests.programs  # noqa: F401 (fills the registry)
from pyro_hvae.amortized import amortize
from pyro_hvae.amortized.families import DiscreteHead
from tests.pair import PAIRS, build

SAME_MODEL = {"chain_exact", "chain_top_down", "ladder", "global_and_local_minibatch", "auto_multivariate"}
# Their layers exclude states of each other, which networks that start from scratch draw all the same: log p is -inf.
EXCLUDED_STATES = {"absorbing", "any_order"}


@pytest.mark.parametrize("name", sorted(set(PAIRS) - SAME_MODEL - EXCLUDED_STATES))
def test_the_model_gets_a_guide(name):
    pair = build(name)
    torch.manual_seed(0)
    guide = amortize(pair.model, *pair.args, hidden=(8,), **pair.kwargs)
    drawn = guide.inverse.drawn if hasattr(guide, "inverse") else ()
    score = any(isinstance(guide.conditional(site).head, DiscreteHead) for site in drawn)
    bound = ph.TraceELBO(num_particles=4, gradient="score" if score else "pathwise")
    guided = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(guided, lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        loss = bound.differentiable_loss(pair.model, guide, *pair.args, **pair.kwargs)
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    if pair.log_evidence is None or pair.refused:
        return
    evidence = ph.log_evidence(pair.model, guide, *pair.args, num_samples=4000, **pair.kwargs)
    error = (evidence.value - pair.log_evidence).abs()
    assert (error < 5 * evidence.stderr + 0.02).all(), (evidence.value, pair.log_evidence, evidence.stderr)


@pytest.mark.parametrize("name", sorted(EXCLUDED_STATES))
def test_draws_that_the_model_excludes_have_no_density(name):
    pair = build(name)
    torch.manual_seed(0)
    guide = amortize(pair.model, *pair.args, hidden=(8,), **pair.kwargs)
    bound = ph.IWELBO(1).per_datum(pair.model, guide, *pair.args, **pair.kwargs)
    assert (bound == -torch.inf).any()
