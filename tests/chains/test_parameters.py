"""Parameters of chains: names, both ways to train them, copies, and weights with a prior."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_hvae import IWELBO, TraceELBO
from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.kernels import Bernoulli, Gaussian, LinearGaussian, StandardNormal
from pyro_hvae.nn import ConvDecoder, ConvEncoder
from tests.chains.two_layers import data, pair, sites


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
