"""Priors of latents: densities against closed forms, and pairs that train with them."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_hvae as ph
from pyro_hvae.kernels import FlowPrior, Gaussian, MixturePrior, VampPrior
from pyro_hvae.models import hvae, ladder_vae, table_vae, vae
from pyro_hvae.training import load


class TestMixture:
    def test_density_and_moments(self):
        prior = MixturePrior(2, 3)
        with torch.no_grad():
            prior.logits.copy_(torch.tensor([0.5, -1.0, 0.2]))
            prior.raw_scale.normal_()
        weights, scale = prior.logits.softmax(-1), prior(None).component_distribution.base_dist.scale
        z = torch.randn(4, 2)
        each = [weights[k].log() + dist.Normal(prior.loc[k], scale[k]).log_prob(z).sum(-1) for k in range(3)]
        torch.testing.assert_close(prior(None).log_prob(z), torch.stack(each).logsumexp(0))
        draws = prior(None).sample((40_000,))
        mean = weights @ prior.loc
        variance = weights @ (scale**2 + prior.loc**2) - mean**2
        assert ((draws.mean(0) - mean).abs() < 4 * (variance / 40_000).sqrt()).all()

    def test_one_component_of_a_standard_normal_is_it(self):
        prior = MixturePrior(3, 1)
        with torch.no_grad():
            prior.loc.zero_()
        z = torch.randn(5, 3)
        torch.testing.assert_close(prior(None).log_prob(z), dist.Normal(0.0, 1.0).log_prob(z).sum(-1))


class TestVamp:
    def test_density_is_the_mean_of_posteriors(self):
        kernel = Gaussian(nn.Linear(4, 2 * 2))
        prior = VampPrior(kernel, torch.rand(5, 4))
        z = torch.randn(7, 3, 2)
        each = torch.stack([kernel(u).log_prob(z) for u in prior.inputs])
        torch.testing.assert_close(prior(None).log_prob(z), each.logsumexp(0) - math.log(5))

    def test_the_guide_keeps_its_kernel(self):
        model, guide = vae(6, 2, hidden=(4,), prior="vamp", num_components=3)
        names = {name for name, _ in model.named_parameters()}
        assert "z1.inputs" in names
        assert not any("kernel" in name for name in names)
        ids = [id(p) for program in (model, guide) for p in program.parameters()]
        assert len(ids) == len(set(ids))

    def test_gradient_reaches_the_guide_through_the_prior(self):
        """Gradient of the ELBO in a shared parameter, against finite differences under the same noise."""
        model, guide = vae(3, 2, hidden=(2,), likelihood="gaussian", prior="vamp", num_components=4)
        x = torch.rand(5, 3)
        parameter = guide.z1.net.layers[-1].bias

        def loss():
            torch.manual_seed(0)
            return ph.TraceELBO().differentiable_loss(model, guide, x)

        (gradient,) = torch.autograd.grad(loss(), [parameter])
        for i in range(len(parameter)):
            with torch.no_grad():
                parameter[i] += 1e-5
                above = loss()
                parameter[i] -= 2e-5
                below = loss()
                parameter[i] += 1e-5
            torch.testing.assert_close(gradient[i], (above - below) / 2e-5, rtol=1e-5, atol=1e-6)


class TestFlow:
    def flow(self, features=2):
        torch.manual_seed(0)
        prior = FlowPrior(features, 3, (8,))
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return prior

    def test_starts_as_the_standard_normal(self):
        z = torch.randn(5, 4)
        torch.testing.assert_close(FlowPrior(4)(None).log_prob(z), dist.Normal(0.0, 1.0).log_prob(z).sum(-1))

    def test_density_is_a_change_of_variables(self):
        flow = self.flow(3)(None)
        noise = torch.randn(3)

        def forward(value):
            for transform in flow.transforms:
                value = transform(value)
            return value

        z = forward(noise)
        jacobian = torch.autograd.functional.jacobian(forward, noise)
        expected = dist.Normal(0.0, 1.0).log_prob(noise).sum() - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(flow.log_prob(z), expected)

    def test_density_integrates_to_one(self):
        axis = torch.linspace(-12, 12, 500)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
        mass = self.flow()(None).log_prob(grid).exp().sum().detach() * (axis[1] - axis[0]) ** 2
        assert abs(float(mass) - 1) < 1e-3

    def test_draws_have_the_density(self):
        """E_p[q / p] = 1 for a density q that is zero nowhere and narrower than p."""
        flow = self.flow()(None)
        z = flow.sample((20_000,))
        narrow = dist.Normal(flow.sample((20_000,)).mean(0), 0.3).to_event(1)
        ratio = (narrow.log_prob(z) - flow.log_prob(z)).exp()
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(20_000)


PRIORS = {"mixture": {"num_components": 4}, "vamp": {"num_components": 4}, "flow": {}}


@pytest.mark.parametrize("prior", PRIORS)
class TestPairs:
    @pytest.mark.parametrize("make", [vae, hvae])
    @pytest.mark.parametrize("shape", [6, (1, 2, 3)])
    def test_every_parameter_gets_a_gradient(self, prior, make, shape):
        dims = 2 if make is vae else (3, 2)
        model, guide = make(shape, dims, hidden=(4,), prior=prior, **PRIORS[prior])
        x = torch.bernoulli(torch.full((5, *((shape,) if isinstance(shape, int) else shape)), 0.5))
        assert model(size=3).shape == (3, *x.shape[1:])
        for bound in (ph.TraceELBO(), ph.LayerwiseELBO(), ph.IWELBO(4), ph.IWELBO(4, gradient="dreg")):
            loss = bound.differentiable_loss(model, guide, x)
            parameters = [*model.parameters(), *guide.parameters()]
            # the inner weights of a flow that starts as the identity get none at first
            gradients = torch.autograd.grad(loss, parameters)
            assert all(gradient.isfinite().all() for gradient in gradients)
            if prior != "flow":
                assert all(gradient.any() for gradient in gradients)

    def test_evidence_agrees_with_a_mean_over_the_prior(self, prior):
        """log p(x) by the guide's importance weights, and by draws of the prior."""
        torch.manual_seed(1)
        model, guide = vae(3, 2, hidden=(4,), prior=prior, **PRIORS[prior])
        x = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        with torch.no_grad():
            z = model.z1(None).sample((100_000,))
            each = model.x(z.unsqueeze(1)).log_prob(x)
            expected, error = each.exp().mean(0), each.exp().std(0) / math.sqrt(100_000)
        found = ph.log_evidence(model, guide, x, num_samples=20_000)
        spread = (error / expected).square() + found.stderr**2
        assert ((found.value - expected.log()).abs() < 4 * spread.sqrt()).all()

    def test_both_routes_train_all(self, prior):
        model, guide = vae(6, 2, hidden=(4,), prior=prior, **PRIORS[prior])
        x = torch.bernoulli(torch.full((20, 6), 0.5))
        start = copy.deepcopy(model.state_dict())
        ph.fit(model, guide, x, bound=ph.LayerwiseELBO(), steps=3, progress=False)
        moved = model.state_dict()
        assert all(not torch.equal(start[name], moved[name]) for name in start)
        pyro.clear_param_store()
        start = copy.deepcopy(model.state_dict())
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        for _ in range(3):
            svi.step(x)
        assert all(not torch.equal(start[name], value) for name, value in model.state_dict().items())
        assert len(pyro.get_param_store()) == len([*model.parameters(), *guide.parameters()])

    def test_load(self, prior, tmp_path):
        model, guide = vae(6, 2, hidden=(4,), prior=prior, **PRIORS[prior])
        x = torch.bernoulli(torch.full((20, 6), 0.5))
        ph.fit(model, guide, x, bound=ph.TraceELBO(), steps=2, run_dir=tmp_path, progress=False)
        again, _ = load(tmp_path)
        z = torch.randn(4, 2)
        assert torch.equal(again.z1(None).log_prob(z), model.z1(None).log_prob(z))

    def test_diagnose(self, prior):
        model, guide = vae(6, 2, hidden=(4,), prior=prior, **PRIORS[prior])
        x = torch.bernoulli(torch.full((8, 6), 0.5))
        assert "k-hat" in str(ph.diagnose(model, guide, x, num_draws=100))


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: vae(6, 2, prior="normal"), "prior must be one of"),
            (lambda: ladder_vae(6, (3, 2), prior="flow"), "ladder_vae"),
            (lambda: vae(6, 2, prior="vamp", context_dim=3), "context"),
            (lambda: vae(6, 1, prior="flow"), "features >= 2"),
            (lambda: vae(6, 2, num_components=3), "num_components"),
            (lambda: MixturePrior(2, 0), "num_components must be >= 1"),
            (lambda: MixturePrior(2, 3, min_scale=2.0), "min_scale"),
            (lambda: VampPrior(3, torch.zeros(2, 2)), "guide's kernel"),
            (lambda: VampPrior(nn.Linear(2, 2), torch.zeros(2)), "inputs must be"),
            (lambda: VampPrior(Gaussian(nn.Linear(2, 2)), torch.zeros(3, 2))(None, torch.zeros(1, 1)), "no context"),
            (lambda: FlowPrior(2, 0), "num_layers >= 1"),
        ],
    )
    def test_says_what_to_write(self, make, message):
        with pytest.raises((TypeError, ValueError), match=message):
            make()


