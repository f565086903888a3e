"""Chains are Pyro programs: the same as written by hand, and whatever Pyro does with a program works on them."""

import itertools

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import MCMC, NUTS, Predictive, Trace_ELBO, TraceEnum_ELBO
from torch import nn

from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.kernels import Bernoulli, Gaussian, LinearGaussian, StandardNormal, Transition, WithoutContext
from tests.chains.two_layers import data, pair, sites


class TestSameAsByHand:
    """One seed, one program written out in Pyro: equal site by site."""

    def by_hand(self, model, guide, x):
        softplus = nn.functional.softplus

        def gaussian(kernel, parent):
            loc, raw = kernel.net(parent).chunk(2, -1)
            return dist.Normal(loc, softplus(raw + kernel._shift) + kernel.min_scale).to_event(1)

        def generate():
            with pyro.plate("data", len(x), dim=-1):
                z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                z1 = pyro.sample("z1", gaussian(model.kernels["z1"], z2))
                logits = model.kernels["x"].net(z1)
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

        def infer():
            with pyro.plate("data", len(x), dim=-1):
                z1 = pyro.sample("z1", gaussian(guide.kernels["z1"], x))
                pyro.sample("z2", gaussian(guide.kernels["z2"], z1))

        return generate, infer

    def test_guide_and_replayed_model(self):
        model, guide = pair()
        x = data()
        generate, infer = self.by_hand(model, guide, x)
        pyro.set_rng_seed(3)
        ours = poutine.trace(guide).get_trace(x)
        pyro.set_rng_seed(3)
        theirs = poutine.trace(infer).get_trace()
        scored = poutine.trace(poutine.replay(model, trace=ours)).get_trace(x)
        expected = poutine.trace(poutine.replay(generate, trace=theirs)).get_trace()
        for found, wanted in ((ours, theirs), (scored, expected)):
            assert list(sites(found)) == list(sites(wanted))
            found.compute_log_prob(), wanted.compute_log_prob()
            for name in sites(found):
                torch.testing.assert_close(found.nodes[name]["value"], wanted.nodes[name]["value"])
                torch.testing.assert_close(found.nodes[name]["log_prob"], wanted.nodes[name]["log_prob"])

    def test_ancestral_sampling_and_with_particles(self):
        model, guide = pair()
        x = data()
        generate, infer = self.by_hand(model, guide, x)
        for first, second in ((lambda: guide(x), infer), (lambda: model(x), generate)):
            pyro.set_rng_seed(5)
            with pyro.plate("particles", 4, dim=-2):
                ours = poutine.trace(first).get_trace()
            pyro.set_rng_seed(5)
            with pyro.plate("particles", 4, dim=-2):
                theirs = poutine.trace(second).get_trace()
            for name in ("z1", "z2"):
                assert ours.nodes[name]["value"].shape[:2] == (4, 7)
                torch.testing.assert_close(ours.nodes[name]["value"], theirs.nodes[name]["value"])


class TestProgram:
    def test_order_names_and_return_values(self):
        model, guide = pair()
        assert model.latents == ("z2", "z1")
        assert model.observation == "x"
        assert list(model.kernels) == ["z2", "z1", "x"]
        assert model.kernels["z1"] is model.z1
        assert model(size=4).shape == (4, 5)
        x = data()
        assert model(x) is x
        assert {site: value.shape for site, value in guide(x).items()} == {"z1": (7, 3), "z2": (7, 2)}

    def test_repr_shows_the_direction_and_the_kernels(self):
        model, guide = pair()
        assert repr(model).startswith("TopDown(z2 -> z1 -> x; name='model', plate='data')")
        assert "(z2): StandardNormal(2)" in repr(model)
        assert repr(guide).startswith("BottomUp(x -> z1 -> z2;")

    def test_gradients_pass_through_the_chain(self):
        model, guide = pair()
        loss = Trace_ELBO()(model, guide)(data())
        gradients = torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])
        assert all(gradient.abs().sum() > 0 for gradient in gradients)

    def test_data_size_scales_every_site_and_draws_no_permutation(self):
        model, guide = pair()
        x = data(7)
        for program in (model, guide):
            torch.manual_seed(1)
            full = poutine.trace(program).get_trace(x)
            torch.manual_seed(1)
            mini = poutine.trace(program).get_trace(x, data_size=70)
            assert mini.nodes["data"]["value"].tolist() == list(range(7))
            for name in set(sites(full)) - {"data"}:
                assert mini.nodes[name]["scale"] == 10
                torch.testing.assert_close(mini.nodes[name]["value"], full.nodes[name]["value"])

    def test_size_is_told_by_whatever_has_rows(self):
        model = TopDown(z=StandardNormal(2), x=Bernoulli(nn.Linear(3, 5)))
        assert model(context=torch.zeros(4, 1)).shape == (4, 5)
        assert TopDown(x=StandardNormal(2))(mask=torch.ones(3, dtype=torch.bool)).shape == (3, 2)

    def test_traces_into_a_graph_without_a_synchronisation(self):
        from torch.fx.experimental.proxy_tensor import make_fx

        model, guide = pair()
        x = data()
        parameters = dict(model.named_parameters())

        def loss(values, x):
            def run():
                drawn = poutine.trace(guide).get_trace(x, data_size=70)
                return poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x, data_size=70)

            with torch.nn.utils.stateless._reparametrize_module(model, values):
                return run().log_prob_sum()

        pyro.enable_validation(False)
        try:
            with pyro.get_param_store().scope():
                graph = make_fx(loss)(parameters, x)
        finally:
            pyro.enable_validation(True)
        targets = {str(node.target) for node in graph.graph.nodes}
        assert not any("_local_scalar_dense" in target or "nonzero" in target for target in targets)
        assert any("normal" in target for target in targets)


