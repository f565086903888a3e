"""Chains nest: a diffusion as the prior of a latent (oracle 14), and any chain in the place of a kernel."""

import math

import numpy as np
import pyro
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.bounds.diffusion import DiffusionELBO as Bound
from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.diffusion import (
    Absorbing,
    DenoisingChain,
    Diffusion,
    DiscreteDenoisingChain,
    DiscreteDiffusion,
    LearnedSchedule,
    LinearSchedule,
    Noising,
    ddim,
)
from pyro_hvae.kernels import Bernoulli, Categorical, Gaussian, LinearGaussian, StandardNormal
from pyro_hvae.models import latent_diffusion
from pyro_hvae.nn import MLP, ConvDecoder, ConvEncoder, DenoisingMLP, UNet
from pyro_hvae.training.compile import trace
from pyro_hvae.training.compile.graph import split_batch
from pyro_hvae.training.objective import PairObjective
from tests.diffusion.categories import Linear

C, WEIGHT, NOISE = 1.5, 0.8, 0.6
TOTAL = WEIGHT**2 * C + NOISE**2


class Exact(nn.Module):
    """The noise in z of data N(0, C)."""

    def forward(self, z, gamma):
        level = Noising(gamma.unsqueeze(-1))
        gain = level.alpha * C / (level.alpha**2 * C + level.sigma**2)
        return (z - level.alpha * gain * z) / level.sigma


class Posterior(nn.Module):
    """p(z_0 | x) as mean and the raw scale of a Gaussian kernel, up to a shift that makes a guide wrong."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.gain, self.raw = nn.Parameter(torch.tensor(C * WEIGHT / TOTAL)), nn.Parameter(torch.zeros(()))
        self.shift = shift

    def forward(self, x):
        return torch.distributions.Normal(self.gain * x + self.shift, (C * NOISE**2 / TOTAL) ** 0.5 * self.raw.exp())


class Encoder(nn.Module):
    def __init__(self, shift=0.0):
        super().__init__()
        self.net = Posterior(shift)

    def forward(self, parent, context=None):
        normal = self.net(parent)
        return pyro.distributions.Normal(normal.loc, normal.scale).to_event(1)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(WEIGHT))

    def forward(self, parent, context=None):
        return pyro.distributions.Normal(self.weight * parent, NOISE).to_event(1)


def linear_pair(denoiser, num_layers, shift=0.0, schedule=None):
    return latent_diffusion(
        denoiser, encoder=Encoder(shift), decoder=Decoder(), latent_shape=1, num_layers=num_layers,
        schedule=schedule or LinearSchedule(-10.0, 4.0),
    )  # fmt: skip


class Wrong(nn.Module):
    def __init__(self, width=1):
        super().__init__()
        self.layer = nn.Linear(width + 1, width)

    def forward(self, z, gamma):
        return self.layer(torch.cat([z, gamma.unsqueeze(-1) / 10], -1))


def normal(value, scale):
    return torch.distributions.Normal(0.0, scale).log_prob(value).sum(-1)


def test_outer_terms_and_the_density_of_the_latent_are_the_evidence(monkeypatch):
    """With the diffusion cut out, and log N(z_0; 0, C) in its place, every draw of the exact guide gives log p(x)."""
    cut = lambda self, p, q, z, *_: {  # noqa: E731
        "reconstruction": normal(z, C**0.5), "prior_matching": torch.zeros(5), "denoising_matching": torch.zeros(5)
    }  # fmt: skip
    monkeypatch.setattr(Bound, "_layers", cut)
    x = 2 * torch.randn(5, 1)
    evidence = normal(x, TOTAL**0.5)
    for layers in (7, None):
        found = DiffusionELBO().per_datum(*linear_pair(Exact(), layers), x)
        torch.testing.assert_close(found, evidence, atol=1e-10, rtol=0)
    model, guide = linear_pair(Exact(), None, shift=0.2)
    plain = TopDown(z0=_Wide(), x=Decoder()), BottomUp(z0=Encoder(0.2))
    torch.manual_seed(3)
    nested = DiffusionELBO().per_datum(model, guide, x)
    torch.manual_seed(3)
    torch.testing.assert_close(nested, ph.TraceELBO().per_datum(*plain, x), atol=1e-10, rtol=0)


class _Wide(nn.Module):
    def forward(self, parent, context=None):
        return pyro.distributions.Normal(torch.zeros(1), C**0.5).to_event(1)


def test_gap_of_the_exact_denoiser_is_that_of_the_diffusion():
    """Oracle 14: mean of log p(x) - ELBO is oracle 4's gap, 3.5e-5, by quadrature over z_0, the noise and the time."""
    model, guide = linear_pair(Exact(), None)
    chain, process = model.nested, guide.nested
    last, first = Noising(torch.tensor(4.0)), torch.tensor(-10.0)
    kept = last.alpha**2 * C + last.sigma**2
    gap = 0.5 * (kept - 1 - kept.log()) + 0.5 * torch.log(1 + first.exp() / C)
    assert abs(gap - 3.5e-5) < 5e-7
    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(8))
    z_0, eps = (C**0.5 * nodes)[:, None, None].expand(8, 8, 1), nodes[None, :, None].expand(8, 8, 1)
    both = (weights[:, None] * weights / weights.sum() ** 2).expand(8, 8)
    times, widths = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(80))
    inner = torch.zeros(())
    for t, width in zip((times + 1) / 2, widths / 2, strict=True):
        level = Noising(chain.schedule(t))
        inner += width * (both * chain.matching(None, t, level.alpha * z_0 + level.sigma * eps, z_0)).sum()
    top = torch.distributions.kl_divergence(process.marginal(torch.ones(()), z_0), chain.prior(z_0).expand((8, 8)))
    lowest = Noising(first)
    reconstruction = chain.likelihood(lowest.alpha * z_0 + lowest.sigma * eps).log_prob(z_0)
    entropy = 0.5 * math.log(2 * math.pi * math.e * C)
    assert abs((both * (top - reconstruction)).sum() + inner - entropy - gap) < 1e-9


