"""Chains are Pyro programs: the same as written by hand, and whatever Pyro does with a program works on them."""

import copy
import itertools
import pickle

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_hvae import IWELBO, TraceELBO
from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.kernels import Bernoulli, Gaussian, LinearGaussian, StandardNormal, Transition, WithoutContext
from pyro_hvae.nn import ConvDecoder, ConvEncoder
from tests.linear_gaussian import linear_gaussian


def pair(**names):
    """A two-layer model and guide over five binary variables."""
    model = TopDown(
        z2=StandardNormal(2),
        z1=Gaussian(nn.Linear(2, 6)),
        x=Bernoulli(nn.Linear(3, 5)),
        name=names.get("model", "model"),
    )
    guide = BottomUp(z1=Gaussian(nn.Linear(5, 6)), z2=Gaussian(nn.Linear(3, 4)), name=names.get("guide", "guide"))
    return model, guide


def data(size=7):
    return torch.bernoulli(torch.full((size, 5), 0.4))


def sites(trace):
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


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


class TestParameters:
    """Each parameter trains, by either route, and stands once where it is stored."""

    def steps(self, model, guide, route, x):
        before = {
            (which, name): value.detach().clone()
            for which, program in (("model", model), ("guide", guide))
            for name, value in program.named_parameters()
        }
        if route == "svi":
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceELBO())
            for _ in range(3):
                svi.step(x)
        else:
            objective = Trace_ELBO()(model, guide)
            optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
            for _ in range(3):
                optimizer.zero_grad()
                objective(x).backward()
                optimizer.step()
        after = {
            (which, name): value
            for which, program in (("model", model), ("guide", guide))
            for name, value in program.named_parameters()
        }
        assert before
        return [name for name, value in before.items() if torch.equal(value, after[name])]

    @pytest.mark.parametrize("local", [False, True])
    @pytest.mark.parametrize("route", ["svi", "module"])
    def test_all_change(self, route, local):
        with pyro.settings.context(module_local_params=local):
            assert self.steps(*pair(), route, data()) == []

    @pytest.mark.parametrize("local", [False, True])
    @pytest.mark.parametrize("route", ["svi", "module"])
    def test_plain_modules_as_kernels(self, route, local):
        class Plain(nn.Module):
            def __init__(self, width, out, family):
                super().__init__()
                self.net, self.family = nn.Linear(width, out), family

            def forward(self, parent, context=None):
                return self.family(self.net(parent)).to_event(1)

        def normal(loc):
            return dist.Normal(loc, 1.0)

        with pyro.settings.context(module_local_params=local):
            model = TopDown(z=StandardNormal(2), x=Plain(2, 5, lambda logits: dist.Bernoulli(logits=logits)))
            assert self.steps(model, BottomUp(z=Plain(5, 2, normal)), route, data()) == []

    def test_store_has_the_names_of_the_chain(self):
        model, guide = pair(guide="encoder")
        model(data()), guide(data())
        names = set(pyro.get_param_store().keys())
        assert {name.split(".")[0] for name in names} == {"model", "encoder"}
        assert "model.z1.net$$$weight" in names
        assert len(names) == len([*model.parameters(), *guide.parameters()])

    def test_two_pairs_with_two_names_train_in_one_process(self):
        first, second = pair(), pair(model="model2", guide="guide2")
        assert self.steps(*first, "svi", data()) == []
        assert self.steps(*second, "svi", data()) == []

    def test_two_pairs_with_one_name_are_refused(self):
        first, second = pair(), pair()
        assert self.steps(*first, "svi", data()) == []
        with pytest.raises(ValueError, match="param"):
            self.steps(*second, "svi", data())

    @pytest.mark.parametrize("route", ["svi", "module"])
    def test_a_kernel_shared_by_sites_is_one_child(self, route):
        step = Gaussian(nn.Linear(3, 6))
        model = TopDown(z3=StandardNormal(3), z2=step, z1=step, x=Bernoulli(nn.Linear(3, 5)))
        guide = BottomUp(z1=Gaussian(nn.Linear(5, 6)), z2=Gaussian(nn.Linear(3, 6)), z3=Gaussian(nn.Linear(3, 6)))
        assert model.z1 is model.z2
        assert set(model.state_dict()) == {"z2.net.weight", "z2.net.bias", "x.net.weight", "x.net.bias"}
        assert self.steps(model, guide, route, data()) == []

    @pytest.mark.parametrize("route", ["svi", "module"])
    def test_a_network_shared_by_kernels_is_saved_once(self, route):
        def build():
            net = nn.Linear(3, 6)
            return TopDown(z3=StandardNormal(3), z2=Gaussian(net), z1=Gaussian(net), x=Bernoulli(nn.Linear(3, 5)))

        model, other = build(), build()
        state = model.state_dict()
        assert set(state) == {"z2.net.weight", "z2.net.bias", "x.net.weight", "x.net.bias"}
        other.load_state_dict(state)
        assert torch.equal(other.z1.net.weight, model.z1.net.weight)
        assert other.z1.net is other.z2.net
        guide = BottomUp(z1=Gaussian(nn.Linear(5, 6)), z2=Gaussian(nn.Linear(3, 6)), z3=Gaussian(nn.Linear(3, 6)))
        assert self.steps(model, guide, route, data()) == []

    @pytest.mark.parametrize("route", ["svi", "module"])
    def test_a_stale_store_is_refused_or_harmless(self, route):
        pyro.param("model.z1.net$$$weight", torch.zeros(6, 2))
        if route == "svi":
            with pytest.raises(ValueError, match="clear_param_store"):
                self.steps(*pair(), route, data())
        else:
            assert self.steps(*pair(), route, data()) == []

    @pytest.mark.parametrize("route", ["svi", "module"])
    def test_convolutions_under_particles(self, route):
        model = TopDown(z=StandardNormal(3), x=Bernoulli(ConvDecoder(3, (1, 8, 8), channels=(4, 4)), event_dim=3))
        guide = BottomUp(z=Gaussian(ConvEncoder((1, 8, 8), 6, channels=(4, 4))))
        x = model(size=3).detach()
        assert x.shape == (3, 1, 8, 8)
        assert self.steps(model, guide, route, x) == []
        assert IWELBO(4).per_datum(model, guide, x).shape == (3,)

    def test_a_pickled_pair_is_the_same_program(self):
        model, guide = pickle.loads(pickle.dumps(pair()))
        assert repr(model) == repr(pair()[0])
        assert self.steps(model, guide, "module", data()) == []

    def test_a_copy_is_another_program(self):
        model, guide = copy.deepcopy(pair())
        original = copy.deepcopy(model)
        assert self.steps(model, guide, "module", data()) == []
        assert not torch.equal(original.z1.net.weight, model.z1.net.weight)

    def test_dtype_and_buffers_follow_the_module(self):
        model, _ = pair()
        assert model.to(torch.float32)(size=2).dtype == torch.float32


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


