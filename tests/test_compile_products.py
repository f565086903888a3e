"""Matrix products by another library: the same numbers, chosen once, and the choice kept with the run."""

import pyro
import pytest
import torch

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.compile import compile_step, products
from pyro_hvae.models import vae
from pyro_hvae.training import checkpoint, fit

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def _single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def onednn(monkeypatch):
    """Every product is found to be faster there."""
    measured = []

    def fastest(a, b, with_bias, repeats):
        measured.append(tuple(a.shape))
        return "onednn"

    monkeypatch.setattr(products, "_fastest", fastest)
    return measured


def made():
    torch.manual_seed(1)
    objective = TraceELBO()(*vae((6,), 2, hidden=(5,)))
    return objective, torch.optim.Adam(objective.parameters(), lr=0.01)


def test_other_products_give_the_same_steps(onednn):
    x = (torch.rand(8, 6) < 0.5).float()
    losses = []
    for choice in ("blas", "fastest"):
        pyro.clear_param_store()
        step = compile_step(*made(), x, backend="eager", products=choice)
        torch.manual_seed(0)
        losses.append(torch.stack([step(x) for _ in range(5)]))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert set(step.products.values()) == {"onednn"}
    (program,) = step._programs.values()
    targets = [str(node.target) for node in program._compiled.graph.nodes]
    assert sum("onednn_product" in target for target in targets) == 4 + 3 + 4  # forward, of inputs, of weights
    assert not any("mm.default" in target for target in targets)


def test_measured_once_a_shape():
    x = (torch.rand(8, 6) < 0.5).float()
    step = compile_step(*made(), x, backend="eager", products="fastest")
    assert set(step.products.values()) <= {"blas", "onednn"}
    known = dict(step.products)
    assert len(known) == 11
    step(x)
    assert step.products == known


def test_double_precision_stays_where_it_is(onednn):
    torch.set_default_dtype(torch.float64)
    x = (torch.rand(8, 6) < 0.5).double()
    assert compile_step(*made(), x, backend="eager", products="fastest").products == {}


def test_a_resumed_run_keeps_the_choice(tmp_path, onednn, monkeypatch):
    x = (torch.rand(40, 6) < 0.5).float()
    options = {
        "bound": TraceELBO(), "batch_size": 8, "progress": False, "seed": 0,
        "compile": {"backend": "eager", "products": "fastest"},
    }  # fmt: skip
    ends = []
    for run_dir, stops in ((tmp_path / "whole", (10,)), (tmp_path / "parts", (4, 10))):
        for steps in stops:
            if steps == 10 and len(stops) == 2:
                monkeypatch.setattr(products, "_fastest", lambda *_: pytest.fail("measured again"))
            pyro.clear_param_store()
            torch.manual_seed(2)
            fit(*vae((6,), 2, hidden=(5,)), x, run_dir=run_dir, steps=steps, resume=True, **options)
        ends.append(checkpoint.read_weights(checkpoint.latest(run_dir / "checkpoints")))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    state = checkpoint.read_state(checkpoint.latest(tmp_path / "parts" / "checkpoints"))
    assert set(state["products"].values()) == {"onednn"}
