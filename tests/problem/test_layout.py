"""The one layout of dims: sums, spreads and places go to the dims that plates and particles have."""

from __future__ import annotations

import pytest
import torch

from pyro_hvae.problem.plates import Layout, LayoutError, batch_shape_of
from pyro_hvae.problem.structure import Plate

ROWS, COLUMNS = Plate("rows", -2, 4, 4), Plate("columns", -1, 3, 3)


def test_batch_shapes_have_gaps_of_size_one() -> None:
    assert batch_shape_of([ROWS]) == (4, 1)
    assert batch_shape_of([COLUMNS]) == (3,)
    assert batch_shape_of([ROWS, COLUMNS]) == (4, 3)
    assert batch_shape_of([]) == ()
    assert batch_shape_of([Plate("loop", None, 5, 5)]) == ()


@pytest.mark.parametrize("count", [1, 2])
def test_sums_keep_particles_and_the_plates_asked_for(count: int) -> None:
    value = torch.randn(*([2] if count > 1 else []), 4, 3)
    whole = value if count > 1 else value[None]
    layout = Layout(2, count)
    torch.testing.assert_close(layout.reduce(value, [ROWS]), whole.sum(-1))
    torch.testing.assert_close(layout.reduce(value, [COLUMNS]), whole.sum(-2))
    torch.testing.assert_close(layout.reduce(value, []), whole.sum((-1, -2)))
    torch.testing.assert_close(layout.reduce(value, [ROWS, COLUMNS]), whole)


def test_a_value_without_particles_is_summed_over_its_own_dims() -> None:
    value = torch.randn(3)
    found = Layout(2, 5).reduce(value, [COLUMNS])
    assert found.shape == (1, 3)
    torch.testing.assert_close(found[0], value)


@pytest.mark.parametrize("count", [1, 2])
def test_values_a_datum_are_spread_to_the_dims_of_their_plates(count: int) -> None:
    layout = Layout(2, count)
    site = torch.zeros(*([2] if count > 1 else []), 4, 3, 6)
    for plate in (ROWS, COLUMNS):
        per_datum = torch.randn(count, plate.size)
        found = (site + layout.spread(per_datum, [plate], 1)).reshape(count, 4, 3, 6)
        expected = per_datum[:, :, None] if plate is ROWS else per_datum[:, None, :]
        torch.testing.assert_close(found, expected[..., None].expand(count, 4, 3, 6))


@pytest.mark.parametrize("count", [1, 2])
def test_values_are_put_into_particles_plates_and_event(count: int) -> None:
    layout, lead = Layout(2, count), [2] if count > 1 else []
    whole = torch.randn(count, 4, 3, 6)
    torch.testing.assert_close(layout.put(whole.reshape(*lead, 4, 3, 6), [ROWS, COLUMNS], (6,)), whole)
    rows = torch.randn(count, 4, 6)
    torch.testing.assert_close(layout.put(rows.reshape(*lead, 4, 1, 6), [ROWS], (6,)), rows)
    columns = torch.randn(count, 3, 6)
    torch.testing.assert_close(layout.put(columns.reshape(*lead, 1, 3, 6), [COLUMNS], (6,)), columns)
    shared = torch.randn(6)
    torch.testing.assert_close(layout.put(shared, [ROWS], (6,)), shared.expand(count, 4, 6))


@pytest.mark.parametrize(
    ("shape", "event"), [((2, 4, 3, 6), (6,)), ((2, 2, 4, 1, 6), (6,)), ((2, 4, 1, 6), ()), ((2, 4, 1, 5), (6,))]
)
def test_dims_without_a_plate_are_refused(shape: tuple[int, ...], event: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match=r"a value has shape .* give \(2, 4"):
        Layout(2, 2).put(torch.zeros(shape), [ROWS], event)


def test_placed_values_have_their_particles_left_of_every_plate() -> None:
    value = torch.randn(5, 3, 6)
    placed = Layout(2, 5).place(value, (3, 6), 1)
    assert placed.shape == (5, 1, 3, 6)
    torch.testing.assert_close(placed[:, 0], value)
    assert Layout(2, 1).place(value[:1], (3, 6), 1).shape == (3, 6)
