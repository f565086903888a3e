"""Many fits at once, each in a thread: every one ends where it ends alone."""

import functools
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule
from torch import nn

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.training import fit
from tests.training.runs import quiet

MANY = 22
schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=7, gamma=0.5)
SETTINGS = [
    {},
    {"ema": 0.9, "clip_norm": 1.0, "schedule": schedule},
    {"compile": {"backend": "eager"}},
    {"validation": 0.2, "validate_every": 5, "check_every": 3},
    {"accumulate": 2, "log_every": 4, "epochs": 3},
]


class Model(PyroModule):
    """z ~ N(0, 1), x | z ~ N(slope z, 1): every module here has the same name, as in programs of one kind."""

    def __init__(self):
        super().__init__("model")
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x, data_size=None):
        with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(self.slope * z, 1.0), obs=x)


class Point(PyroModule):
    """A point for each datum, so that nothing is drawn and every step is known."""

    def __init__(self):
        super().__init__("guide")
        self.net = nn.Linear(1, 1)

    def forward(self, x, data_size=None):
        with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Delta(self.net(x[:, None])[:, 0]))


def shared(x, data_size=None):
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def pairs():
    """Programs and data of each fit, without noise, since all draw from one generator; a third has AutoGuides."""
    torch.manual_seed(0)
    for number in range(MANY):
        x = torch.randn(20 + number) + number / 10
        if number % 3:
            yield Model(), Point(), x
        else:
            yield shared, AutoDelta(shared, init_loc_fn=init_to_value(values={"z": torch.zeros(())})), x


def train(number, model, guide, x, folder):
    options = {"steps": 30} | SETTINGS[number % len(SETTINGS)]
    if "epochs" in options:
        del options["steps"]
    if number % 4 == 0:
        options |= {"run_dir": folder / str(number), "checkpoint_every": 10}
    result = fit(model, guide, x, bound=TraceELBO(), batch_size=7, seed=number, lr=0.01, **options, **quiet)
    programs = [program for program in (model, guide) if isinstance(program, nn.Module)]
    ends = [p.detach().clone() for program in programs for p in program.parameters()]
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in result.history]
    return ends, records


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_many_fits_at_once_end_where_each_ends_alone(tmp_path):
    alone = []
    for number, pair in enumerate(pairs()):
        pyro.clear_param_store()
        alone.append(train(number, *pair, tmp_path / "alone"))
    pyro.clear_param_store()
    together, errors = {}, {}
    start = threading.Barrier(MANY)

    def run(number, pair):
        try:
            start.wait()
            together[number] = train(number, *pair, tmp_path / "together")
        except BaseException as error:
            errors[number] = error

    threads = [threading.Thread(target=run, args=job) for job in enumerate(pairs())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    right = 0
    for number, (ends, records) in enumerate(alone):
        found_ends, found_records = together[number]
        right += all(torch.equal(*both) for both in zip(ends, found_ends, strict=True)) and records == found_records
    assert right == MANY
    assert len({float(records[-1]["loss"]) for _, records in alone}) == MANY
