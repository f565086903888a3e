"""Kernels: what distribution they give, how they call their network, and what they refuse."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import nn

import pyro_hvae.kernels as kernels
from pyro_hvae import IWELBO, BottomUp, TopDown
from pyro_hvae.kernels import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    Flow,
    Gaussian,
    LinearGaussian,
    NegativeBinomial,
    Poisson,
    StandardNormal,
    Transition,
    WithoutContext,
)

MEMBERS = {
    "standard normal": (lambda: StandardNormal(4), (4,)),
    "gaussian": (lambda: Gaussian(nn.Linear(3, 8)), (4,)),
    "gaussian exp": (lambda: Gaussian(nn.Linear(3, 8), scale="exp"), (4,)),
    "linear gaussian": (lambda: LinearGaussian(3, 4), (4,)),
    "linear gaussian full": (lambda: LinearGaussian(3, 4, covariance=torch.eye(4)), (4,)),
    "bernoulli": (lambda: Bernoulli(nn.Linear(3, 4)), (4,)),
    "categorical": (lambda: Categorical(nn.Linear(3, 20), num_categories=5), (4,)),
    "categorical scalar": (lambda: Categorical(nn.Linear(3, 5), event_dim=0), ()),
    "one-hot": (lambda: Categorical(nn.Linear(3, 5), event_dim=0, one_hot=True), (5,)),
    "one-hot many": (lambda: Categorical(nn.Linear(3, 20), num_categories=5, one_hot=True), (4, 5)),
    "discretised logistic": (lambda: DiscretizedLogistic(nn.Linear(3, 8)), (4,)),
    "poisson": (lambda: Poisson(nn.Linear(3, 4)), (4,)),
    "negative binomial": (lambda: NegativeBinomial(nn.Linear(3, 8)), (4,)),
}


@pytest.mark.parametrize("lead", [(6,), (5, 6), (2, 1, 6)])
@pytest.mark.parametrize("member", MEMBERS)
def test_leading_dims_are_batch_dims_and_every_parameter_gets_a_gradient(member, lead):
    make, event_shape = MEMBERS[member]
    kernel = make()
    found = kernel(torch.randn(*lead, 3))
    assert isinstance(found, TorchDistributionMixin)
    assert found.event_shape == event_shape
    if not isinstance(kernel, StandardNormal):
        assert found.batch_shape == lead
    value = found.sample()
    log_prob = found.log_prob(value)
    assert log_prob.shape == found.batch_shape
    assert log_prob.isfinite().all()
    if list(kernel.parameters()):
        log_prob.sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in kernel.parameters())


@pytest.mark.parametrize("member", MEMBERS)
def test_batch_elements_do_not_depend_on_each_other(member):
    kernel = MEMBERS[member][0]()
    parent = torch.randn(6, 3)
    value = kernel(parent).sample()
    whole = kernel(parent).expand((6,)).log_prob(value if value.shape[0] == 6 else value.expand(6, -1))
    alone = kernel(parent[2:3]).expand((1,)).log_prob(value[2:3] if value.shape[0] == 6 else value[None])
    torch.testing.assert_close(alone[0], whole[2])


class TestGaussian:
    @pytest.mark.parametrize("scale", ["softplus", "exp"])
    def test_starts_at_scale_one_where_the_network_is_zero(self, scale):
        net = nn.Linear(3, 8)
        nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
        found = Gaussian(net, scale=scale, min_scale=0.05)(torch.randn(5, 3))
        torch.testing.assert_close(found.variance, torch.ones(5, 4))
        torch.testing.assert_close(found.mean, torch.zeros(5, 4))

    @settings(max_examples=50, deadline=None)
    @given(raw=st.floats(-1e4, 1e4), scale=st.sampled_from(["softplus", "exp"]), floor=st.floats(1e-4, 0.5))
    def test_scale_stays_between_its_bounds(self, raw, scale, floor):
        net = nn.Linear(1, 2)
        nn.init.zeros_(net.weight)
        net.bias.data = torch.tensor([0.0, raw])
        sigma = Gaussian(net, scale=scale, min_scale=floor)(torch.zeros(1, 1)).base_dist.scale.item()
        assert floor * (1 - 1e-9) <= sigma
        assert sigma <= (1e4 + 2 if scale == "softplus" else (1 + 1e-9) / floor)

    def test_exp_is_the_exponential_to_second_order(self):
        net = nn.Linear(1, 2)
        nn.init.zeros_(net.weight)
        net.bias.data = torch.tensor([0.0, 0.01])
        sigma = Gaussian(net, scale="exp")(torch.zeros(1, 1)).base_dist.scale.item()
        assert abs(sigma - math.exp(0.01)) < 1e-7

    @pytest.mark.parametrize("scale", ["softplus", "exp"])
    def test_deep_untrained_stack_is_finite_in_float32(self, scale):
        value = 10 * torch.randn(64, 8, dtype=torch.float32)
        for _ in range(60):
            net = nn.Linear(8, 16, dtype=torch.float32)
            with torch.no_grad():
                net.weight.mul_(3)
                value = Gaussian(net, scale=scale)(value).sample()
        assert value.isfinite().all()

    def test_two_parameters_split_along_the_first_event_dim(self):
        net = nn.Conv2d(1, 4, 1)
        kernel = Gaussian(net, event_dim=3)
        image = torch.randn(7, 1, 5, 5)
        found = kernel(image)
        assert found.event_shape == (2, 5, 5)
        torch.testing.assert_close(found.mean, net(image)[:, :2])

    def test_refuses(self):
        with pytest.raises(ValueError, match="'softplus' or 'exp', got 'log'"):
            Gaussian(nn.Linear(1, 2), scale="log")
        with pytest.raises(ValueError, match=r"min_scale must be a number in \(0, 1\), got 1.5"):
            Gaussian(nn.Linear(1, 2), min_scale=1.5)
        with pytest.raises(ValueError, match=r"two parameters a variable.*\(4, 3\).*2 \* d wide"):
            Gaussian(nn.Linear(1, 3))(torch.zeros(4, 1))
        with pytest.raises(ValueError, match="neither a parent nor a context"):
            Gaussian(nn.Linear(1, 2))(None)
        with pytest.raises(TypeError, match=r"torch.nn.Module, got function"):
            Gaussian(lambda value: value)


class TestLinearGaussian:
    def test_is_the_normal_that_it_says(self):
        weight, bias = torch.randn(3, 2), torch.randn(3)
        root = torch.randn(3, 3)
        covariance = root @ root.T + torch.eye(3)
        kernel = LinearGaussian(2, 3, weight=weight, bias=bias, covariance=covariance)
        parent, value = torch.randn(5, 2), torch.randn(5, 3)
        expected = torch.distributions.MultivariateNormal(parent @ weight.T + bias, covariance)
        torch.testing.assert_close(kernel(parent).log_prob(value), expected.log_prob(value))
        torch.testing.assert_close(kernel.covariance, covariance)

    def test_diagonal(self):
        scale = torch.tensor([0.5, 2.0])
        kernel = LinearGaussian(1, 2, scale=scale, bias=False)
        assert kernel.bias is None
        torch.testing.assert_close(kernel.covariance, torch.diag(scale**2))
        torch.testing.assert_close(kernel(torch.zeros(3, 1)).variance, (scale**2).expand(3, 2))

    def test_begins_a_chain(self):
        kernel = LinearGaussian(0, 2, bias=torch.tensor([1.0, 2.0]))
        assert kernel(None).mean.tolist() == [1.0, 2.0]
        assert LinearGaussian(0, 2, bias=False)(None).mean.tolist() == [0.0, 0.0]

    def test_context_is_joined(self):
        weight = torch.tensor([[1.0, 10.0]])
        kernel = LinearGaussian(2, 1, weight=weight, bias=False)
        assert kernel(torch.ones(4, 3, 1), torch.ones(3, 1)).mean.flatten().tolist() == [11.0] * 12

    def test_sampled_weights_with_particles_broadcast(self):
        kernel = LinearGaussian(2, 3, bias=False)
        del kernel.weight
        kernel.weight = torch.randn(7, 1, 3, 2)
        found = kernel(torch.randn(7, 5, 2))
        assert found.batch_shape == (7, 5)

    @pytest.mark.parametrize("learn", [True, False])
    def test_learn_says_whether_it_has_parameters_and_always_saves(self, learn):
        kernel = LinearGaussian(2, 3, learn=learn)
        assert len(list(kernel.parameters())) == (3 if learn else 0)
        assert set(kernel.state_dict()) == {"weight", "bias", "log_scale"}

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"weight must have shape \(3, 2\), got \(2, 3\)"):
            LinearGaussian(2, 3, weight=torch.zeros(2, 3))
        with pytest.raises(ValueError, match="not both"):
            LinearGaussian(2, 3, covariance=torch.eye(3), scale=1.0)
        with pytest.raises(ValueError, match=r"covariance must have shape \(3, 3\), got \(2, 2\)"):
            LinearGaussian(2, 3, covariance=torch.eye(2))
        for scale in (0.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=r"scale must be a (finite )?number"):
                LinearGaussian(2, 1, scale=scale)
        with pytest.raises(ValueError, match="covariance must be symmetric"):
            LinearGaussian(2, 2, covariance=torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
        with pytest.raises(ValueError, match="covariance must be symmetric and finite"):
            LinearGaussian(2, 2, covariance=torch.full((2, 2), torch.nan))
        with pytest.raises(ValueError, match=r"positive definite; its eigenvalues are \[-1"):
            LinearGaussian(2, 2, covariance=torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


class TwoInputs(nn.Module):
    """A network that takes the context by itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, parent, context):
        return self.weight * (parent + 100 * context)


