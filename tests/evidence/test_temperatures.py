"""The largest step that keeps the conditional ESS, in closed form, without a wait for the device."""

import math

import pytest
import torch

from pyro_hvae.evidence.temperatures import _largest_step


@pytest.mark.parametrize("target", [0.6, 0.9, 0.999])
def test_two_chains_apart(target):
    """With slopes a and -a the conditional ESS is K (1 + 1 / cosh(2 h a)) / 2: solve for h."""
    apart = torch.tensor([0.3, 2.0, 1.0])  # the datum that is furthest apart decides
    step = _largest_step(torch.stack([apart, -apart]) + 5.0, 100.0, target)
    torch.testing.assert_close(step, torch.tensor(math.acosh(1 / (2 * target - 1)) / 4.0), atol=1e-8, rtol=0.0)


def test_the_rest_is_taken_where_it_keeps_the_target():
    slope = torch.tensor([[0.1], [-0.1]])
    assert _largest_step(slope, 0.25, 0.9) == 0.25
    assert _largest_step(torch.zeros(4), 0.5, 0.9) == 0.5


def test_a_step_has_a_least_size():
    assert _largest_step(torch.tensor([1e12, -1e12]), 0.5, 0.9) == 1e-6


def test_no_value_is_read():
    """A meta tensor has none to read."""
    assert _largest_step(torch.zeros(4, 3, device="meta"), 0.5, 0.9).device.type == "meta"
