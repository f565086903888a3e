"""Every bound x program on torch's ``meta`` device: loss, gradient, optimiser step and draws, without a wait.

The first evaluation of a pair checks it and reads values; :func:`pyro_hvae.devices.has_values` lets these checks pass
on ``meta``.  The steps after it may read no value, copy nothing between the CPU and the device, and ask nothing.
"""

from contextlib import nullcontext

import pyro
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae import devices, diffusion
from pyro_hvae.bounds import (
    DiffusionELBO,
    Regularised,
    ReweightedWakeSleep,
    SMCBound,
    TraceELBO,
    WakePhase,
    warm_up,
)
from pyro_hvae.models import discrete_diffusion, hvae, vdm
from pyro_hvae.nn import DenoisingMLP, TokenMLP
from pyro_hvae.problem import Problem
from pyro_hvae.training.averages import Averages
from pyro_hvae.training.objective import PairObjective
from pyro_hvae.training.step import EagerStep
from tests.bounds.test_programs import BOUNDS, MATRIX, refusal
from tests.meta import META, Wait, build_on_meta, no_waits, on_meta
from tests.programs import PAIRS, build

REASONS = {
    "refused": "this bound or gradient refuses the pair on every device, with a message that names the site or plate",
    "loose": "simulate refuses the pair on every device: its observed tensors are parts of an argument",
    "scaled": "simulate refuses the pair on every device: a likelihood with a poutine.scale has no draws",
    "khat": "the k-hat of a tail is computed on the host, from sorted values",
}
FACTS = {name: build(name) for name in PAIRS}
CANNOT = {
    **{entry: "refused" for entry in MATRIX if refusal(FACTS[entry[0]], BOUNDS[entry[1]], entry[2])},
    ("ragged", "simulate"): "loose",
    ("user_scale", "simulate"): "scaled",
    **{(name, "log_evidence"): "khat" for name in PAIRS},
}  # fmt: skip
"""What does not run on ``meta``, with the key of its reason."""


@pytest.fixture(autouse=True)
def _unvalidated():
    """Pyro's own validation reads values; it is off in every step of training."""
    with pyro.validation_enabled(False):
        yield


def take_steps(objective, pair, kind=torch.optim.Adam):
    """Make a first step, which checks the pair, and two that wait for nothing; return the objective of ``fit``."""
    with on_meta():
        module = PairObjective(objective, pair.model, pair.guide, pair.args, pair.kwargs, None)
    parameters = list(module.parameters())
    assert parameters
    assert all(parameter.is_meta for parameter in parameters)
    step, averages = EagerStep(module, kind(parameters, lr=1e-3), clip_norm=1.0), Averages(module, 0.9)
    total = torch.zeros((), device=META)
    for number in range(3):
        with no_waits() if number else nullcontext(), on_meta():
            loss = step([(pair.args, pair.kwargs)])
            total.add_(loss, alpha=2)
            module.advance()
            averages.update()
    assert loss.is_meta
    assert loss.shape == ()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert gradients
    assert all(gradient.is_meta for gradient in gradients)
    return module


# Their guide's parameters are the model's, which these bounds hold.
TRAIN_NOTHING = {("entrywise_noise", "CUBO"), ("entrywise_noise", "EUBO")}


def train(name, bound, gradient):
    pair, entry = build_on_meta(name), BOUNDS[bound]
    objective = entry.make(gradient)
    if (name, bound, gradient) in CANNOT:
        with on_meta(), pytest.raises(ValueError, match=refusal(pair, entry, gradient)):
            objective.loss_and_grads(pair.model, pair.guide, *pair.args, **pair.kwargs)
        return
    if (name, bound) in TRAIN_NOTHING:
        with pytest.raises(ValueError, match="depends on no parameter that is trained"):
            take_steps(objective, pair)
        return
    take_steps(objective, pair)
    pyro.clear_param_store()
    with on_meta():
        assert objective.loss(pair.model, pair.guide, *pair.args, **pair.kwargs).is_meta
        with no_waits():
            assert objective.loss_and_grads(pair.model, pair.guide, *pair.args, **pair.kwargs).is_meta


