"""Pooling: masked elements take no part, order does not matter, and inputs of crossed plates are joined."""

import torch

from pyro_hvae.amortized.encoder import Encoder, Shown, groups_of
from pyro_hvae.amortized.inputs import align, along
from pyro_hvae.problem import Plate

ROWS, COLUMNS = Plate("rows", -2, 4, 4), Plate("columns", -1, 5, 5)


def encoder(hidden, **widths):
    torch.manual_seed(0)
    plates = {"x": (ROWS, COLUMNS), "v": (COLUMNS,), "m": ()}
    made = Encoder(groups_of({name: plates[name] for name in widths}, (ROWS,)), widths, 3, hidden)
    made.counts.fill_(5.0)
    made.calibrated = True
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def test_masked_elements_take_no_part():
    x, mask = torch.randn(4, 5, 2), torch.arange(5).expand(4, 5) < 3
    for hidden in ((), (7,), (7, 6)):
        made = encoder(hidden, x=2)
        outputs = made({"x": Shown(x, mask)})
        assert outputs.shape == (4, 1, 3)
        torch.testing.assert_close(outputs, made({"x": Shown(x[:, :3], None)}))
        torch.testing.assert_close(outputs, made({"x": Shown(x[:, [2, 0, 1]], None)}))
        assert not torch.allclose(outputs, made({"x": Shown(x, None)}))
        empty = made({"x": Shown(x, torch.zeros(4, 5, dtype=torch.bool))})
        assert empty.isfinite().all()


def test_particles_stay_apart():
    x, v, m = torch.randn(4, 5, 1), torch.randn(6, 1, 5, 1), torch.randn(6, 1, 1, 1)
    made = encoder((7,), x=1, v=1, m=1)
    assert [names for _, names in made.groups] == [("x", "v"), ("m",)]
    outputs = made({"x": Shown(x, None), "v": Shown(v, None), "m": Shown(m, None)})
    assert outputs.shape == (6, 4, 1, 3)
    alone = made({"x": Shown(x, None), "v": Shown(v[2], None), "m": Shown(m[2], None)})
    torch.testing.assert_close(outputs[2], alone)


def test_inputs_of_crossed_plates_are_pooled_together():
    """Which element of one input belongs to which of the other has an effect."""
    x, v = torch.randn(4, 5, 1), torch.randn(1, 5, 1)
    made = encoder((7,), x=1, v=1)
    outputs = made({"x": Shown(x, None), "v": Shown(v, None)})
    assert not torch.allclose(outputs, made({"x": Shown(x, None), "v": Shown(v.flip(1), None)}))
    both = made({"x": Shown(x.flip(1), None), "v": Shown(v.flip(1), None)})
    torch.testing.assert_close(outputs, both)


def test_arguments_are_aligned_with_plates_by_their_sizes():
    stack = (ROWS, COLUMNS)
    assert align(torch.zeros(4, 5), [stack]) == stack
    assert align(torch.zeros(4, 7), [stack]) == (ROWS,)
    assert align(torch.zeros(5), [stack]) == (COLUMNS,)
    assert align(torch.zeros(4), [stack]) == (ROWS,)
    assert align(torch.zeros(3), [stack]) == ()
    assert align(torch.zeros(()), [stack]) == ()
    assert along(torch.zeros(4, 7), (ROWS,)).shape == (4, 1, 7)
    assert along(torch.zeros(5, 7), (COLUMNS,)).shape == (5, 7)