class TestContext:
    def test_is_joined_for_a_network_of_one_input(self):
        net = nn.Linear(3, 1, bias=False)
        net.weight.data = torch.tensor([[1.0, 1.0, 10.0]])
        logits = Bernoulli(net)(torch.ones(4, 5, 2), torch.ones(5, 1)).base_dist.logits
        assert logits.flatten().tolist() == [12.0] * 20

    def test_is_passed_to_a_network_of_two(self):
        logits = Bernoulli(TwoInputs())(torch.ones(5, 2), torch.ones(5, 2)).base_dist.logits
        assert logits.flatten().tolist() == [101.0] * 10

    def test_stands_for_the_parent_that_is_not_there(self):
        net = nn.Linear(2, 4)
        context = torch.randn(5, 2)
        torch.testing.assert_close(Gaussian(net)(None, context).mean, net(context)[:, :2])

    def test_can_be_kept_from_a_kernel(self):
        kernel = WithoutContext(Categorical(nn.Linear(2, 3), event_dim=0, enumerate=True))
        parent = torch.randn(5, 2)
        assert kernel.infer == {"enumerate": "parallel"}
        torch.testing.assert_close(kernel(parent, torch.randn(5, 9)).logits, kernel(parent).logits)


class TestDiscrete:
    def test_transition_looks_up_rows(self):
        probs = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
        found = Transition(2, 3, probs=probs)(torch.tensor([2, 0]))
        torch.testing.assert_close(found.probs, probs[[2, 0]])

    def test_transition_broadcasts_under_enumeration(self):
        found = Transition(2, 3)(torch.arange(3).reshape(3, 1, 1))
        assert found.batch_shape == (3, 1, 1)

    def test_enumerate_marks_the_site(self):
        assert Transition(2, enumerate=True).infer == {"enumerate": "parallel"}
        assert Transition(2).infer is None
        with pytest.raises(ValueError, match="one variable a datum, but event_dim=1"):
            Categorical(nn.Linear(2, 3), enumerate=True)

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"probs must have shape \(3, 2\), got \(2,\)"):
            Transition(2, 3, probs=torch.ones(2) / 2)
        with pytest.raises(ValueError, match="can't start a chain"):
            Transition(2, 3)(None)
        with pytest.raises(ValueError, match=r"num_(states|parents) must be at least 1"):
            Transition(0)
        for row in ([0.2, 0.9], [-0.5, 1.5], [torch.nan, 1.0], [torch.inf, 0.0]):
            with pytest.raises(ValueError, match="every row of probs must hold probabilities that sum to one; got"):
                Transition(2, 2, probs=torch.tensor([[0.5, 0.5], row]))

    def test_a_transition_of_probability_zero_stays_zero(self):
        kernel = Transition(3, probs=torch.tensor([0.25, 0.0, 0.75]))
        optimizer = torch.optim.Adam(kernel.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (-kernel(None).log_prob(torch.tensor([0, 0, 2])).sum()).backward()
            optimizer.step()
        found = kernel(None).probs
        assert found[1] == 0
        assert found[0] > 0.25

    @pytest.mark.parametrize("kernel", [Poisson, NegativeBinomial])
    def test_counts_in_float32_are_those_in_float64(self, kernel):
        """A network that yields large rates: means of 1e6, for which torch's own sums are wrong by more than .05."""
        raw = torch.tensor([1e6, 1e6, 0.1, 0.2] if kernel is NegativeBinomial else [1e6, 1e6])
        narrow, wide = (kernel(nn.Identity())(raw.to(dtype)) for dtype in (torch.float32, torch.float64))
        x = wide.mean.round() + torch.tensor([-700.0, 900.0])
        torch.testing.assert_close(narrow.log_prob(x.float()).double(), wide.log_prob(x), rtol=1e-4, atol=0)

    def test_logits_are_the_networks(self):
        net = nn.Linear(3, 4)
        parent = torch.randn(5, 3)
        torch.testing.assert_close(Bernoulli(net)(parent).base_dist.logits, net(parent))

    def test_categories_are_the_last_dim(self):
        net = nn.Linear(3, 20)
        parent = torch.randn(5, 3)
        logits = Categorical(net, num_categories=5)(parent).base_dist.logits
        torch.testing.assert_close(logits, net(parent).reshape(5, 4, 5).log_softmax(-1))

    def test_negative_binomial_mean(self):
        net = nn.Linear(3, 4)
        a, b = net(torch.ones(3)).chunk(2)
        expected = (nn.functional.softplus(a) + 1e-6) * b.exp()
        torch.testing.assert_close(NegativeBinomial(net)(torch.ones(3)).mean, expected)

    def test_grey_levels_sum_to_one(self):
        kernel = DiscretizedLogistic(nn.Linear(3, 4), num_bins=16, low=-1.0)
        levels = torch.linspace(-1, 1, 16)[:, None].expand(16, 2)
        total = kernel(torch.randn(3)).base_dist.log_prob(levels).logsumexp(0)
        torch.testing.assert_close(total, torch.zeros(2), rtol=0, atol=1e-12)


class TestFlow:
    def test_zuko_flow_is_a_kernel(self):
        validate = torch.distributions.Distribution._validate_args
        zuko = pytest.importorskip("zuko")
        torch.distributions.Distribution._validate_args = validate  # its import switches that off for everyone
        lazy = zuko.flows.NSF(2, 3, transforms=2, hidden_features=(8,))
        kernel = Flow(lazy)
        parent = torch.randn(5, 3)
        found = kernel(parent)
        assert isinstance(found, TorchDistributionMixin)
        assert found.has_rsample
        value = found.rsample()
        torch.testing.assert_close(found.log_prob(value), lazy(parent).log_prob(value))
        with pyro.plate("particles", 4, dim=-2), pyro.plate("data", 5, dim=-1):
            assert pyro.sample("z", found).shape == (4, 5, 2)

    def test_flows_in_a_chain_train(self):
        validate = torch.distributions.Distribution._validate_args
        zuko = pytest.importorskip("zuko")
        torch.distributions.Distribution._validate_args = validate
        model = TopDown(z=StandardNormal(2), x=Bernoulli(nn.Linear(2, 4)))
        guide = BottomUp(z=Flow(zuko.flows.NSF(2, 4, transforms=1, hidden_features=(8,))))
        x = torch.bernoulli(torch.full((5, 4), 0.5))
        objective = IWELBO(3)(model, guide)
        objective(x).backward()
        assert all(parameter.grad.isfinite().all() for parameter in objective.parameters())
        assert sum(parameter.grad.abs().sum() for parameter in guide.parameters()) > 0
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), IWELBO(3))
        before = [parameter.detach().clone() for parameter in guide.parameters()]
        svi.step(x)
        assert any(not torch.equal(old, new) for old, new in zip(before, guide.parameters()))

    def test_unconditional(self):
        class Lazy(nn.Module):
            def forward(self):
                return torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))

        assert Flow(Lazy())(None).event_shape == (2,)


def test_event_dim_below_zero_is_refused():
    with pytest.raises(ValueError, match="event_dim must be at least 0, got -1"):
        Bernoulli(nn.Linear(1, 1), event_dim=-1)


def test_all_is_what_the_module_offers():
    public = {name for name in vars(kernels) if name[0].isupper()}
    assert public == set(kernels.__all__)


def test_bayesian_network_inside_a_kernel_draws_its_weights():
    net = PyroModule[nn.Linear](3, 4)
    net.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))
    kernel = Bernoulli(net)
    trace = pyro.poutine.trace(kernel).get_trace(torch.randn(5, 3))
    assert trace.stochastic_nodes == ["net.weight"]
