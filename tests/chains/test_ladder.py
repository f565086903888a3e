"""The ladder posterior: precision weighting, exactness where it is exact, and the model's parameters shared."""

import copy

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroSample
from torch import nn

from pyro_hvae import TraceELBO
from pyro_hvae.chains import BottomUp, Ladder, LadderEvidence, TopDown
from pyro_hvae.chains.ladder import gaussian_product
from pyro_hvae.kernels import Bernoulli, Gaussian, LinearGaussian, StandardNormal
from tests.linear_gaussian import Oracle
from tests.test_linear_gaussian import log_weight


def pair():
    model = TopDown(z2=StandardNormal(2), z1=Gaussian(nn.Linear(2, 6)), x=Bernoulli(nn.Linear(3, 5)))
    guide = Ladder(
        model,
        z1=LadderEvidence(nn.Linear(5, 4), nn.Linear(4, 6), nn.Tanh()),
        z2=LadderEvidence(nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()),
    )
    return model, guide


def data(size=7):
    return torch.bernoulli(torch.full((size, 5), 0.4))


def test_merge_is_the_normalised_product():
    p = dist.Normal(torch.randn(4, 2), torch.rand(4, 2) + 0.1).to_event(1)
    e = dist.Normal(torch.randn(4, 2), torch.rand(4, 2) + 0.1).to_event(1)
    q = gaussian_product("z", p, e)
    z = torch.randn(6, 4, 2)
    difference = p.log_prob(z) + e.log_prob(z) - q.log_prob(z)  # the normaliser: the same at every z
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))


def test_merge_is_safe_in_float32_at_extreme_scales():
    for p_scale, e_scale in ((1e-3, 1e3), (1e3, 1e-3), (1e-3, 1e-3), (1e3, 1e3)):
        p = dist.Normal(torch.ones(1, dtype=torch.float32), p_scale).to_event(1)
        e = dist.Normal(-torch.ones(1, dtype=torch.float32), e_scale).to_event(1)
        q = gaussian_product("z", p, e).base_dist
        precision = p_scale**-2 + e_scale**-2
        assert q.scale.item() == pytest.approx(precision**-0.5, rel=1e-5)
        assert q.loc.item() == pytest.approx((p_scale**-2 - e_scale**-2) / precision, abs=1e-5)


def test_scalar_chain_with_the_likelihoods_evidence_is_exact():
    """Evidence about z1 is N(x/w1, (s0/w1)^2), about z2 what that says through p(z1 | z2)."""
    w1, w2, s0, s1 = 0.8, -1.3, 0.6, 0.7
    model = TopDown(
        z2=StandardNormal(1),
        z1=LinearGaussian(1, 1, weight=torch.tensor([[w2]]), bias=False, scale=s1),
        x=LinearGaussian(1, 1, weight=torch.tensor([[w1]]), bias=False, scale=s0),
    )
    spread = ((s0 / w1) ** 2 + s1**2) ** 0.5
    guide = Ladder(
        model,
        z1=LinearGaussian(1, 1, weight=torch.tensor([[1 / w1]]), bias=False, scale=s0 / abs(w1)),
        z2=LinearGaussian(1, 1, weight=torch.tensor([[1 / w2]]), bias=False, scale=spread / abs(w2)),
    )
    x = torch.randn(6, 1)
    torch.testing.assert_close(log_weight(model, guide, x), Oracle(model).log_evidence(x), rtol=0, atol=1e-10)


def test_evidence_without_information_gives_the_prior():
    model, _ = pair()
    wide = 1e8
    guide = Ladder(model, z1=LinearGaussian(5, 3, scale=wide), z2=LinearGaussian(3, 2, scale=wide))
    x = data()
    torch.manual_seed(1)
    drawn = guide(x)
    torch.manual_seed(1)
    trace = poutine.trace(model).get_trace(x)
    for site in ("z2", "z1"):
        torch.testing.assert_close(drawn[site], trace.nodes[site]["value"], rtol=0, atol=1e-6)


