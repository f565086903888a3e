"""Kind C, for every public function that takes programs: nothing of them, and nothing global, is changed by looking.

The tables are compared with what the package exports, so that a new function has to join one of them.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_hvae as ph
from pyro_hvae.models import vdm
from pyro_hvae.nn import Flattened
from pyro_hvae.problem.isolation import kept_host_generators
from tests.kinds.test_c_modes import same, state

MODULES: tuple[ModuleType, ...] = (
    ph, ph.bounds, ph.evidence, ph.diagnostics, ph.factorized, ph.problem, ph.training
)  # fmt: skip

# Public functions that run no program, or whose purpose is to change one.
OF_NO_PROGRAM = {
    "annealing", "compare", "deep_markov", "discrete_diffusion", "hvae", "ladder_vae", "latent_diffusion",
    "log_spacing", "loo", "of_model", "of_pair", "pit", "predictive_check", "problem_of", "resample",
    "sigmoid_temperatures", "smoothed_weights", "table_vae", "temperatures", "to_inferencedata", "total", "vae",
    "vdm", "warm_up",
}  # fmt: skip
TRAINING = {"compile_step", "differentiable_loss", "fit", "fit_restarts", "load", "loss_and_grads", "prepare"}


class Restless(nn.Module):
    """A network that in each mode draws from other generators and changes a buffer, and fails at one of its calls."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.net = Flattened(
            nn.Sequential(nn.Linear(width, 3), nn.BatchNorm1d(3), nn.Dropout(0.4), nn.Linear(3, out)), 1
        )
        self.register_buffer("average", torch.ones(()))
        norm, drop = self.net.net[1], self.net.net[2]
        norm.running_mean.copy_(torch.tensor([0.3, -0.4, 0.1]))
        norm.running_var.copy_(torch.tensor([2.0, 0.5, 1.5]))
        drop.eval()  # a layer that its user has set apart
        self.calls, self.fails_at = 0, -1

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("stop here")
        self.average.mul_(0.9)
        np.random.rand()  # noqa: NPY002
        random.random()
        return self.net(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Restless(2, 2)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Restless(2, 2)

    def forward(self, x: Tensor) -> None:
        scale = pyro.param("scale", lambda: torch.tensor(0.9), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), scale).to_event(1))


