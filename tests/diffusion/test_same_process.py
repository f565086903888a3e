"""Model and guide of a diffusion must be one process, and data of grey levels must be at the levels."""

import copy

import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO, SimpleDiffusionLoss
from pyro_hvae.bounds.capability import check_same_process
from pyro_hvae.diffusion import (
    BinnedGaussian,
    CosineSchedule,
    Diffusion,
    LearnedSchedule,
    LinearSchedule,
    MonotoneSchedule,
    inpaint,
)
from pyro_hvae.models import vdm
from pyro_hvae.nn import DenoisingMLP


def chain(schedule, num_layers=5):
    return vdm(DenoisingMLP(2), event_shape=2, num_layers=num_layers, schedule=schedule)[0]


@pytest.mark.parametrize("num_layers", [5, 1, None])
@pytest.mark.parametrize(
    "other",
    [
        lambda: LinearSchedule(-3.0, 2.0),
        lambda: LinearSchedule(-6.0, 4.01),
        lambda: CosineSchedule(-6.0, 4.0),
        lambda: MonotoneSchedule(lambda t: -6 + 10 * t**2),
        lambda: LearnedSchedule(-6.0, 3.0),
    ],
)
def test_another_schedule_is_refused(other, num_layers):
    model, guide, x = chain(LinearSchedule(-6.0, 4.0), num_layers), Diffusion(other(), num_layers), torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"model's schedule \(LinearSchedule.*guide's.*Diffusion\(model.schedule") as e:
        DiffusionELBO().per_datum(model, guide, x)
    assert "[-6, -3.5, -1, 1.5, 4]" in str(e.value)
    for bound in (DiffusionELBO(), SimpleDiffusionLoss()):
        with pytest.raises(ValueError, match="one process for both"):
            bound(model, guide)(x)
    with pytest.raises(ValueError, match="one process for both"):
        DiffusionELBO().terms(model, guide, x)
    if num_layers != 1:
        with pytest.raises(ValueError, match="one process for both"):
            DiffusionELBO().per_layer(model, guide, x)


@pytest.mark.parametrize(("layers", "others"), [(5, 6), (5, None), (None, 5)])
def test_another_number_of_layers_is_refused(layers, others):
    schedule = LinearSchedule(-6.0, 4.0)
    with pytest.raises(ValueError, match=f"model has num_layers={layers} and the guide num_layers={others}"):
        DiffusionELBO().loss(chain(schedule, layers), Diffusion(schedule, others), torch.randn(4, 2))


def test_equal_schedules_may_be_two_objects():
    schedule = LearnedSchedule(-6.0, 4.0)
    model, x = chain(schedule), torch.randn(4, 2)
    values = []
    for guide in (Diffusion(schedule, 5), Diffusion(copy.deepcopy(schedule), 5)):
        torch.manual_seed(0)
        values.append(DiffusionELBO(sampling="exact").per_datum(model, guide, x))
    torch.testing.assert_close(*values)


def test_a_copy_that_is_trained_apart_is_refused():
    model = chain(LearnedSchedule(-6.0, 4.0))
    guide, x = Diffusion(copy.deepcopy(model.schedule), 5), torch.randn(4, 2)
    objective = DiffusionELBO()(model, guide)
    objective(x).detach()
    with torch.no_grad():
        model.schedule.ends.add_(0.1)
    with pytest.raises(ValueError, match="one process for both"):
        objective(x)


def test_the_same_object_is_not_evaluated():
    class Unreadable(LinearSchedule):
        def forward(self, t):
            raise AssertionError("the schedule was evaluated")

    schedule = Unreadable()
    check_same_process(chain(schedule), Diffusion(schedule, 5))


def test_inpainting_refuses_another_process():
    schedule, x, mask = LinearSchedule(-6.0, 4.0), torch.randn(4, 2), torch.tensor([[True, False]]).expand(4, 2)
    assert inpaint(chain(schedule), Diffusion(schedule, 5), x, mask).shape == (4, 2)
    for guide in (Diffusion(LinearSchedule(-3.0, 2.0), 5), Diffusion(schedule, 6)):
        with pytest.raises(ValueError, match="different diffusions"):
            inpaint(chain(schedule), guide, x, mask)


@pytest.mark.parametrize("bound", [DiffusionELBO(), ph.TraceELBO(), ph.LayerwiseELBO()])
def test_data_between_the_grey_levels_are_refused(bound):
    schedule = LinearSchedule(-8.0, 6.0)
    likelihood = BinnedGaussian(schedule, levels=256)
    model, guide = vdm(DenoisingMLP(3), event_shape=3, num_layers=4, schedule=schedule, likelihood=likelihood)
    grey = torch.randint(0, 256, (4, 3)) / 127.5 - 1
    with pytest.raises(ValueError, match="support"):
        bound.per_datum(model, guide, torch.rand(4, 3))
    assert bound.per_datum(model, guide, grey).isfinite().all()
    mask = torch.tensor([True, True, False]).expand(4, 3)
    torch.testing.assert_close(model(torch.where(mask, grey, torch.nan), mask=mask)[:, :2], grey[:, :2])
