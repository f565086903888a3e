"""Discrete diffusions in training, and what they refuse: every parameter moves, no wrong call passes in silence."""

import math

import pyro
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO, SimpleDiffusionLoss
from pyro_hvae.diffusion import (
    Absorbing,
    CosineReplacement,
    Diffusion,
    DiscreteDiffusion,
    LinearSchedule,
    PowerReplacement,
    ReplacementSchedule,
    Uniform,
    ancestral,
    ddim,
    inpaint,
    unmask,
)
from pyro_hvae.models import discrete_diffusion, vdm
from pyro_hvae.nn import DenoisingMLP, TokenMLP, TokenTransformer, TokenUNet
from pyro_hvae.training.compile import trace
from pyro_hvae.training.compile.graph import split_batch
from pyro_hvae.training.objective import PairObjective
from tests.diffusion.categories import BITS, Linear, Masked, expected_bound, integrated, states

DENOISERS = {
    "mlp": (lambda: TokenMLP(6, 3, hidden=8, num_layers=1), (6,)),
    "transformer": (lambda: TokenTransformer(6, 3, features=8, num_heads=2, num_layers=1), (6,)),
    "unet": (lambda: TokenUNet(3, 2, channels=(8,), embedding=2), (2, 4, 4)),
}


def moved(route, model, guide, x, bound, steps=5):
    """Names of parameters that some steps leave as they were."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if route == "svi":
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), bound)
        for _ in range(steps):
            svi.step(x)
    else:
        objective = bound(model, guide)
        optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            objective(x).backward()
            optimizer.step()
    assert before
    return [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize("route", ["svi", "module"])
@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
@pytest.mark.parametrize("num_layers", [10, None])
@pytest.mark.parametrize("name", DENOISERS)
def test_every_parameter_trains(route, kind, num_layers, name):
    make, shape = DENOISERS[name]
    model, guide = discrete_diffusion(
        make(), event_shape=shape, num_categories=3, num_layers=num_layers, corruption=kind
    )
    assert moved(route, model, guide, torch.randint(0, 3, (16, *shape)), DiffusionELBO()) == []


@pytest.mark.parametrize("route", ["svi", "module"])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("bound", [ph.TraceELBO(gradient="score"), ph.IWELBO(3, "vimco"), DiffusionELBO()])
def test_the_full_chain_trains(route, local, bound):
    with pyro.settings.context(module_local_params=local):
        model, guide = discrete_diffusion(
            Linear(3, 2), event_shape=3, num_categories=2, num_layers=3, corruption="any_order"
        )
        assert moved(route, model, guide, torch.randint(0, 2, (16, 3)), bound) == []


def test_gradient_of_the_bound_is_that_of_its_expectation():
    model, guide = discrete_diffusion(Linear(), event_shape=3, num_categories=2, num_layers=4, corruption="uniform")
    x = states(2, 3)[5:6]
    weight = model.denoiser.layer.weight
    (exact,) = torch.autograd.grad(expected_bound(model, guide, x).sum(), weight)
    draws = []
    for _ in range(60):
        loss = DiffusionELBO(2).differentiable_loss(model, guide, x.expand(200, 3)) / 200
        draws.append(-torch.autograd.grad(loss, weight)[0])
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
def test_fit_learns_the_bits(kind):
    x = states(2, 3)[torch.multinomial(BITS, 4000, replacement=True)]
    model, guide = discrete_diffusion(
        TokenMLP(3, 2, hidden=32, num_layers=1), event_shape=3, num_categories=2, num_layers=None, corruption=kind
    )
    ph.fit(
        model, guide, x, bound=DiffusionELBO(), steps=400, batch_size=256, progress=False, seed=0,
        optimizer=lambda p: torch.optim.Adam(p, lr=5e-3),
    )  # fmt: skip
    with torch.no_grad():
        loss = -(BITS * integrated(model, guide, states(2, 3), points=200)).sum()
    entropy = -(BITS * BITS.log()).sum()  # a denoiser that knows nothing loses 0.143 nats
    assert 0 < loss - entropy < 0.02


def test_data_of_any_dtype_have_one_value():
    values = []
    for dtype in (torch.int64, torch.uint8, torch.float32, torch.float64, torch.bool):
        model, guide = discrete_diffusion(Masked(), event_shape=3, num_categories=2, num_layers=4)
        torch.manual_seed(0)
        values.append(DiffusionELBO(sampling="exact").per_datum(model, guide, states(2, 3).to(dtype)).double())
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], atol=1e-5, rtol=0)


def test_a_denoiser_in_single_precision():
    model, guide = discrete_diffusion(TokenMLP(3, 2).float(), event_shape=3, num_categories=2, num_layers=4)
    for bound in (DiffusionELBO(), ph.TraceELBO(), ph.IWELBO(3)):
        assert bound.per_datum(model, guide, states(2, 3)).isfinite().all()
    assert model(size=2).shape == (2, 3)


@pytest.mark.parametrize("num_layers", [4, None])
def test_data_outside_of_the_alphabet_are_named(num_layers):
    model, guide = discrete_diffusion(Linear(), event_shape=3, num_categories=2, num_layers=num_layers)
    for value in (2, -1):
        x = states(2, 3).clone()
        x[4, 1] = value
        with pytest.raises(ValueError, match=r"1 of 24 observed values at site 'x' lie outside .*index \(4, 1\)"):
            DiffusionELBO().per_datum(model, guide, x)
    x = states(2, 3).double()
    x[4, 1] = 0.5
    with pytest.raises(ValueError, match=r"lie outside of the support of Categorical.*index \(4, 1\)"):
        DiffusionELBO().per_datum(model, guide, x)
    with pytest.raises(ValueError, match=r"x has shape \(8, 2\)"):
        DiffusionELBO().per_datum(model, guide, x[:, :2])


def test_missing_entries_leave_their_likelihood_out():
    model, guide = discrete_diffusion(Linear(), event_shape=3, num_categories=2, num_layers=5)
    x = torch.tensor([[1.0, math.nan, 0.0]]).expand(4000, 3)
    mask = ~x.isnan()
    whole, few = (b.per_datum(model, guide, x, mask=mask) for b in (ph.TraceELBO(), DiffusionELBO(2)))
    error = ((whole.var() + few.var()) / 4000).sqrt()
    assert abs(whole.mean() - few.mean()) < 4 * error


def test_what_is_no_discrete_diffusion():
    parts = {"event_shape": 3, "num_categories": 2}
    with pytest.raises(ValueError, match="one of 'absorbing', 'any_order', 'ordinal', 'uniform'; got 'masked'"):
        discrete_diffusion(Linear(), num_layers=4, corruption="masked", **parts)
    with pytest.raises(ValueError, match="at least one layer, got num_layers=0"):
        discrete_diffusion(Linear(), num_layers=0, **parts)
    with pytest.raises(ValueError, match="num_layers is the number of entries of a datum, 3; got num_layers=4"):
        discrete_diffusion(Linear(), num_layers=4, corruption="any_order", **parts)
    with pytest.raises(ValueError, match="has no schedule"):
        discrete_diffusion(Linear(), num_layers=3, corruption="any_order", schedule=PowerReplacement(), **parts)
    with pytest.raises(ValueError, match="integer >= 2; got 1"):
        discrete_diffusion(Linear(), num_layers=3, event_shape=3, num_categories=1)
    with pytest.raises(TypeError, match=r"takes a ReplacementSchedule b\(t\).*got LinearSchedule"):
        discrete_diffusion(Linear(), num_layers=3, schedule=LinearSchedule(), **parts)
    model, guide = discrete_diffusion(Linear(3, 4), num_layers=3, **parts)
    with pytest.raises(ValueError, match=r"must return logits of shape .*\(8, 3, 2\)"):
        DiffusionELBO().per_datum(model, guide, states(2, 3))


class Bad(ReplacementSchedule):
    def __init__(self, function, learned=False):
        super().__init__()
        self.function = function
        if learned:
            self.raw = nn.Parameter(torch.zeros(()))

    def forward(self, t):
        return self.function(t)


def test_schedules_that_are_none():
    with pytest.raises(ValueError, match=r"from b\(0\) = 0"):
        Absorbing(2, Bad(lambda t: 0.1 + 0.9 * t))
    with pytest.raises(ValueError, match=r"increase on \[0, 1\]; at t = 0\.5"):
        Absorbing(2, Bad(lambda t: torch.where(t > 0.5, t - 0.1, t) / 0.9))
    with pytest.raises(ValueError, match=r"keeps one with probability 0\.2"):
        Absorbing(2, Bad(lambda t: 0.8 * t))
    assert Uniform(2, Bad(lambda t: 0.8 * t)).num_states == 2
    with pytest.raises(ValueError, match="can't be learned"):
        Uniform(2, Bad(lambda t: t, learned=True))
    with pytest.raises(ValueError, match="power must be positive"):
        PowerReplacement(0.0)
    for schedule in (PowerReplacement(1.5), CosineReplacement()):
        t = torch.linspace(0.01, 0.99, 9)
        numeric = (schedule(t + 1e-6) - schedule(t - 1e-6)) / 2e-6
        torch.testing.assert_close(schedule.derivative(t), numeric, atol=1e-8, rtol=0)
        torch.testing.assert_close(ReplacementSchedule.derivative(schedule, t), numeric, atol=1e-8, rtol=0)
        torch.testing.assert_close(schedule(t) + schedule.kept(t), torch.ones(9), atol=1e-12, rtol=0)
        torch.testing.assert_close(torch.sigmoid(schedule.gamma(t)), schedule(t), atol=1e-12, rtol=0)


def test_two_processes_in_one_pair_are_refused():
    parts = {"event_shape": 3, "num_categories": 2}
    model, guide = discrete_diffusion(Linear(), num_layers=4, **parts)
    x = states(2, 3)
    for other in (
        DiscreteDiffusion(Absorbing(2), 5),
        DiscreteDiffusion(Uniform(2), 4),
        DiscreteDiffusion(Absorbing(3), 4),
        DiscreteDiffusion(Absorbing(2, CosineReplacement()), 4),
        Diffusion(LinearSchedule(), 4),
    ):
        with pytest.raises(ValueError, match="one process for both"):
            DiffusionELBO().per_datum(model, other, x.double())
        with pytest.raises(ValueError, match="different diffusions"):
            inpaint(model, other, x, x > 0)
    torch.testing.assert_close(
        DiffusionELBO(sampling="exact").per_datum(model, DiscreteDiffusion(Absorbing(2), 4), x).shape, (8,)
    )
    with pytest.raises(TypeError, match="predicted Gaussian noise"):
        SimpleDiffusionLoss()(model, guide)(x)
    with pytest.raises(TypeError, match="needs a DenoisingChain"):
        ddim(model, 3)
    gaussian, _ = vdm(DenoisingMLP(3), event_shape=3, num_layers=4)
    for sample in (ancestral, unmask):
        with pytest.raises(TypeError, match="samples a DiscreteDenoisingChain"):
            sample(gaussian, 3)
    with pytest.raises(ValueError, match="infinitely many sites"):
        discrete_diffusion(Linear(), num_layers=None, **parts)[0](size=3)


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "ordinal", "gaussian"])
def test_encoder_and_decoder_of_a_diffusion(kind):
    if kind == "gaussian":
        model, guide = vdm(DenoisingMLP(3, hidden=8), event_shape=3, num_layers=4)
        x = torch.randn(8, 3)
    else:
        model, guide = discrete_diffusion(Linear(), event_shape=3, num_categories=2, num_layers=4, corruption=kind)
        x = states(2, 3)
    latents = ph.encode(guide, x, num_draws=5)
    assert latents["z3"].shape == (5, 8, 3)
    decoded = ph.decode(model, {"z1": latents["z1"]})
    assert decoded.shape() == (5, 8, 3)
    mask = torch.rand(8, 3) < 0.5
    imputed = ph.impute(model, guide, x, mask, num_draws=5)
    assert torch.equal(imputed[:, mask], x[mask].expand(5, -1))
    if kind != "gaussian":
        assert torch.equal(decoded.log_prob(imputed).isfinite(), decoded.log_prob(imputed) > -math.inf)
        with pytest.raises(ValueError, match="has no mean: its values are categories"):
            ph.reconstruct(model, guide, x)


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "ordinal"])
@pytest.mark.parametrize("num_layers", [6, None])
def test_a_step_is_one_graph(kind, num_layers):
    """The flat graph of a step equals the eager one under the same noise; nothing in it waits for the device."""
    make = TokenMLP(3, 2, hidden=8, num_layers=1)
    model, guide = discrete_diffusion(make, event_shape=3, num_categories=2, num_layers=num_layers, corruption=kind)
    x = states(2, 3)
    objective = PairObjective(DiffusionELBO(), model, guide, (x,), {}, None)
    parameters = list(objective.parameters())
    flat = trace(objective, parameters, (x,), {})
    torch.manual_seed(3)
    found = flat(*split_batch((x,), {})[0])
    torch.manual_seed(3)
    loss = objective(x)
    torch.testing.assert_close(found[0], loss.detach())
    for one, other in zip(found[1:], torch.autograd.grad(loss, flat.trained), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)