def test_samples_in_the_models_order_from_evidence_of_the_layer_below():
    model, guide = pair()
    x = data()
    trace = poutine.trace(guide).get_trace(x)
    assert [name for name in trace.stochastic_nodes if name != "data"] == ["z2", "z1"]
    features, evidence1 = guide.z1(x)
    _, evidence2 = guide.z2(features)
    torch.testing.assert_close(features, guide.z1.net(x).tanh())
    expected = gaussian_product("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1), evidence2)
    torch.testing.assert_close(trace.nodes["z2"]["fn"].mean, expected.mean)
    expected = gaussian_product("z1", model.z1(trace.nodes["z2"]["value"]), evidence1)
    torch.testing.assert_close(trace.nodes["z1"]["fn"].mean, expected.mean)
    assert repr(guide).startswith("Ladder(x -> z2 -> z1;")


def test_particles_mask_context_and_minibatch():
    model, guide = pair()
    x = data()
    with pyro.plate("particles", 4, dim=-2):
        assert guide(x)["z1"].shape == (4, 7, 3)
    mask = torch.rand(7, 5) < 0.5
    torch.manual_seed(1)
    first = guide(torch.where(mask, x, torch.nan), mask=mask)
    torch.manual_seed(1)
    assert torch.equal(first["z1"], guide(torch.where(mask, x, 0.0))["z1"])
    assert poutine.trace(guide).get_trace(x, data_size=70).nodes["z1"]["scale"] == 10
    model = TopDown(z=StandardNormal(2), x=Bernoulli(nn.Linear(5, 5)))
    ladder = Ladder(model, z=LadderEvidence(nn.Linear(8, 4), nn.Linear(4, 4)))
    assert ladder(x, context=torch.randn(7, 3))["z"].shape == (7, 2)


class TestParameters:
    def test_the_guide_owns_the_evidence_only(self):
        model, guide = pair()
        assert not set(map(id, model.parameters())) & set(map(id, guide.parameters()))
        assert all(name.startswith(("z1.", "z2.")) for name in guide.state_dict())
        assert guide.model is model

    def test_the_store_has_each_parameter_once_under_the_models_name(self):
        model, guide = pair()
        x = data()
        guide(x), model(x)
        store = pyro.get_param_store()
        names = set(store.keys())
        assert {name.split(".")[0] for name in names} == {"model", "guide"}
        assert len(names) == len([*model.parameters(), *guide.parameters()])
        assert store["model.z1.net$$$weight"].unconstrained() is model.z1.net.weight

    @pytest.mark.parametrize("local", [False, True])
    @pytest.mark.parametrize("route", ["svi", "module"])
    def test_all_train(self, route, local):
        with pyro.settings.context(module_local_params=local):
            model, guide = pair()
            x = data()
            owned = [*model.parameters(), *guide.parameters()]
            before = [parameter.detach().clone() for parameter in owned]
            if route == "svi":
                svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceELBO())
                for _ in range(3):
                    svi.step(x)
            else:
                objective = Trace_ELBO()(model, guide)
                assert len(list(objective.parameters())) == len(owned)
                optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
                for _ in range(3):
                    optimizer.zero_grad()
                    objective(x).backward()
                    optimizer.step()
            after = [*model.parameters(), *guide.parameters()]
            assert not any(torch.equal(first, second) for first, second in zip(before, after))

    def test_a_copied_pair_stays_a_pair(self):
        model, guide = copy.deepcopy(pair())
        assert guide.model is model