def mean_and_error(draws):
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


@pytest.mark.parametrize("num_layers", [1000, None])
def test_bound_with_everything_exact_is_the_evidence(num_layers):
    x = TOTAL**0.5 * torch.randn(20_000, 1)
    gap = normal(x, TOTAL**0.5) - DiffusionELBO(4).per_datum(*linear_pair(Exact(), num_layers), x)
    found, error = mean_and_error(gap)
    assert error < 0.05
    assert abs(found) < 4 * error + (0.02 if num_layers else 0)


@pytest.mark.parametrize("sampling", ["uniform", "antithetic", "importance", "exact"])
def test_same_expectation_as_the_whole_program(sampling):
    model, guide = linear_pair(Wrong(), 6, shift=0.3, schedule=LinearSchedule(-4.0, 3.0))
    x = torch.full((4000, 1), 0.7)
    whole, whole_error = mean_and_error(ph.TraceELBO().per_datum(model, guide, x))
    few, few_error = mean_and_error(DiffusionELBO(2, sampling).per_datum(model, guide, x, data_size=40_000))
    assert abs(whole - few) < 4 * (whole_error**2 + few_error**2).sqrt()
    terms, all_terms = DiffusionELBO().terms(model, guide, x), ph.TraceELBO().terms(model, guide, x)
    for name in ("reconstruction", "rate_z0"):
        (one, e), (other, f) = mean_and_error(terms[name]), mean_and_error(all_terms[name])
        assert abs(one - other) < 4 * (e**2 + f**2).sqrt()
    torch.manual_seed(0)
    loss = DiffusionELBO(2).loss(model, guide, x, data_size=40_000)
    assert abs(loss / 40_000 + whole) < 5 * (whole_error**2 + few_error**2).sqrt()


