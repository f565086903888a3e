"""Missing entries leave the likelihood exactly, and the guide sees zeros there."""

import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.kernels import StandardNormal
from tests.chains.two_layers import data, pair
from tests.linear_gaussian import linear_gaussian


class TestMask:
    def test_likelihood_is_the_marginal_of_what_is_observed(self):
        case = linear_gaussian(2)
        mask = torch.rand(case.x.shape) < 0.6
        x = torch.where(mask, case.x, torch.nan)
        drawn = poutine.trace(case.exact).get_trace(x, mask=mask)
        trace = poutine.trace(poutine.replay(case.model, trace=drawn)).get_trace(x, mask=mask)
        trace.compute_log_prob()
        kernel = case.model.kernels["x"]
        normal = torch.distributions.Normal(kernel(drawn.nodes["z1"]["value"]).mean, kernel.log_scale.exp())
        expected = torch.where(mask, normal.log_prob(case.x), 0.0).sum(-1)
        torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)

    @pytest.mark.parametrize("whole", [False, True])
    def test_what_is_masked_reaches_neither_values_nor_gradients(self, whole):
        model, guide = pair()
        x = data()
        mask = torch.rand(7) < 0.5 if whole else torch.rand(x.shape) < 0.5
        entries = mask[:, None].expand_as(x) if whole else mask
        losses, gradients = [], []
        for rubbish in (torch.nan, 3.7, 0.0):
            torch.manual_seed(2)
            loss = Trace_ELBO()(model, guide)(torch.where(entries, x, rubbish), mask=mask)
            losses.append(loss)
            gradients.append(torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()]))
        assert losses[0].isfinite()
        assert losses[0] == losses[1] == losses[2]
        for first, second, third in zip(*gradients):
            assert first.isfinite().all()
            assert torch.equal(first, second)
            assert torch.equal(first, third)

    def test_guide_sees_zeros(self):
        seen = []

        class Spy(nn.Module):
            def forward(self, parent, context=None):
                seen.append(parent)
                return dist.Normal(torch.zeros(2), 1.0).to_event(1)

        x = torch.full((3, 5), 2.0)
        mask = torch.arange(15).reshape(3, 5) % 2 == 0
        BottomUp(z=Spy())(x, mask=mask)
        assert torch.equal(seen[0], 2.0 * mask)

    def test_mask_of_all_true_changes_nothing(self):
        model, _ = pair()
        x = data()
        conditioned = poutine.condition(model, {"z2": torch.randn(7, 2), "z1": torch.randn(7, 3)})
        plain = poutine.trace(conditioned).get_trace(x)
        masked = poutine.trace(conditioned).get_trace(x, mask=torch.ones_like(x, dtype=torch.bool))
        torch.testing.assert_close(plain.log_prob_sum(), masked.log_prob_sum())

    @pytest.mark.parametrize(
        "base",
        [
            lambda: dist.Beta(torch.full((5,), 0.5), 2.0),
            lambda: dist.Gamma(torch.full((5,), 0.5), 2.0),
            lambda: dist.Exponential(torch.ones(5)),
            lambda: dist.Poisson(torch.ones(5)),
            lambda: dist.Binomial(torch.full((5,), 3.0), torch.full((5,), 0.2)),
            lambda: dist.Uniform(torch.zeros(5), 2.0),
            lambda: dist.Pareto(torch.full((5,), 2.0), 1.0),
            lambda: dist.Categorical(torch.ones(5, 3)),
            lambda: dist.VonMises(torch.zeros(5), 1.0),
        ],
    )
    def test_any_factorised_likelihood_has_a_stand_in(self, base):
        class Likelihood(nn.Module):
            def forward(self, parent, context=None):
                return base().to_event(1)

        model = TopDown(z=StandardNormal(1), x=Likelihood())
        x = base().sample((4,))
        mask = torch.rand(4, 5) < 0.5
        shown = torch.where(mask, x, -(10**6)) if not x.is_floating_point() else torch.where(mask, x, torch.nan)
        trace = poutine.trace(model).get_trace(shown, mask=mask)
        trace.compute_log_prob()
        expected = torch.where(mask, base().log_prob(x), 0.0).sum(-1)
        torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)

    @pytest.mark.parametrize(
        "joint",
        [
            lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
            lambda: dist.OneHotCategorical(torch.ones(3)),
            lambda: dist.Dirichlet(torch.ones(3)),
        ],
    )
    def test_a_joint_likelihood_takes_whole_data_only(self, joint):
        class Likelihood(nn.Module):
            def forward(self, parent, context=None):
                return joint()

        model = TopDown(z=StandardNormal(1), x=Likelihood())
        x = joint().sample((4,))
        mask = torch.tensor([True, False, True, False])
        trace = poutine.trace(model).get_trace(torch.where(mask[:, None], x, torch.nan), mask=mask)
        trace.compute_log_prob()
        expected = torch.where(mask, joint().log_prob(x), 0.0)
        torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)
        with pytest.raises(ValueError, match=r"does not factorise over the last 1 dim.*mask of shape \(4,\)"):
            model(x, mask=torch.ones(4, 3, dtype=torch.bool))