class TestBayesianWeights:
    def model(self):
        kernel = LinearGaussian(2, 3, bias=False)
        kernel.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        return TopDown(z=StandardNormal(2), x=kernel)

    def test_are_global_latents(self):
        trace = poutine.trace(self.model()).get_trace(torch.randn(5, 3), data_size=50)
        site = trace.nodes["model.x.weight"]
        assert site["value"].shape == (3, 2)
        assert [frame.name for frame in site["cond_indep_stack"]] == []
        assert site["scale"] == 1
        trace.compute_log_prob()
        mean = trace.nodes["z"]["value"] @ site["value"].T
        torch.testing.assert_close(trace.nodes["x"]["fn"].mean, mean)

    def test_with_particles(self):
        with pyro.plate("particles", 7, dim=-2):
            trace = poutine.trace(self.model()).get_trace(torch.randn(5, 3))
        assert trace.nodes["model.x.weight"]["value"].shape == (7, 1, 3, 2)
        assert trace.nodes["x"]["fn"].batch_shape == (7, 5)

    def test_weights_of_a_network(self):
        net = PyroModule[nn.Linear](2, 6)
        net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([6, 2]).to_event(2))
        model = TopDown(z2=StandardNormal(2), z1=Gaussian(net), x=Bernoulli(nn.Linear(3, 5)))
        trace = poutine.trace(model).get_trace(size=4)
        assert list(sites(trace))[:2] == ["model.z1.net.weight", "data"]

    def test_an_autoguide_and_a_chain_can_share_the_work(self):
        model = self.model()
        local = BottomUp(z=LinearGaussian(3, 2))
        weights = pyro.infer.autoguide.AutoNormal(poutine.block(model, hide=["z"]))

        class Guide(PyroModule):
            def __init__(self):
                super().__init__("guide")
                self.weights, self.local = weights, local

            def forward(self, x):
                self.weights(x)
                return self.local(x)

        x = torch.randn(5, 3)
        guide = Guide()
        guide(x)
        loss = Trace_ELBO()(model, guide)(x)
        assert loss.isfinite()


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