class TestErrors:
    def test_evidence_that_does_not_match_the_latents(self):
        model, _ = pair()
        with pytest.raises(ValueError, match=r"latents \['z1', 'z2'\], evidence \['z1', 'z3'\]"):
            Ladder(model, z1=Gaussian(nn.Linear(5, 6)), z3=Gaussian(nn.Linear(3, 4)))

    def test_a_model_that_is_no_chain(self):
        with pytest.raises(TypeError, match="needs the TopDown whose latents it infers, got BottomUp"):
            Ladder(BottomUp(z=StandardNormal(2)), z=StandardNormal(2))

    def test_kernels_that_are_no_diagonal_gaussian(self):
        model = TopDown(z=LinearGaussian(0, 2, covariance=torch.eye(2)), x=Bernoulli(nn.Linear(2, 5)), name="full")
        guide = Ladder(model, z=Gaussian(nn.Linear(5, 4)))
        with pytest.raises(ValueError, match="the model's kernel of 'z' is MultivariateNormal"):
            guide(data())

    def test_widths(self):
        model, _ = pair()
        guide = Ladder(model, z1=Gaussian(nn.Linear(5, 6)), z2=Gaussian(nn.Linear(3, 8)))
        with pytest.raises(ValueError, match=r"evidence for 'z2' has event shape \(4,\).*\(2,\)"):
            guide(data())
        guide = Ladder(model, z1=Gaussian(nn.Linear(5, 6)), z2=Gaussian(nn.Linear(4, 4)))
        with pytest.raises(ValueError, match=r"kernel 'z2' of 'guide'.*\(7, 3\).*last dim of 4"):
            guide(data())

    def test_bayesian_weights(self):
        kernel = LinearGaussian(2, 3)
        kernel.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        model = TopDown(z2=StandardNormal(2), z1=kernel, x=Bernoulli(nn.Linear(3, 5)))
        guide = Ladder(model, z1=Gaussian(nn.Linear(5, 6)), z2=Gaussian(nn.Linear(3, 4)))
        with pytest.raises(ValueError, match="Bayesian weights"):
            guide(data())


class TestLadderEvidence:
    def test_head_yields_the_posterior_mean_under_a_standard_normal_prior(self):
        """Merged with N(mu, s^2): precision 1/s^2 + lambda, mean (mu / s^2 + m (1 + lambda)) / precision."""
        rung = LadderEvidence(nn.Identity(), nn.Identity(), min_precision=0.01)
        given = torch.randn(4, 6)
        _, evidence = rung(given)
        mean, raw = given.chunk(2, -1)
        precision = 0.01 + nn.functional.softplus(raw + rung._shift)
        prior = dist.Normal(torch.randn(4, 3), torch.rand(4, 3) + 0.5).to_event(1)
        found = gaussian_product("z", prior, evidence)
        total = prior.variance**-1 + precision
        torch.testing.assert_close(found.variance, 1 / total)
        torch.testing.assert_close(found.mean, (prior.mean / prior.variance + mean * (1 + precision)) / total)
        standard = gaussian_product("z", dist.Normal(torch.zeros(4, 3), 1.0).to_event(1), evidence)
        torch.testing.assert_close(standard.mean, mean)

    def test_starts_with_little_precision_and_a_live_gradient(self):
        rung = LadderEvidence(nn.Identity(), nn.Identity())
        given = torch.zeros(1, 2, requires_grad=True)
        _, evidence = rung(given)
        torch.testing.assert_close(evidence.variance, torch.full((1, 1), 5.0))
        found = gaussian_product("z", dist.Normal(torch.zeros(1), 1.0).to_event(1), evidence)
        (gradient,) = torch.autograd.grad(found.mean.sum(), given)
        torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0]]))

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"min_precision must lie in \(0, 0.2\), got 0.5"):
            LadderEvidence(nn.Identity(), nn.Identity(), min_precision=0.5)
        with pytest.raises(ValueError, match="event_dim >= 1"):
            LadderEvidence(nn.Identity(), nn.Identity(), event_dim=0)


@pytest.mark.slow
def test_more_than_one_layer_learns_without_annealing():
    """Data of one fair bit in eight copies with noise, log p about -3.3; independent pixels give 8 log 2."""
    from pyro_hvae import LayerwiseELBO
    from pyro_hvae.models import ladder_vae

    model, guide = ladder_vae(8, (4, 2), hidden=(32,))
    bit = (torch.rand(2000, 1) < 0.5).double()
    x = torch.where(torch.rand(2000, 8) < 0.1, 1 - bit, bit)
    objective = LayerwiseELBO()(model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    for step in range(600):
        optimizer.zero_grad()
        objective(x[(step * 100) % 2000 :][:100]).backward()
        optimizer.step()
    terms = LayerwiseELBO(20).terms(model, guide, x)
    elbo = terms["reconstruction"] - terms["kl_z2"] - terms["kl_z1"]
    assert elbo.mean() > -4.2
    assert terms["kl_z1"].mean() + terms["kl_z2"].mean() > 0.5