@pytest.mark.parametrize("make", [lambda: MixturePrior(2, 12), lambda: FlowPrior(2)], ids=["mixture", "flow"])
def test_fits_three_clusters_that_a_gaussian_cannot(make):
    """By maximum likelihood, to a fifth of a nat of the truth in the case of the mixture."""
    torch.manual_seed(0)
    centres = 2.0 * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])
    z = centres[torch.arange(240) % 3] + 0.3 * torch.randn(240, 2)
    prior = make()
    optimiser = torch.optim.Adam(prior.parameters(), lr=0.03)
    for _ in range(200):
        optimiser.zero_grad()
        loss = -prior(None).log_prob(z).mean()
        loss.backward()
        optimiser.step()
    truth = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Normal(centres, 0.3).to_event(1))
    gaussian = dist.MultivariateNormal(z.mean(0), torch.cov(z.T))
    assert -float(loss.detach()) > float(gaussian.log_prob(z).mean()) + 0.5
    if isinstance(prior, MixturePrior):
        assert abs(float(loss.detach()) + float(truth.log_prob(z).mean())) < 0.2


def test_tables_with_a_prior():
    import pandas as pd

    frame = pd.DataFrame({"a": torch.randn(20).numpy(), "b": [0, 1] * 10})
    for prior in ("mixture", "flow"):
        model, guide = table_vae(frame, 2, hidden=(4,), prior=prior)
        assert ph.impute(model, guide, frame.mask(frame > 0.5), num_draws=2).frame.notna().all().all()
    with pytest.raises(ValueError, match="prior must be one of"):
        table_vae(frame, 2, prior="vamp")
