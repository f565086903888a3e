"""Kind C: looking at programs changes nothing of them, and evaluation is in evaluation mode."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_hvae as ph
from pyro_hvae.nn import Flattened
from tests.kinds.checks import close

MOMENTUM = 0.1


def rows() -> Tensor:
    return torch.linspace(-1.0, 2.0, 10).reshape(5, 2)


class Decoder(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = Flattened(nn.Sequential(nn.Linear(2, 2), *layers), 1)
        self.calls = 0
        self.fails_at = -1

    def forward(self, x: Tensor) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("stop here")
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Encoder(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = Flattened(nn.Sequential(*layers, nn.Linear(2, 2)), 1)

    def forward(self, x: Tensor) -> None:
        scale = pyro.param("scale", lambda: torch.tensor(0.9), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), scale).to_event(1))


def pair() -> tuple[Decoder, Encoder]:
    """Programs with batch norm and dropout, most of it in training mode, with statistics of some batches."""
    model, guide = Decoder(nn.BatchNorm1d(2), nn.Dropout(0.4)), Encoder(nn.BatchNorm1d(2), nn.Dropout(0.4))
    for norm in (model.net.net[1], guide.net.net[0]):
        norm.running_mean.copy_(torch.tensor([0.3, -0.4]))
        norm.running_var.copy_(torch.tensor([2.0, 0.5]))
    model.train()
    guide.train()
    model.net.net[2].eval()  # a layer that its user has set apart
    return model, guide


def state(model: nn.Module, guide: nn.Module) -> dict[str, Any]:
    """Return all that looking may not change, apart from torch's generator, from which draws come."""
    tensors = nn.ModuleDict({"model": model, "guide": guide}).state_dict()
    store = pyro.get_param_store()
    return {
        "tensors": {name: value.clone() for name, value in tensors.items()},
        "grads": [p.grad for program in (model, guide) for p in program.parameters()],
        "requires_grad": [p.requires_grad for program in (model, guide) for p in program.parameters()],
        "training": [m.training for program in (model, guide) for m in program.modules()],
        "store": {name: store[name].detach().clone() for name in store},
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "random": random.getstate(),
        "settings": pyro.settings.get(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.items():
        if name in ("tensors", "store"):
            assert value.keys() == after[name].keys(), name
            for key, tensor in value.items():
                close(after[name][key], tensor, 0.0)
        else:
            assert after[name] == value, name


VERBS: dict[str, Callable[..., Any]] = {
    "trace": lambda *a: ph.TraceELBO(3).per_datum(*a),
    "layerwise": lambda *a: ph.LayerwiseELBO(2).per_datum(*a),
    "iwelbo": lambda *a: ph.IWELBO(6, chunk_size=2).per_datum(*a),
    "dreg": lambda *a: ph.IWELBO(2, "dreg").per_datum(*a),
    "eubo": lambda *a: ph.EUBO(3).per_datum(*a),
    "terms": lambda *a: ph.LayerwiseELBO(2).terms(*a),
    "explain": lambda *a: ph.explain(ph.LayerwiseELBO(), *a),
    "importance": lambda *a: ph.log_evidence(*a, num_samples=20, chunk_size=5),
    "prior": lambda *a: ph.log_evidence(*a, num_samples=20, method="prior"),
    "bayes": lambda *a: ph.log_evidence(*a, num_samples=20, method="bayes"),
    "sandwich": lambda *a: ph.evidence_sandwich(*a, num_chains=2, betas=3),
    "anneal": lambda *a: ph.evidence.anneal(*a, num_chains=2, betas=3),
    "gap": lambda *a: ph.evidence.posterior_gap(*a, num_steps=2),
    "to_datatree": lambda *a: ph.to_datatree(*a, num_draws=4),
    "khats": lambda *a: ph.diagnostics.khats(*a, num_draws=30),
    "diagnose": lambda *a: ph.diagnose(*a, num_draws=100),
    "layers": lambda *a: ph.diagnostics.layers(*a),
    "calibrate": lambda model, guide, x: ph.diagnostics.calibrate(model, guide, x.repeat(8, 1), num_draws=9),
    "forward_kl": lambda model, guide, x: ph.forward_kl(model, x, proposal=guide, num_samples=200),
}


@pytest.fixture
def started() -> tuple[Decoder, Encoder]:
    """Programs whose parameter is in the store already, as after a step of training."""
    pyro.param("scale", torch.tensor(0.8), constraint=dist.constraints.positive)
    return pair()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", VERBS)
def test_looking_changes_nothing(verb: str, started: tuple[Decoder, Encoder]) -> None:
    before = state(*started)
    for _ in range(2):
        VERBS[verb](*started, rows())
        same(before, state(*started))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("verb", ["iwelbo", "dreg", "terms", "explain", "importance", "sandwich", "khats"])
def test_an_error_in_the_middle_changes_nothing(verb: str, at: int, started: tuple[Decoder, Encoder]) -> None:
    model, _ = started
    before = state(*started)
    model.fails_at = at
    try:
        VERBS[verb](*started, rows())
    except RuntimeError as error:
        assert "stop here" in str(error)  # noqa: PT017
    same(before, state(*started))


def exact(layers: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """z ~ N(0, 1), x ~ N(layer(z), 1); the guide is exact if the layers are the identity, as in evaluation mode."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Flattened(layers(), 1)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.layer(z), 1.0).to_event(1), obs=x)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Flattened(layers(), 1)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(self.layer(x) / 2, 0.5**0.5).to_event(1))

    return Model(), Guide()


def per_row(x: Tensor) -> Tensor:
    return dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1)


def identity_norm() -> nn.Module:
    """Batch norm whose running statistics make it the identity."""
    norm = nn.BatchNorm1d(2)
    norm.running_var.fill_(1 - norm.eps)
    return norm


EVALUATIONS: dict[str, Callable[..., Any]] = {
    "trace": lambda *a: ph.TraceELBO().per_datum(*a),
    "iwelbo": lambda *a: ph.IWELBO(6, chunk_size=2).per_datum(*a),
    "renyi": lambda *a: ph.VRBound(0.5, 3).per_datum(*a),
    "cubo": lambda *a: ph.CUBO(2, 3).per_datum(*a),
    "importance": lambda *a: ph.log_evidence(*a, num_samples=20, chunk_size=5).value,
    "bayes": lambda *a: ph.log_evidence(*a, num_samples=20, method="bayes").value,
    "lower": lambda *a: ph.evidence_sandwich(*a, num_chains=2, betas=3).lower,
    "upper": lambda *a: ph.evidence_sandwich(*a, num_chains=2, betas=3).upper,
    "to_datatree": lambda *a: ph.to_datatree(*a, num_draws=3, groups=["sample_stats"])["sample_stats"][
        "log_weight"
    ].values[0, 2],
}


@pytest.mark.parametrize("verb", EVALUATIONS)
@pytest.mark.parametrize("layers", [lambda: nn.Dropout(0.5), identity_norm], ids=["dropout", "norm"])
def test_evaluation_is_in_evaluation_mode(verb: str, layers: Callable[[], nn.Module]) -> None:
    model, guide = exact(layers)
    model.train()
    guide.train()
    close(EVALUATIONS[verb](model, guide, rows()), per_row(rows()))
    assert model.training
    assert guide.training


@pytest.mark.parametrize("verb", EVALUATIONS)
def test_a_batch_of_one(verb: str) -> None:
    x = rows()[:1]
    model, guide = exact(identity_norm)
    close(EVALUATIONS[verb](model.train(), guide.train(), x), per_row(x))


def test_k_hats_in_evaluation_mode() -> None:
    model, guide = exact(lambda: nn.Dropout(0.5))
    found = ph.diagnostics.khats(model.train(), guide.train(), rows(), num_draws=40)
    assert found.per_datum is not None
    assert bool((found.per_datum == -torch.inf).all())


def test_terms_in_evaluation_mode() -> None:
    model, guide = exact(lambda: nn.Dropout(0.5))
    terms = ph.LayerwiseELBO().terms(model.train(), guide.train(), rows())
    truth = 0.5 * ((rows() / 2) ** 2 + 0.5 - 1 + torch.log(torch.tensor(2.0))).sum(-1)
    close(terms["kl_z"], truth)


def test_after_fit_evaluation_has_the_running_statistics() -> None:
    x = torch.randn(40, 2) + 1.0
    model, guide = exact(lambda: nn.BatchNorm1d(2))
    ph.fit(model, guide, x, bound=ph.TraceELBO(), steps=5, batch_size=20, progress=False)
    pyro.set_rng_seed(3)  # which seeds numpy and Python too
    before = state(model, guide)

    def value(seed: int = 3) -> Tensor:
        torch.manual_seed(seed)
        return ph.TraceELBO(4).per_datum(model, guide, x[:6])

    found, again = value(), value()
    same(before, state(model, guide))
    model.eval()
    guide.eval()
    right = value()
    close(found, right)
    close(again, right)


def test_the_first_call_draws_as_the_second_does() -> None:
    model, guide = pair()

    def value() -> Tensor:
        pyro.set_rng_seed(5)
        return ph.log_evidence(model, guide, rows(), num_samples=20).value

    first, second = value(), value()
    close(first, second, 0.0)


def test_explain_leaves_the_generators_alone() -> None:
    model, guide = pair()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    ph.explain(ph.LayerwiseELBO(), model, guide, rows())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_a_generator_of_the_program_is_as_before() -> None:
    class Noisy(nn.Module):
        """Jitters its input by a generator of its own while it trains."""

        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(1)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(x.shape, generator=self.generator) if self.training else x

    model, guide = exact(Noisy)
    before = [program.layer.net.generator.get_state() for program in (model, guide)]  # type: ignore[union-attr]
    value = ph.log_evidence(model.train(), guide.train(), rows(), num_samples=20).value
    close(value, per_row(rows()))
    for program, state_before in zip((model, guide), before, strict=True):
        assert torch.equal(program.layer.net.generator.get_state(), state_before)  # type: ignore[union-attr]


def test_the_parameter_store_is_not_filled_by_a_failing_look() -> None:
    model, guide = pair()
    model.fails_at = 1
    with pytest.raises(RuntimeError, match="stop here"):
        ph.explain(ph.TraceELBO(), model, guide, rows())
    assert list(pyro.get_param_store().keys()) == []