@pytest.mark.parametrize("route", ["svi", "module"])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(("num_layers", "bound"), [(None, DiffusionELBO()), (4, DiffusionELBO()), (4, ph.IWELBO(3))])
def test_every_parameter_trains(route, local, num_layers, bound):
    x = (torch.rand(16, 6) < 0.5).double()
    with pyro.settings.context(module_local_params=local):
        model, guide = latent_diffusion(
            DenoisingMLP(2, hidden=8, num_layers=1), encoder=Gaussian(MLP(6, 4, (5,))), decoder=Bernoulli(MLP(2, 6)),
            latent_shape=2, num_layers=num_layers, schedule=LearnedSchedule(-6.0, 4.0).double(),
        )  # fmt: skip
        parts = {f"{p}.{n}": v for p, m in (("model", model), ("guide", guide)) for n, v in m.named_parameters()}
        before = {name: value.detach().clone() for name, value in parts.items()}
        if route == "svi":
            svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), bound)
            for _ in range(4):
                svi.step(x)
        else:
            objective = bound(model, guide)
            optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
            for _ in range(4):
                optimizer.zero_grad()
                objective(x).backward()
                optimizer.step()
    assert any("z0.schedule" in name for name in before)
    assert any(name.startswith("guide.z0") for name in before)
    assert [name for name, value in parts.items() if torch.equal(value, before[name])] == []


def test_gradients_are_those_of_the_whole_program_in_the_mean():
    model, guide = linear_pair(Wrong(), 3, shift=0.3, schedule=LinearSchedule(-2.0, 2.0))
    parameters = [*model.parameters(), *guide.parameters()]
    x = torch.full((400, 1), 0.7)
    means = []
    for bound in (DiffusionELBO(1, "exact"), ph.TraceELBO()):
        draws = []
        for _ in range(40):
            loss = bound.differentiable_loss(model, guide, x) / 400
            draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        means.append(mean_and_error(torch.stack(draws)))
    (one, e), (other, f) = means
    assert ((one - other).abs() < 4.5 * (e**2 + f**2).sqrt() + 1e-9).all()


def test_number_of_denoiser_calls_does_not_depend_on_the_number_of_layers():
    counts = []
    for num_layers in (10, 1000, None):
        net, calls = Wrong(), []
        net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        DiffusionELBO().loss(*linear_pair(net, num_layers), torch.randn(4, 1))
        counts.append(len(calls))
    assert counts == [1, 1, 1]


def images(num_layers):
    return latent_diffusion(
        UNet(2, channels=(4,)), encoder=Gaussian(nn.Sequential(ConvEncoder((1, 8, 8), 2 * 2 * 16, (4,)), _Fold()), 3),
        decoder=Bernoulli(nn.Sequential(nn.Flatten(-3), ConvDecoder(32, (1, 8, 8), (4,))), 3),
        latent_shape=(2, 4, 4), num_layers=num_layers,
    )  # fmt: skip


class _Fold(nn.Module):
    def forward(self, value):
        return value.unflatten(-1, (4, 4, 4))


@pytest.mark.parametrize("num_layers", [5, None])
def test_images_with_a_convolutional_decoder(num_layers):
    model, guide = images(num_layers)
    x = (torch.rand(6, 1, 8, 8) < 0.5).double()
    result = ph.fit(model, guide, x, bound=DiffusionELBO(), steps=3, batch_size=3, progress=False)
    assert all(math.isfinite(record["loss"]) for record in result.history if "loss" in record)
    assert DiffusionELBO().per_datum(model, guide, x).shape == (6,)
    mask = torch.rand(6, 1, 8, 8) < 0.7
    assert DiffusionELBO().per_datum(model, guide, x, mask=mask).isfinite().all()
    latent = ddim(model.nested, 6, num_steps=4)
    assert ph.decode(model, {"z0": latent}).mean.shape == (6, 1, 8, 8)
    assert model(size=6, visit=lambda chain: chain.around(lambda _: latent, size=6)).shape == (6, 1, 8, 8)
    assert DiffusionELBO().per_layer(model, guide, x, num_layers=3)[1].shape == (3, 6)
    if num_layers:
        assert model(size=2).shape == (2, 1, 8, 8)
        encoded = ph.encode(guide, x)
        assert list(encoded) == ["z0", *(f"z{i}" for i in range(1, 6))]
        assert ph.reconstruct(model, guide, x, num_draws=3).shape == x.shape
        assert ph.impute(model, guide, x, mask, num_draws=3).shape == (3, 6, 1, 8, 8)
        assert ph.decode(model, {"z4": encoded["z4"]}).mean.shape == (6, 1, 8, 8)
        assert ph.log_evidence(model, guide, x[:2], num_samples=20).value.isfinite().all()
    else:
        with pytest.raises(ValueError, match="infinitely many sites"):
            model(size=2)
        with pytest.raises(ValueError, match="infinitely many sites"):
            ph.TraceELBO().per_datum(model, guide, x)