THINNED = MATRIX[::13]


def test_the_thinned_suite_has_every_pair_and_every_gradient_of_every_bound():
    assert {name for name, _, _ in THINNED} == set(PAIRS)
    assert {entry[1:] for entry in THINNED} == {entry[1:] for entry in MATRIX}


@pytest.mark.parametrize(("name", "bound", "gradient"), THINNED)
def test_steps(name, bound, gradient):
    train(name, bound, gradient)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bound", "gradient"), [entry for entry in MATRIX if entry not in THINNED])
def test_all_steps(name, bound, gradient):
    train(name, bound, gradient)


def test_how_many_run():
    """615 of 748 bounds x pairs x gradients, and 168 of 170 ways to draw; the others are refused on every device."""
    assert set(CANNOT.values()) == set(REASONS)
    assert [list(CANNOT.values()).count(reason) for reason in REASONS] == [131, 1, 1, len(PAIRS)]
    assert (len(MATRIX), len(DRAWS) * len(PAIRS)) == (748, 170)


def run(problem):
    drawn = problem.run(3)
    return [*drawn.values.values(), drawn.log_weights]


def prior(problem):
    return Problem(problem.model)(*problem.args, **problem.kwargs).prior().run(3).values.values()


def simulate(problem):
    return problem.simulate().values.values()


def predict(problem):
    return ph.predict(problem.model, problem.guide, *problem.args, num_draws=3, **problem.kwargs).values()


def program(problem):
    """Call the model itself; a chain gives as many data as are asked for."""
    chain = isinstance(problem.model, ph.TopDown)
    drawn = problem.model(size=5) if chain else pyro.poutine.trace(problem.model).get_trace(*problem.args)
    return [drawn] if chain else [site["value"] for site in drawn.nodes.values() if site["type"] == "sample"]


DRAWS = {"run": run, "prior": prior, "simulate": simulate, "predict": predict, "program": program}


@pytest.mark.parametrize("name", PAIRS)
def test_draws(name):
    pair = build_on_meta(name)
    for way, draw in DRAWS.items():
        pyro.clear_param_store()
        problem = Problem(pair.model, pair.guide)(*pair.args, **pair.kwargs)
        with on_meta():
            if (name, way) in CANNOT:
                with pytest.raises(ValueError, match=r"poutine\.scale|no arguments|no argument is"):
                    draw(problem)
                continue
            drawn = list(draw(problem))
        assert drawn, way
        assert all(value.is_meta for value in drawn if isinstance(value, torch.Tensor)), way


@pytest.mark.parametrize("name", ["vae", "global_latent", "mixed"])
def test_evidence_needs_values(name):
    pair = build_on_meta(name)
    with on_meta(), pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        ph.log_evidence(pair.model, pair.guide, *pair.args, num_samples=20, **pair.kwargs)


