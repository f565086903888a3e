"""``fit`` of a diffusion, in continuous time too, where neither program can be run."""

import math

import pyro
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO, SimpleDiffusionLoss
from pyro_hvae.diffusion import LearnedSchedule
from pyro_hvae.models import vdm
from pyro_hvae.nn import MLP, DenoisingMLP
from pyro_hvae.training.objective import PairObjective


def pair(num_layers):
    torch.manual_seed(0)
    schedule = LearnedSchedule(-6.0, 3.0)
    return vdm(DenoisingMLP(2, hidden=16), event_shape=2, num_layers=num_layers, schedule=schedule)


@pytest.mark.parametrize("route", ["svi", "module", "fit"])
@pytest.mark.parametrize("num_layers", [50, None])
def test_denoiser_schedule_and_likelihood_train_by_each_route(route, num_layers):
    model, guide = vdm(
        DenoisingMLP(2, hidden=16),
        event_shape=2,
        num_layers=num_layers,
        schedule=LearnedSchedule(-6.0, 3.0),
        likelihood=ph.Gaussian(MLP(2, 4, (8,))),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, bound = torch.randn(32, 2), DiffusionELBO()
    if route == "fit":
        ph.fit(model, guide, x, bound=bound, steps=5, progress=False)
    elif route == "svi":
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), bound)
        for _ in range(5):
            svi.step(x)
    else:
        objective = bound(model, guide)
        optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            objective(x).backward()
            optimizer.step()
    assert {name.split(".")[0] for name in before} == {"denoiser", "schedule", "x"}
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("num_layers", [1000, None])
@pytest.mark.parametrize("bound", [DiffusionELBO(), SimpleDiffusionLoss()])
def test_every_parameter_is_fitted_and_validated(num_layers, bound):
    model, guide = pair(num_layers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(64, 2)
    result = ph.fit(
        model, guide, x, bound=bound, steps=20, batch_size=16, validation=x, validate_every=10, progress=False
    )
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    shown = [record["validation_loss"] for record in result.history if "validation_loss" in record]
    assert len(shown) == 2
    assert all(map(math.isfinite, shown))
    # nats a datum, not of the batch: 64 rows of it would be 64 times as many
    torch.manual_seed(1)
    assert abs(shown[-1] + float(DiffusionELBO(100).per_datum(model, guide, x).mean())) < 0.5 * abs(shown[-1])


def test_a_smaller_last_batch_counts_for_the_whole_data_too():
    model, guide = pair(None)
    x = torch.randn(4000, 2)
    objective = PairObjective(DiffusionELBO(), model, guide, (x[:64],), {}, 4000)
    with torch.no_grad():
        many, few = float(objective(x)), float(objective(x[:1000]))
    assert abs(many - few) < 0.1 * abs(many)  # both in nats a datum


def test_resumed_as_if_never_stopped(tmp_path):
    x = torch.randn(64, 2)

    def trained(steps, **options):
        model, guide = pair(None)
        torch.manual_seed(2)
        ph.fit(model, guide, x, bound=DiffusionELBO(), steps=steps, batch_size=16, seed=3, progress=False, **options)
        return model.state_dict()

    whole = trained(12)
    trained(7, run_dir=tmp_path / "run")
    resumed = trained(12, run_dir=tmp_path / "run", resume=True)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=0, rtol=0)
