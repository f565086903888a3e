"""fit() where it can't go on: it says what, where and what instead."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.training import Averages, EarlyStopping, NonFiniteError, fit
from pyro_hvae.training.feed import feed
from tests.training.gaussian import Guide, Model, quiet


def test_early_stopping_on_what_is_never_recorded_is_an_error(data):
    with pytest.raises(ValueError, match=r"watches 'validation_loss', but fit\(\) got no validation data"):
        fit(Model(), Guide(), data, bound=TraceELBO(), epochs=1, callbacks=[EarlyStopping(patience=3)], **quiet)


class Breaks(PyroModule):
    """A guide that breaks at the datum 99."""

    def __init__(self, kind):
        super().__init__("breaks")
        self.net = nn.Linear(1, 1)
        self.kind = kind

    def forward(self, x, data_size=None):
        with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
            loc = self.net(x[:, None])[:, 0]
            good = (x != 99.0).to(x)
            if self.kind == "value":
                loc = loc / good
            else:  # the value is fine, its gradient is not
                loc = torch.sqrt(good * (1.0 + loc**2))
            pyro.sample("z", dist.Normal(loc, 1.0))


@pytest.mark.parametrize(
    ("kind", "what"), [("value", "the guide's draw of 'z'"), ("gradient", "the gradient of guide.net.weight")]
)
def test_nan_is_traced_to_its_step_and_site(kind, what):
    x = torch.zeros(100)
    x[86] = 99.0  # met in the ninth batch
    model, guide = Model(), Breaks(kind)
    path = {}

    class Watch:
        def on_step(self, run, loss):
            path[run.step] = run.guide.net.weight.detach().clone()

    with pytest.raises(NonFiniteError) as caught:
        fit(
            model, guide, x, bound=TraceELBO(), epochs=2, batch_size=10, shuffle=False, check_every=6,
            callbacks=[Watch()], **quiet,
        )  # fmt: skip
    assert caught.value.step == 9
    assert what in caught.value.sites
    assert "step 9" in str(caught.value)
    assert torch.equal(guide.net.weight, path[6])


def test_nan_in_the_data_is_refused_before_the_first_step(data):
    data[17] = math.nan
    data[40] = math.inf
    model = Model()
    message = r"2 of 200 values of the data are NaN or infinite; the first is nan at index \(17,\)"
    with pytest.raises(ValueError, match=message):
        fit(model, Guide(), data, bound=TraceELBO(), epochs=1, batch_size=10, **quiet)
    assert model.mean.item() == 0.0


def test_nan_behind_a_mask_is_no_nan_in_the_data(data):

    mask = torch.ones(200, dtype=torch.bool)
    mask[17], data[17] = False, math.nan
    assert feed({"x": data, "mask": mask}, batch_size=10).data_size == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either epochs or steps"),
        ({"epochs": 1, "steps": 1}, "either epochs or steps"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 1, "batch_size": 0}, "batch_size must be at least 1"),
        ({"steps": 1, "clip_norm": -1.0}, "clip_norm must be a number above 0, got -1.0"),
        ({"steps": 1, "precision": "fp4"}, "precision must be None or 'bf16'"),
        ({"steps": 1, "ema": 1.0}, r"must be a number in \[0, 1\), got 1.0"),
        ({"steps": 1, "resume": True}, "resume=True continues the run of run_dir"),
        ({"steps": 1, "tensorboard": True}, "tensorboard=True writes under run_dir"),
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"steps": math.nan}, "steps must be an integer, got nan"),
        ({"epochs": True}, "epochs must be an integer, got True"),
        ({"steps": 1, "validate_every": 0}, "validate_every must be at least 1, got 0"),
        ({"steps": 1, "checkpoint_every": -1}, "checkpoint_every must be at least 1"),
        ({"steps": 1, "data_size": math.nan}, "data_size must be an integer, got nan"),
        ({"steps": 1, "data_size": 20}, "data_size=20 is less than the 200 data"),
        ({"steps": 1, "seed": -1}, "seed must be an integer of at least 0"),
        ({"steps": 1, "shuffle": "no"}, "shuffle must be True or False, got 'no'"),
        ({"steps": 1, "compile": None}, "compile must be True, False or a mapping of options, got None"),
        ({"steps": 1, "compile": 0}, "compile must be True, False or a mapping of options, got 0"),
    ],
)
def test_refused_arguments(options, message, data):
    with pytest.raises(ValueError, match=message):
        fit(Model(), Guide(), data, bound=TraceELBO(), **options, **quiet)


@pytest.mark.parametrize(("bound", "message"), [(TraceELBO, "the class TraceELBO: call it"), ("ELBO", "'ELBO'")])
def test_what_is_no_bound_is_refused(bound, message, data):
    with pytest.raises(TypeError, match=message):
        fit(Model(), Guide(), data, bound=bound, steps=1, **quiet)


def test_pyro_optimisers_are_refused_with_the_reason(data):
    with pytest.raises(TypeError, match=r"belong to pyro\.infer\.SVI"):
        fit(Model(), Guide(), data, bound=TraceELBO(), steps=1, optimizer=pyro.optim.Adam({"lr": 1e-3}), **quiet)


@pytest.mark.parametrize(
    ("wrap", "options", "message"),
    [
        (lambda x: x, {"transform": lambda x: None}, "transform= returned None"),
        (lambda x: x, {"optimizer": torch.optim.LBFGS}, "call LBFGS.step"),
        (lambda x: [3, 4], {"data_size": 2}, r"this one holds \['int'\]"),
        (lambda x: x.sum(), {}, "one of the tensors has no dimension"),
    ],
    ids=["no batch", "lbfgs", "integers", "no dimension"],
)
def test_what_the_programs_can_not_be_called_with_is_refused(wrap, options, message, data):
    with pytest.raises((TypeError, ValueError), match=message):
        fit(Model(), Guide(), wrap(data), bound=TraceELBO(), steps=1, **options, **quiet)


def test_a_frame_is_refused_with_what_to_pass(data):
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"data is a DataFrame, .* torch.as_tensor\(data.to_numpy\(\)\)"):
        fit(Model(), Guide(), pandas.DataFrame({"x": data.numpy()}), bound=TraceELBO(), steps=1, **quiet)


def test_an_optimizer_that_misses_parameters_is_refused(data):
    model, guide = Model(), Guide()
    with pytest.raises(ValueError, match=r"does not hold 1 parameter\(s\) of the pair, among them \['model.mean'\]"):
        fit(model, guide, data, bound=TraceELBO(), steps=1, optimizer=torch.optim.Adam(guide.parameters()), **quiet)


def test_a_used_up_iterator_is_an_error(data):
    result = fit(Model(), Guide(), iter([data[:150], data[150:]]), bound=TraceELBO(), epochs=1, data_size=200, **quiet)
    assert result.steps == 2
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="one-shot iterator"):
        fit(Model(), Guide(), iter([data]), bound=TraceELBO(), epochs=2, **quiet)


def test_averages_refuse_a_decay_of_one():
    with pytest.raises(ValueError, match=r"got 1\.0"):
        Averages(nn.Linear(1, 1), 1.0)
