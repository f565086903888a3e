"""A run with everything that has a state, and everything that it has come to."""

import functools

import pyro
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_hvae.bounds import Regularised, TraceELBO, warm_up
from pyro_hvae.data import Batches
from pyro_hvae.models import hvae
from pyro_hvae.training import EarlyStopping, History, fit
from pyro_hvae.training import checkpoint as files

quiet = {"progress": False}


def binarized(x):
    """Binarise anew at each use: the data, too, draws from torch's generator."""
    return torch.bernoulli(x)


def train(run_dir, *, callbacks=(), kind="tensor", **options):
    """A run with everything that has a state: noise, shuffling, schedule, averages, warm-up, validation."""
    torch.manual_seed(11)
    pyro.clear_param_store()
    x = torch.rand(60, 6)
    model, guide = hvae((6,), [3, 2], hidden=(5,))
    torch.manual_seed(12)
    data = x
    if kind == "loader":
        data = DataLoader(TensorDataset(x), batch_size=7, shuffle=True)
    elif kind == "batches":
        data = Batches(x, batch_size=7, seed=3)
    settings = {
        "bound": Regularised(TraceELBO(), kl_weight=warm_up(30)),
        "optimizer": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
        "schedule": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50),
        "transform": binarized,
        "batch_size": 7,
        "steps": 40,
        "ema": 0.9,
        "clip_norm": 5.0,
        "validation": x[:10],
        "validate_every": 13,
        "checkpoint_every": 4,
        "log_every": 3,
        "check_every": 5,
    }
    result = fit(
        model, guide, data, run_dir=run_dir, resume=True,
        callbacks=[EarlyStopping(patience=100), *callbacks], **{**settings, **options}, **quiet,
    )  # fmt: skip
    return result


def end_of(run_dir):
    """Everything a finished run has come to: weights, averages, optimiser, losses."""
    last = files.latest(run_dir / "checkpoints")
    state = files.read_state(last)
    tensors = dict(files.read_weights(last))
    tensors.update({f"ema.{name}": value for name, value in state["ema"]["parameters"].items()})
    for key, own in state["optimizer"]["state"].items():
        tensors.update({f"optimizer.{key}.{name}": value for name, value in own.items()})
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in History.read(run_dir / "history.jsonl")]
    return state["step"], tensors, records


def assert_same_end(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name in expected[1]:
        assert torch.equal(found[1][name], expected[1][name]), name
    assert found[2] == expected[2]