class TestContext:
    def test_reaches_every_kernel_of_both(self):
        seen = []

        class Spy(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.width = width

            def forward(self, parent, context=None):
                seen.append(context)
                return dist.Normal(torch.zeros(len(context), self.width), 1.0).to_event(1)

        context, x = torch.randn(4, 3), torch.randn(4, 5)
        TopDown(z=Spy(2), x=Spy(5))(x, context=context)
        BottomUp(z=Spy(2))(x, context=context)
        assert len(seen) == 3
        assert all(found is context for found in seen)

    def test_conditional_prior_and_a_kernel_that_must_not_see_it(self):
        model = TopDown(z=Gaussian(nn.Linear(3, 4)), x=WithoutContext(Bernoulli(nn.Linear(2, 5))), name="conditional")
        context = torch.randn(6, 3)
        trace = poutine.trace(model).get_trace(context=context)
        torch.testing.assert_close(trace.nodes["z"]["fn"].mean, model.z.net(context)[:, :2])


class TestPyro:
    """What Pyro does with programs."""

    def test_condition_and_replay(self):
        model, _ = pair()
        z2 = torch.randn(4, 2)
        trace = poutine.trace(poutine.condition(model, {"z2": z2})).get_trace(size=4)
        assert trace.nodes["z2"]["is_observed"]
        trace = poutine.trace(model).get_trace(size=4)
        again = poutine.trace(poutine.replay(model, trace=trace)).get_trace(size=4)
        assert torch.equal(again.nodes["z1"]["value"], trace.nodes["z1"]["value"])

    @pytest.mark.parametrize("parallel", [False, True])
    def test_predictive(self, parallel):
        model, guide = pair()
        prior = Predictive(model, num_samples=6, parallel=parallel)(size=4)
        assert {site: tuple(value.shape) for site, value in prior.items()} == {
            "z2": (6, 4, 2),
            "z1": (6, 4, 3),
            "x": (6, 4, 5),
        }
        latents = Predictive(guide, num_samples=6, parallel=parallel)(data(4))
        found = Predictive(model, posterior_samples=latents, parallel=parallel)(size=4)
        assert found["x"].shape == (6, 4, 5)

    def test_render_model(self):
        model, guide = pair()
        for program, arguments in ((model, (data(),)), (guide, (data(),))):
            graph = pyro.render_model(program, model_args=arguments)
            assert "z1 -> " in graph.source or "z2 -> " in graph.source
            assert "cluster_data" in graph.source

    def test_nuts_finds_the_posterior(self):
        model = TopDown(
            z=LinearGaussian(0, 1, learn=False),
            x=LinearGaussian(1, 1, weight=torch.ones(1, 1), bias=False, scale=0.5, learn=False),
        )
        x = torch.tensor([[1.0], [-2.0]])
        mcmc = MCMC(NUTS(model), num_samples=300, warmup_steps=100, disable_progbar=True)
        mcmc.run(x)
        z = mcmc.get_samples()["z"]
        assert z.shape == (300, 2, 1)
        torch.testing.assert_close(z.mean(0), x / 1.25, rtol=0, atol=0.12)

    def test_another_plate_name(self):
        model = TopDown(z=StandardNormal(2), x=Bernoulli(nn.Linear(2, 5)), plate="images")
        frames = poutine.trace(model).get_trace(size=3).nodes["z"]["cond_indep_stack"]
        assert [frame.name for frame in frames] == ["images"]


class TestDiscreteChain:
    """p(x) = pi' P_T ... P_2 b(x): the forward algorithm, the sum over all paths, and Pyro's enumeration."""

    def model(self, learn=True):
        simplex = torch.distributions.Dirichlet
        top = simplex(torch.ones(3)).sample()
        middle = simplex(torch.ones(4)).sample((3,))
        bottom = simplex(torch.ones(2)).sample((4,))
        emission = simplex(torch.ones(5)).sample((2,))
        return TopDown(
            z3=Transition(3, probs=top, enumerate=True, learn=learn),
            z2=Transition(4, 3, probs=middle, enumerate=True, learn=learn),
            z1=Transition(2, 4, probs=bottom, enumerate=True, learn=learn),
            x=Transition(5, 2, probs=emission, learn=learn),
        )

    def forward_algorithm(self, model, x):
        message = model.z3.logits.softmax(-1)
        for site in ("z2", "z1"):
            message = message @ model.kernels[site].logits.softmax(-1)
        return (message @ model.kernels["x"].logits.softmax(-1))[x].log()

    def by_paths(self, model, x):
        tables = [kernel.logits.softmax(-1) for kernel in model.kernels.values()]
        total = torch.zeros(len(x))
        for z3, z2, z1 in itertools.product(range(3), range(4), range(2)):
            total = total + tables[0][z3] * tables[1][z3, z2] * tables[2][z2, z1] * tables[3][z1, x]
        return total.log()

    def test_evidence_and_its_gradients(self):
        model = self.model()
        x = torch.tensor([0, 3, 4, 1])
        expected = self.forward_algorithm(model, x)
        torch.testing.assert_close(self.by_paths(model, x), expected)

        def guide(x):
            pass

        found = -TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)
        torch.testing.assert_close(found, expected.sum(), rtol=0, atol=1e-10)
        parameters = list(model.parameters())
        for ours, theirs in zip(
            torch.autograd.grad(found, parameters), torch.autograd.grad(expected.sum(), parameters)
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)

    def test_samples_have_the_marginal(self):
        model = self.model(learn=False)
        x = model(size=50_000)
        found = torch.bincount(x, minlength=5) / 50_000
        torch.testing.assert_close(found, self.forward_algorithm(model, torch.arange(5)).exp(), rtol=0, atol=0.01)
