"""Elementary functions of compiled kernels against double precision, at all magnitudes."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_hvae.training.compile import elementary
from pyro_hvae.training.compile.elementary import replace_elementary
from pyro_hvae.training.compile.program import _owned

EPSILON = torch.finfo(torch.float32).eps
MAGNITUDES = torch.logspace(-30, 1.95, 20_001, dtype=torch.float64).float()  # to 89
POINTS = torch.cat([-MAGNITUDES.flip(0), torch.zeros(1, dtype=torch.float32), MAGNITUDES])


def cross_entropy(x, y):
    return F.binary_cross_entropy_with_logits(x, y.expand_as(x), reduction="none")


@pytest.mark.parametrize(
    ("fast", "exact"),
    [(elementary.tanh, torch.tanh), (elementary.sigmoid, torch.sigmoid), (elementary.softplus, F.softplus)],
    ids=["tanh", "sigmoid", "softplus"],
)
def test_value_at_all_magnitudes(fast, exact):
    value, truth = fast(POINTS).double(), exact(POINTS.double())
    if exact is F.softplus:  # torch's own is x itself above 20
        truth = torch.logaddexp(POINTS.double(), torch.zeros((), dtype=torch.float64))
    bound = 2.0 * EPSILON * truth.abs() + torch.finfo(torch.float32).tiny
    assert bool((value - truth).abs().le(bound).all()), float(((value - truth) / truth).abs().max())


@pytest.mark.parametrize("y", [0.0, 0.3, 1.0])
def test_cross_entropy_at_all_magnitudes(y):
    value = elementary.cross_entropy(POINTS, torch.tensor(y, dtype=torch.float32), reduction=0).double()
    x, zero = POINTS.double(), torch.zeros((), dtype=torch.float64)
    truth = y * torch.logaddexp(-x, zero) + (1 - y) * torch.logaddexp(x, zero)
    bound = 3.0 * EPSILON * truth + torch.finfo(torch.float32).tiny
    if y not in (0.0, 1.0):
        bound = bound + EPSILON * x.abs()  # of the number y itself
    assert bool((value - truth).abs().le(bound).all()), float(((value - truth) / truth).abs().max())


def test_infinities_and_nan():
    x = torch.tensor([-torch.inf, torch.inf, torch.nan], dtype=torch.float32)
    torch.testing.assert_close(elementary.tanh(x), torch.tanh(x), equal_nan=True)
    torch.testing.assert_close(elementary.sigmoid(x), torch.sigmoid(x), equal_nan=True)
    torch.testing.assert_close(elementary.softplus(x), F.softplus(x), equal_nan=True)


FUNCTIONS = [
    torch.tanh,
    torch.sigmoid,
    F.softplus,
    lambda x: F.softplus(x, beta=2.0),
    lambda x: F.softplus(x, threshold=3.0),
    lambda x: cross_entropy(x, torch.full_like(x, 0.3)),
    lambda x: F.binary_cross_entropy_with_logits(x, torch.ones_like(x)),
    lambda x: F.binary_cross_entropy_with_logits(x, 0 * x, torch.full_like(x, 2.0), reduction="none"),
]
REPLACED = [True, True, True, False, False, True, False, False]


@pytest.mark.parametrize(("function", "replaced"), list(zip(FUNCTIONS, REPLACED, strict=True)))
def test_replaced_where_it_is_the_same(function, replaced):
    x = torch.linspace(-20.0, 20.0, 41, dtype=torch.float32)
    for example, applies in ((x, replaced), (x.double(), False), (x.to("meta"), False)):
        module = make_fx(function)(example)
        before = module.code
        replace_elementary(module.graph)
        module.graph.lint()
        module.recompile()
        assert (module.code != before) == applies
        if example.device.type == "cpu":
            torch.testing.assert_close(module(example), function(example), rtol=1e-6, atol=1e-6)


def test_replaced_before_inductor():
    x = torch.linspace(-3.0, 3.0, 7, dtype=torch.float32)
    module = make_fx(lambda x: torch.tanh(x) + torch.sigmoid(x))(x)
    owned = _owned(module, keep_draws=True)
    assert "tanh" in module.code
    assert "tanh" not in owned.code
    assert "sigmoid" not in owned.code
    torch.testing.assert_close(owned(x), module(x))
