"""Times that importance sampling of a diffusion learns: only training changes them, and they are saved."""

import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.models import vdm
from pyro_hvae.nn import DenoisingMLP


def pair(num_layers=5):
    torch.manual_seed(0)
    return vdm(DenoisingMLP(2, hidden=8, num_layers=1), event_shape=2, num_layers=num_layers)


def trained(looks=(), steps=40, num_layers=5):
    """Objective after some steps, with looks in between that must change nothing; its last losses."""
    model, guide = pair(num_layers)
    bound = ph.DiffusionELBO(sampling="importance")
    objective = bound(model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    torch.manual_seed(1)
    x, losses = torch.randn(64, 2), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = objective(x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        with torch.random.fork_rng():
            for look in looks:
                getattr(bound, look)(model, guide, 30 * torch.randn(16, 2))
    return objective, torch.tensor(losses[-10:])


@pytest.mark.parametrize("num_layers", [5, None])
@pytest.mark.parametrize("look", ["terms", "per_datum", "loss"])
def test_looking_does_not_change_the_learned_times(look, num_layers):
    _, untouched = trained(num_layers=num_layers)
    _, looked_at = trained([look], num_layers=num_layers)
    assert torch.equal(untouched, looked_at)


def test_learned_times_are_in_the_state_dict():
    objective, _ = trained()
    plain = ph.DiffusionELBO(sampling="uniform")(*pair())
    assert set(objective.state_dict()) > set(plain.state_dict())


@pytest.mark.parametrize("num_layers", [5, None])
def test_learned_times_are_loaded_with_the_state_dict(num_layers):
    first, _ = trained(num_layers=num_layers)
    second = ph.DiffusionELBO(sampling="importance")(*pair(num_layers))
    second.load_state_dict(first.state_dict())
    x = torch.randn(64, 2)
    losses = []
    for objective in (first, second):
        torch.manual_seed(5)
        losses.append(objective(x).detach())
    assert torch.equal(*losses)


def run(steps, validation=None, **options):
    model, guide = pair()
    torch.manual_seed(2)
    x = torch.randn(96, 2)
    torch.manual_seed(3)
    result = ph.fit(
        model,
        guide,
        x,
        bound=ph.DiffusionELBO(sampling="importance"),
        steps=steps,
        batch_size=32,
        validation=validation,
        validate_every=3,
        log_every=1,
        seed=0,
        progress=False,
        **options,
    )
    return [record["loss"] for record in result.history if "loss" in record], model


def test_validation_does_not_change_the_learned_times():
    alone, _ = run(40)
    validated, _ = run(40, validation=30 * torch.randn(16, 2))
    assert alone == validated


def test_a_resumed_run_goes_on_with_the_learned_times(tmp_path):
    factory = ("pyro_hvae.models:vdm", {})
    whole, model = run(40)
    run(20, run_dir=tmp_path / "run", factory=factory)
    resumed, model_again = run(40, run_dir=tmp_path / "run", resume=True, factory=factory)
    assert resumed[-20:] == whole[-20:]
    for one, other in zip(model.parameters(), model_again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_terms_that_are_logged_do_not_change_the_learned_times():
    alone, _ = run(40, terms_every=1000)
    logged, _ = run(40, terms_every=1)
    assert alone == logged