class Counts(nn.Module):
    """A mixture, whose posterior is known exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Restless(1, 1)

    def forward(self, x: Tensor) -> None:
        shift = 0.0 * self.net(torch.zeros(1, 1)).sum().detach()
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            j = pyro.sample("j", dist.Bernoulli(torch.tensor([0.2, 0.6])[k.long()]))
            pyro.sample("x", dist.Normal(j.unsqueeze(-1) + shift, 1.0).expand([*j.shape, 2]).to_event(1), obs=x)


def rows() -> Tensor:
    return torch.linspace(-1.0, 2.0, 10).reshape(5, 2)


def diffusion() -> tuple[nn.Module, nn.Module]:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Restless(2, 2)

        def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
            return self.net(z)

    return vdm(Denoiser(), event_shape=2, num_layers=4)


PAIR, DIFFUSION, COUNTS = (lambda: (Model(), Guide())), diffusion, (lambda: (Counts(), Guide()))
class Noisy(nn.Module):
    def forward(self, x: Tensor) -> dist.Normal:
        return dist.Normal(x, 1.0).to_event(1)


Make = Callable[[], tuple[nn.Module, nn.Module]]
OPTIONS: dict[str, Any] = {"num_chains": 2, "betas": 3}

FUNCTIONS: dict[str, tuple[Make, Callable[..., Any]]] = {
    "active_units": (PAIR, lambda m, g, x: ph.diagnostics.active_units(m, g, x, num_draws=8)),
    "amortize": (PAIR, lambda m, g, x: ph.amortize(m, x)),
    "anneal": (PAIR, lambda m, g, x: ph.evidence.anneal(m, g, x, **OPTIONS)),
    "calibrate": (PAIR, lambda m, g, x: ph.diagnostics.calibrate(m, g, x.repeat(8, 1), num_draws=9)),
    "condition": (DIFFUSION, lambda m, g, x: ph.condition(m, y=x, likelihood=Noisy(), num_particles=8, num_filters=10)),
    "compare_guides": (PAIR, lambda m, g, x: ph.compare_guides(m, x, guides={"own": g}, proposal=g, num_samples=100)),
    "diagnose": (PAIR, lambda m, g, x: ph.diagnose(m, g, x, num_draws=100)),
    "evidence_interval": (PAIR, lambda m, g, x: ph.evidence_interval(m, g, x, budget=300)),
    "evidence_sandwich": (PAIR, lambda m, g, x: ph.evidence_sandwich(m, g, x, **OPTIONS)),
    "explain": (PAIR, lambda m, g, x: ph.explain(ph.LayerwiseELBO(), m, g, x)),
    "forward_kl": (PAIR, lambda m, g, x: ph.forward_kl(m, x, proposal=g, num_samples=100)),
    "held_out": (PAIR, lambda m, g, x: ph.diagnostics.held_out(m, g, x, num_draws=30)),
    "khats": (PAIR, lambda m, g, x: ph.diagnostics.khats(m, g, x, num_draws=30)),
    "layers": (PAIR, lambda m, g, x: ph.diagnostics.layers(m, g, x, num_draws=4)),
    "log_evidence": (PAIR, lambda m, g, x: ph.log_evidence(m, g, x, num_samples=20, chunk_size=5)),
    "mean_variances": (PAIR, lambda m, g, x: ph.diagnostics.mean_variances(m, g, x, num_draws=8)),
    "posterior_error": (PAIR, lambda m, g, x: ph.posterior_error(m, g, x, num_draws=100, budget=300)),
    "posterior_gap": (PAIR, lambda m, g, x: ph.evidence.posterior_gap(m, g, x, num_samples=12, num_steps=2)),
    "predict": (PAIR, lambda m, g, x: ph.predict(m, g, x, num_draws=3)),
    "reconstruction_guidance": (
        DIFFUSION, lambda m, g, x: ph.evidence.reconstruction_guidance(m, y=x, likelihood=Noisy(), num_draws=4)
    ),
    "refine": (PAIR, lambda m, g, x: ph.evidence.refine(m, g, x, num_steps=2)),
    "reverse_kl": (PAIR, lambda m, g, x: ph.reverse_kl(m, x, num_steps=3)),
    "to_datatree": (PAIR, lambda m, g, x: ph.to_datatree(m, g, x, num_draws=4)),
    "total_correlation": (COUNTS, lambda m, g, x: ph.total_correlation(m, x)),
}

# They call a chain as a program would, in evaluation mode.
OF_CHAINS: dict[str, Callable[..., Any]] = {
    "decode": lambda m, g, x: ph.decode(m, {"z": torch.zeros(5, 2)}),
    "encode": lambda m, g, x: ph.encode(g, x),
    "interpolate": lambda m, g, x: ph.interpolate(m, g, x[0], x[1]),
    "impute": lambda m, g, x: ph.impute(m, g, x, torch.tensor([True, False]).expand(5, 2)),
    "reconstruct": lambda m, g, x: ph.reconstruct(m, g, x),
}

OBJECTIVES: dict[str, Callable[[], Any]] = {
    "AnnealedBound": lambda: ph.AnnealedBound(2),
    "CUBO": lambda: ph.CUBO(2, 3),
    "DiffusionELBO": ph.DiffusionELBO,
    "EUBO": lambda: ph.EUBO(3),
    "IWELBO": lambda: ph.IWELBO(6, "dreg", chunk_size=2),
    "LayerwiseELBO": lambda: ph.LayerwiseELBO(2),
    "Regularised": lambda: ph.Regularised(ph.LayerwiseELBO(), kl_weight=0.5),
    "ReweightedWakeSleep": lambda: ph.ReweightedWakeSleep(3),
    "SMCBound": lambda: ph.SMCBound(3, "multinomial"),
    "SimpleDiffusionLoss": ph.bounds.SimpleDiffusionLoss,
    "SleepPhase": ph.SleepPhase,
    "ThermodynamicBound": lambda: ph.ThermodynamicBound(3, 2),
    "TraceELBO": lambda: ph.TraceELBO(3, "stl"),
    "VRBound": lambda: ph.VRBound(0.5, 3),
    "WakePhase": lambda: ph.WakePhase(3),
}
PROBLEMS: dict[str, Callable[..., Any]] = {
    "Problem.structure": lambda problem: problem.structure,
    "Problem.dependencies": lambda problem: problem.dependencies,
    "Problem.points": lambda problem: problem.points,
    "Problem.look": lambda problem: problem.look(),
    "Problem.template": lambda problem: problem.template,
    "Problem.simulate": lambda problem: problem.simulate(),
}


def is_objective(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, ph.bounds.Objective) and not inspect.isabstract(found)


def exported() -> dict[str, Any]:
    return {name: getattr(module, name) for module in MODULES for name in module.__all__}


def methods_of(kind: type) -> list[str]:
    """Public methods that are called with a model and a guide."""
    return [
        name
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and {"model", "guide"} <= set(inspect.signature(method).parameters)
    ]


def by_method(name: str, method: str) -> tuple[Make, Callable[..., Any]]:
    in_steps = "Diffusion" in name or name == "SMCBound"
    make, sites = (DIFFUSION, ("z1", "z2", "z3", "z4")) if in_steps else (PAIR, ("z",))

    def evaluate(model: Any, guide: Any, x: Tensor) -> Any:
        bound = OBJECTIVES[name]()
        bound.prepare(model, guide, x)
        if method == "from_posterior":
            draws = {site: torch.zeros(2, 5, 2) for site in sites}
            return bound.from_posterior(model, guide, draws, x)
        return getattr(bound, method)(model, guide, x)

    return make, evaluate


VERBS: dict[str, tuple[Make, Callable[..., Any]]] = {
    **FUNCTIONS,
    **{
        f"{name}.{method}": by_method(name, method)
        for name in OBJECTIVES
        for method in methods_of(exported()[name])
        if method not in TRAINING
    },
    **{
        name: (PAIR, lambda m, g, x, look=look: look(ph.problem.Problem(m, g)(x))) for name, look in PROBLEMS.items()
    },
}


def test_every_function_and_objective_is_in_a_table() -> None:
    functions = {name for name, found in exported().items() if inspect.isfunction(found)}
    assert functions == set(FUNCTIONS) | set(OF_CHAINS) | {"forecast"} | OF_NO_PROGRAM | (TRAINING & functions)
    assert not set(FUNCTIONS) & (OF_NO_PROGRAM | TRAINING)
    assert {name for name, found in exported().items() if is_objective(found)} == set(OBJECTIVES)


@pytest.fixture(params=VERBS)
def called(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Callable[[], Any]]:
    """Programs in training mode, and a call of the verb with them.

    ``loss`` is Pyro's entry point: it leaves the parameters that it makes in the store, so that it is called once
    before, and generators advance.
    """
    make, verb = VERBS[request.param]
    model, guide = make()
    if request.param.endswith(".loss"):
        verb(model, guide, rows())
    for program in (model, guide):
        for module in program.modules():
            module.training = not isinstance(module, nn.Dropout)

    def call() -> None:
        with kept_host_generators() if request.param.endswith(".loss") else nullcontext():
            verb(model, guide, rows())

    return model, guide, call


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("validated", [True, False], ids=["validated", "unvalidated"])
def test_nothing_is_changed(called: tuple[nn.Module, nn.Module, Callable[[], Any]], validated: bool) -> None:
    model, guide, call = called
    with pyro.validation_enabled(validated), torch.set_grad_enabled(validated):
        before = state(model, guide)
        call()
        same(before, state(model, guide))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", [1, 2, 5])
def test_nothing_is_changed_by_an_error_in_the_middle(
    called: tuple[nn.Module, nn.Module, Callable[[], Any]], at: int
) -> None:
    model, guide, call = called
    before = state(model, guide)
    networks = [m for program in (model, guide) for m in program.modules() if isinstance(m, Restless)]
    for network in networks:
        network.calls, network.fails_at = 0, at
    try:
        call()
    except RuntimeError as error:
        assert "stop here" in str(error)  # noqa: PT017
    assert at > 1 or any(network.calls == 1 for network in networks)
    same(before, state(model, guide))


@pytest.mark.parametrize("ladder", [False, True], ids=["bottom-up", "ladder"])
@pytest.mark.parametrize("verb", OF_CHAINS)
def test_chains_are_run_in_evaluation_mode(verb: str, ladder: bool) -> None:
    def norm() -> ph.Gaussian:
        return ph.Gaussian(Flattened(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), 1))

    model = ph.TopDown(z=ph.StandardNormal(2), x=norm())
    guide = ph.Ladder(model, z=norm()) if ladder else ph.BottomUp(z=norm())

    def kept() -> list[Any]:
        tensors = [value.clone() for program in (model, guide) for value in program.state_dict().values()]
        return [*(m.training for program in (model, guide) for m in program.modules()), *map(Tensor.tolist, tensors)]

    before = kept()
    pyro.set_rng_seed(1)
    found = OF_CHAINS[verb](model, guide, rows())
    assert kept() == before
    model.eval()
    guide.eval()
    pyro.set_rng_seed(1)
    again = OF_CHAINS[verb](model, guide, rows())
    values = [
        value["z"] if verb == "encode" else value.mean if verb == "decode" else value for value in (found, again)
    ]
    torch.testing.assert_close(*values, rtol=0.0, atol=0.0)
    if verb != "decode":
        with pytest.raises((RuntimeError, ValueError), match=r"shape|size|multiplied"):
            OF_CHAINS[verb](model.train(), guide.train(), torch.zeros(5, 3))
        assert all(m.training for program in (model, guide) for m in program.modules())


def test_a_forecast_is_run_in_evaluation_mode() -> None:
    model, guide = ph.deep_markov(3, 2, hidden=4, gate=4, features=4)
    x = torch.bernoulli(torch.full((2, 5, 3), 0.5))
    for program in (model, guide):
        program.train()
        program.rnn_dropout = nn.Dropout(0.5).eval()  # a layer that its user has set apart
    before = [m.training for program in (model, guide) for m in program.modules()]
    assert ph.forecast(model, guide, x, steps=2, num_draws=3).isfinite().all()
    assert [m.training for program in (model, guide) for m in program.modules()] == before