@pytest.mark.parametrize("num_layers", [5, None])
def test_data_that_do_not_fit_are_named(num_layers):
    model, guide = images(num_layers)
    x = torch.zeros(6, 1, 8, 8)
    x[2, 0, 3, 1] = math.nan
    with pytest.raises(ValueError, match=r"^1 of 384 observed values at site 'x' are NaN .* index \(2, 0, 3, 1\)"):
        DiffusionELBO().per_datum(model, guide, x)
    assert DiffusionELBO().per_datum(model, guide, x, mask=x.isfinite()).isfinite().all()
    x[2, 0, 3, 1] = 0.5
    with pytest.raises(ValueError, match=r"^1 of 384 observed values at site 'x' lie outside .* index \(2, 0, 3, 1\)"):
        DiffusionELBO().per_datum(model, guide, x)


def test_further_latents_and_a_context():
    """x -> h -> z0 -> noise: h is an ordinary layer, and the diffusion is the prior of z0 alone."""
    noise = LinearSchedule(-3.0, 3.0)
    net = DenoisingMLP(2, hidden=8, num_layers=1, context_features=3)
    model = TopDown(
        z0=DenoisingChain(net, event_shape=(2,), schedule=noise, num_layers=4),
        h=Gaussian(nn.Linear(2 + 3, 2 * 2)), x=Bernoulli(nn.Linear(2 + 3, 5)),
    )  # fmt: skip
    guide = BottomUp(h=Gaussian(nn.Linear(5 + 3, 4)), z0=Gaussian(nn.Linear(2 + 3, 4)), noise=Diffusion(noise, 4))
    x, context = (torch.rand(1, 5) < 0.5).double().expand(3000, 5), torch.eye(3)[[0]].expand(3000, 3)
    assert model.latents == ("z4", "z3", "z2", "z1", "z0", "h")
    assert guide.latents == ("h", "z0", "z1", "z2", "z3", "z4")
    whole, whole_error = mean_and_error(ph.TraceELBO().per_datum(model, guide, x, context))
    few, few_error = mean_and_error(DiffusionELBO(2).per_datum(model, guide, x, context=context))
    assert abs(whole - few) < 4 * (whole_error**2 + few_error**2).sqrt()
    assert set(DiffusionELBO().terms(model, guide, x, context=context)) == {
        "reconstruction", "rate_h", "rate_z0", "prior_matching", "denoising_matching"
    }  # fmt: skip