SAMPLERS = {
    "ddim": lambda model: diffusion.ddim(model, 2, num_steps=3, eta=0.5),
    "dpm_solver": lambda model: diffusion.dpm_solver(model, 2, num_steps=3),
    "probability_flow": lambda model: diffusion.probability_flow(model, 2, num_steps=3),
    "flow_log_likelihood": lambda model: diffusion.flow_log_likelihood(
        model, torch.zeros(2, 3, device=META), num_steps=2
    ).value,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_layers", [4, None])
def test_samplers_of_a_gaussian_diffusion(sampler, num_layers):
    model, _ = vdm(DenoisingMLP(3, hidden=4), event_shape=3, num_layers=num_layers)
    model.to(META)
    with no_waits():
        drawn = SAMPLERS[sampler](model)
    assert drawn.is_meta


@pytest.mark.parametrize(("corruption", "draw"), [
    ("absorbing", lambda model: diffusion.ancestral(model, 2, num_steps=3)),
    ("uniform", lambda model: diffusion.ancestral(model, 2, num_steps=3)),
    ("absorbing", lambda model: diffusion.unmask(model, 2)),
    ("absorbing", lambda model: diffusion.unmask(model, 2, order="confident")),
    ("any_order", lambda model: model(size=2)),
])  # fmt: skip
def test_samplers_of_a_discrete_diffusion(corruption, draw):
    layers = {"num_layers": 4} if corruption == "any_order" else {"num_layers": None}
    model, _ = discrete_diffusion(TokenMLP(4, 3), event_shape=4, num_categories=3, corruption=corruption, **layers)
    model.to(META)
    with no_waits():
        assert draw(model).is_meta


class Data:
    """A pair of modules with data on ``meta``, as :func:`take_steps` takes it."""

    def __init__(self, programs, x):
        self.model, self.guide = (program.to(META) for program in programs)
        self.args, self.kwargs = (x.to(META),), {}


@pytest.mark.parametrize("sampling", ["antithetic", "uniform", "importance", "exact"])
@pytest.mark.parametrize("num_layers", [5, None])
def test_steps_of_the_bound_of_a_diffusion(sampling, num_layers):
    if sampling == "exact" and num_layers is None:
        pytest.skip("every layer is visited, and continuous time has infinitely many")
    pair = Data(vdm(DenoisingMLP(3, hidden=4), event_shape=3, num_layers=num_layers), torch.zeros(6, 3))
    take_steps(DiffusionELBO(sampling=sampling), pair)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_steps_of_annealed_objectives(kind):
    pair = Data(hvae((6,), [3, 2], hidden=(5,)), torch.zeros(4, 6))
    take_steps(Regularised(TraceELBO(2), kl_weight=warm_up(30)), pair, kind)


OTHERS = {
    "WakePhase": lambda: WakePhase(3),
    "ReweightedWakeSleep": lambda: ReweightedWakeSleep(3),
    "AnnealedBound": lambda: ph.AnnealedBound(3),
    "SMCBound": lambda: SMCBound(3),
}
BY_SITE = ("chain_1", "chain_2", "hvae", "ladder")
"""Pairs that SMCBound runs site by site; it refuses functions."""


@pytest.mark.parametrize("objective", OTHERS)
@pytest.mark.parametrize("name", [*BY_SITE, "by_hand", "minibatch"])
def test_steps_of_other_objectives(objective, name):
    pair = build_on_meta(name)
    if objective == "SMCBound" and name not in BY_SITE:
        with on_meta(), pytest.raises(TypeError, match="no method stepwise"):
            OTHERS[objective]().loss(pair.model, pair.guide, *pair.args)
        return
    take_steps(OTHERS[objective](), pair)


class Reads(nn.Module):
    def forward(self, x):
        return x * x.sum().item()


class Copies(nn.Module):
    def forward(self, x):
        return x + self.offset.to(x.device)

    offset = torch.ones(6)


class Mixes(Copies):
    def forward(self, x):
        return x + self.offset


class Asks(nn.Module):
    def forward(self, x):
        return x if devices.has_values(x) else 2 * x


@pytest.mark.parametrize(("layer", "error"), [(Reads, RuntimeError), (Mixes, RuntimeError), (Asks, Wait)])
def test_what_waits_is_noticed(layer, error):
    """A pair that does what the suite is to find."""
    model, guide = hvae((6,), [3, 2], hidden=(5,))
    guide.z1.net = nn.Sequential(layer(), guide.z1.net)
    with pytest.raises(error, match=r"meta|asks"):
        take_steps(TraceELBO(), Data((model, guide), torch.zeros(4, 6)))


def test_copies_are_noticed():
    layer = Copies()
    with no_waits():
        for offset in (torch.ones(6), torch.ones(())):
            layer.offset = offset
            with pytest.raises(Wait, match="from the CPU"):
                _library_line(layer, torch.zeros(6, device=META))


def _library_line(layer, x):
    """Call as a line of the package, since copies that the tests' own programs make are let through."""
    names = {}
    exec(compile("def call(layer, x):\n    return x + layer.offset.to(x.device)\n", devices.__file__, "exec"), names)
    return names["call"](layer, x)
