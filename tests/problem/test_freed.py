"""A run's memory is free as soon as the run is dropped, without a search for cycles."""

import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

import pyro_hvae as ph
from pyro_hvae.problem import Problem


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


@config_enumerate
def mixture(x):
    weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
    with pyro.plate("data", len(x)):
        state = pyro.sample("state", dist.Bernoulli(weight))
        pyro.sample("x", dist.Normal(2.0 * state, 1.0), obs=x)


def mixture_guide(x):
    pyro.sample("weight", dist.Beta(2.0, 2.0))


@config_enumerate
def states_guide(x):
    pyro.sample("weight", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("state", dist.Bernoulli(torch.full((), 0.3)))


@pytest.fixture
def no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


USES = {
    "values": lambda run: run.values,
    "terms": lambda run: (dict(run.log_p), dict(run.log_q)),
    "weights": lambda run: run.log_weights,
    "other plates": lambda run: run.over(()).log_weights,
}


@pytest.mark.parametrize("use", list(USES))
@pytest.mark.parametrize(
    ("model", "guide"),
    [(local, local_guide), (mixture, mixture_guide), (mixture, states_guide)],
    ids=["local", "summed out by the model", "summed out by the guide"],
)
def test_a_run(no_collection, model, guide, use):
    problem = Problem(model, guide)(torch.randn(7))
    run = problem.run(5)
    USES[use](run)
    held = [weakref.ref(run), weakref.ref(run.model_trace), weakref.ref(run.guide_trace)]
    del run
    assert [reference() for reference in held] == [None] * 3


def tensors():
    return [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]


@pytest.mark.parametrize("bound", [ph.TraceELBO(3), ph.IWELBO(3), ph.LayerwiseELBO(3)])
def test_a_step(no_collection, bound):
    """The tensors of one step are gone after it."""
    objective = bound(*ph.vae(6, 2, hidden=(4,)))
    x = torch.bernoulli(torch.full((11, 6), 0.3))

    def step():
        objective(x).backward()
        for parameter in objective.parameters():
            parameter.grad = None

    step()
    gc.collect()
    before = {id(tensor) for tensor in tensors()}
    step()
    assert [tensor.shape for tensor in tensors() if id(tensor) not in before] == []