class TestErrors:
    """What is wrong, with the values, naming the kernel."""

    def test_a_kernel_that_does_not_fit_the_next(self):
        model = TopDown(z2=StandardNormal(2), x=Bernoulli(nn.Linear(3, 5)))
        with pytest.raises(ValueError, match=r"kernel 'x' of 'model' \(Bernoulli\).*\(7, 2\).*expects a last dim of 3"):
            model(data())

    def test_a_guide_that_does_not_fit_the_data(self):
        with pytest.raises(ValueError, match=r"kernel 'z1' of 'guide' \(Gaussian\).*\(7, 5\).*expects a last dim of 4"):
            BottomUp(z1=Gaussian(nn.Linear(4, 6)))(data())

    def test_a_likelihood_that_does_not_fit_the_data(self):
        model = TopDown(z=StandardNormal(3), x=Bernoulli(nn.Linear(3, 4)))
        with pytest.raises(ValueError, match=r"kernel 'x'.*events of shape \(4,\).*a datum has shape \(5,\)"):
            model(data())
        model = TopDown(z=StandardNormal(3), x=Bernoulli(nn.Linear(3, 5), event_dim=0))
        with pytest.raises(ValueError, match=r"kernel 'x'.*events of shape \(\).*a datum has shape \(5,\)"):
            model(data())

    def test_a_guide_of_another_width(self):
        model = TopDown(z=StandardNormal(3), x=Bernoulli(nn.Linear(3, 5)))
        guide = BottomUp(z=Gaussian(nn.Linear(5, 2)))
        trace = poutine.trace(guide).get_trace(data())
        with pytest.raises(ValueError, match=r"site 'z' holds a value of shape \(7, 1\).*shape \(3,\)"):
            poutine.replay(model, trace=trace)(data())

    def test_context_of_another_width(self):
        model = TopDown(z=StandardNormal(3), x=Bernoulli(nn.Linear(5, 5)))
        with pytest.raises(ValueError, match=r"expects a last dim of 5 \(3 \+ 4 of the context given\)"):
            model(data(), context=torch.zeros(7, 4))

    def test_dtype(self):
        with pytest.raises(ValueError, match=r"kernel 'z' of 'guide'.*torch.float32"):
            BottomUp(z=Gaussian(nn.Linear(5, 2)))(data().float())

    def test_sizes(self):
        model, guide = pair()
        with pytest.raises(ValueError, match="can't tell how many data"):
            model()
        with pytest.raises(ValueError, match="x has 7 rows where 3 are expected"):
            model(data(), size=3)
        with pytest.raises(ValueError, match="context has 2 rows where 7"):
            guide(data(), context=torch.zeros(2, 1))
        with pytest.raises(ValueError, match="at least one datum, got 0"):
            model(size=0)
        with pytest.raises(ValueError, match="size of the whole data set, got 3 for a batch of 7"):
            guide(data(), data_size=3)
        with pytest.raises(TypeError, match=r"torch.Tensor, got ndarray"):
            model(data().numpy())

    def test_masks(self):
        model, guide = pair()
        with pytest.raises(ValueError, match=r"mask must be boolean.*torch.float64"):
            model(data(), mask=torch.ones(7, 5))
        with pytest.raises(ValueError, match=r"mask must have the shape of x \(7, 5\) or \(7,\), got \(7, 4\)"):
            guide(data(), mask=torch.ones(7, 4, dtype=torch.bool))

    def test_names(self):
        with pytest.raises(ValueError, match="'forward': that is the name of an attribute of TopDown"):
            TopDown(forward=StandardNormal(2))
        with pytest.raises(ValueError, match="'data': that is the name of the plate"):
            TopDown(data=StandardNormal(2))
        with pytest.raises(ValueError, match="needs at least one kernel"):
            BottomUp()
        with pytest.raises(TypeError, match=r"kernel 'z' must be a torch.nn.Module.*got Normal"):
            TopDown(z=dist.Normal(0.0, 1.0))

    def test_a_kernel_that_gives_no_pyro_distribution(self):
        class Torch(nn.Module):
            def forward(self, parent, context=None):
                return torch.distributions.Normal(parent, 1.0)

        with pytest.raises(TypeError, match=r"kernel 'z' of 'guide' must return a Pyro distribution.*Flow"):
            BottomUp(z=Torch())(data())

    def test_an_error_that_is_not_about_shapes_passes(self):
        class Broken(nn.Module):
            def forward(self, parent, context=None):
                raise RuntimeError("out of luck")

        with pytest.raises(RuntimeError, match=r"^out of luck$"):
            BottomUp(z=Broken())(data())