def test_a_chain_in_a_chain_is_the_flat_chain():
    top, middle, bottom = StandardNormal(2), Gaussian(nn.Linear(2, 4)), Bernoulli(nn.Linear(2, 5))
    up, further = Gaussian(nn.Linear(5, 4)), LinearGaussian(2, 2)
    flat = TopDown(z2=top, z1=middle, x=bottom), BottomUp(z1=up, z2=further)
    nested = (
        TopDown(z1=TopDown(z2=top, own=middle), x=bottom),
        BottomUp(z1=up, rest=BottomUp(z2=further)),
    )
    assert nested[0].latents == flat[0].latents == ("z2", "z1")
    assert nested[1].latents == flat[1].latents
    x = (torch.rand(4, 5) < 0.5).double()
    for bound in (ph.TraceELBO(3), ph.LayerwiseELBO(2), ph.IWELBO(5)):
        values = []
        for model, guide in (flat, nested):
            torch.manual_seed(2)
            values.append(bound.per_datum(model, guide, x))
        torch.testing.assert_close(*values)
    assert set(ph.LayerwiseELBO().terms(*nested, x)) == set(ph.LayerwiseELBO().terms(*flat, x))
    pyro.clear_param_store()
    svi = pyro.infer.SVI(*nested, pyro.optim.Adam({"lr": 1e-2}), ph.TraceELBO())
    before = [p.detach().clone() for program in nested for p in program.parameters()]
    svi.step(x)
    after = [p for program in nested for p in program.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(name.startswith("model.z1.own.net") for name in pyro.get_param_store())
    assert nested[0](size=3).shape == (3, 5)


def test_noise_on_a_code_of_categories():
    noise = Absorbing(3)
    model = TopDown(
        z0=DiscreteDenoisingChain(Linear(4, 3), event_shape=(4,), corruption=noise, num_layers=3), x=Codes()
    )
    guide = BottomUp(z0=Categorical(nn.Linear(5, 12), num_categories=3), noise=DiscreteDiffusion(noise, 3))
    x = (torch.rand(1, 5) < 0.5).double().expand(4000, 5)
    whole, whole_error = mean_and_error(ph.TraceELBO().per_datum(model, guide, x))
    few, few_error = mean_and_error(DiffusionELBO(2).per_datum(model, guide, x))
    assert abs(whole - few) < 4 * (whole_error**2 + few_error**2).sqrt()
    with pytest.raises(ValueError, match=r"site\(s\) \['z0'\] have no reparameterised draws"):
        DiffusionELBO()(model, guide)(x)
    ph.TraceELBO(gradient="score").loss_and_grads(model, guide, x[:5])


class Codes(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 5)

    def forward(self, parent, context=None):
        return pyro.distributions.Bernoulli(logits=self.net(parent.double())).to_event(1)


def test_what_does_not_nest():
    noise = LinearSchedule()
    chain = DenoisingChain(Wrong(2), event_shape=(2,), schedule=noise, num_layers=3)
    encoder, decoder = Gaussian(nn.Linear(5, 4)), Bernoulli(nn.Linear(2, 5))
    with pytest.raises(ValueError, match=r"the sites \['z1'\] are in the chain and in a chain that is nested"):
        TopDown(z0=chain, z1=Gaussian(nn.Linear(2, 4)), x=decoder)
    with pytest.raises(ValueError, match="'z0' is a diffusion, which starts from noise and takes no parent"):
        TopDown(h=StandardNormal(2), z0=chain, x=decoder)
    with pytest.raises(TypeError, match="'noise' is a Diffusion, an inference chain"):
        TopDown(noise=Diffusion(noise, 3), x=decoder)
    with pytest.raises(TypeError, match="'z0' is a DenoisingChain, a generative chain"):
        BottomUp(h=encoder, z0=chain)
    with pytest.raises(ValueError, match="make it the last of two or more"):
        BottomUp(noise=Diffusion(noise, 3), h=encoder)
    with pytest.raises(ValueError, match="make it the last of two or more"):
        BottomUp(noise=Diffusion(noise, 3))
    x = torch.zeros(4, 5)
    model, guide = TopDown(z0=chain, x=decoder), BottomUp(z0=encoder, noise=Diffusion(noise, 3))
    with pytest.raises(TypeError, match="nested in the model alone"):
        DiffusionELBO().per_datum(model, BottomUp(z0=encoder), x)
    with pytest.raises(TypeError, match="nested in the guide alone"):
        DiffusionELBO().per_datum(TopDown(z0=StandardNormal(2), x=decoder), guide, x)
    with pytest.raises(ValueError, match="one process for both"):
        DiffusionELBO().per_datum(model, BottomUp(z0=encoder, noise=Diffusion(LinearSchedule(-3.0, 3.0), 3)), x)
    with pytest.raises(ValueError, match="no diffusion is nested"):
        TopDown(z0=StandardNormal(2), x=decoder)(x, visit=lambda chain: chain.around(lambda _: x, x))


@pytest.mark.parametrize("num_layers", [4, None])
def test_a_step_is_one_graph(num_layers):
    """The flat graph of a step equals the eager one under the same noise."""
    model, guide = latent_diffusion(
        DenoisingMLP(2, hidden=8, num_layers=1), encoder=Gaussian(MLP(6, 4, (5,))), decoder=Bernoulli(MLP(2, 6, (5,))),
        latent_shape=2, num_layers=num_layers,
    )  # fmt: skip
    x = (torch.rand(8, 6) < 0.5).double()
    objective = PairObjective(DiffusionELBO(), model, guide, (x,), {}, None)
    flat = trace(objective, list(objective.parameters()), (x,), {})
    torch.manual_seed(3)
    found = flat(*split_batch((x,), {})[0])
    torch.manual_seed(3)
    loss = objective(x)
    torch.testing.assert_close(found[0], loss.detach())
    for one, other in zip(found[1:], torch.autograd.grad(loss, flat.trained), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)
