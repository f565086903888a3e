"""Particles of flows: without an inverse, and with parameters that STL and DReG must hold."""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
import zuko

import pyro_hvae as ph

T = torch.tensor


def normal(size):
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


FLOWS = {
    "planar": lambda: transforms.Planar(2),
    "radial": lambda: transforms.Radial(2),
    "sylvester": lambda: transforms.Sylvester(2, count_transforms=2),
    "block autoregressive": lambda: transforms.block_autoregressive(2, hidden_factors=[4]),
    "spline": lambda: transforms.spline(2, count_bins=4),
    "affine autoregressive": lambda: transforms.affine_autoregressive(2, hidden_dims=[4]),
    "affine coupling": lambda: transforms.affine_coupling(2, hidden_dims=[4]),
    "spline autoregressive": lambda: transforms.spline_autoregressive(2, hidden_dims=[4], count_bins=3),
}
NO_INVERSE = list(FLOWS)[:4]


class FlowGuide(pyro.nn.PyroModule):
    def __init__(self, flow, plate=0):
        super().__init__()
        self.flow, self.plate = flow, plate

    def forward(self):
        if self.plate:
            with pyro.plate("data", self.plate):
                pyro.sample("z", dist.TransformedDistribution(normal(2), [self.flow]))
        else:
            pyro.sample("z", dist.TransformedDistribution(normal(2), [self.flow]))


def flow_log_weight(flow, draws):
    """log p - log q of draws of the flow, by the change of variables."""
    e = torch.randn(*draws, 2)
    z = flow(e)
    log_q = normal(2).log_prob(e) - flow.log_abs_det_jacobian(e, z).reshape(*draws, -1).sum(-1)
    return dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(z[..., 0] - z[..., 1], 0.7).log_prob(T(0.5)) - log_q


def flow_model(plate=0):
    def program():
        z = pyro.sample("z", normal(2))
        pyro.sample("x", dist.Normal(z[..., 0] - z[..., 1], 0.7), obs=T(0.5).expand(z.shape[:-1]))

    def in_plate():
        with pyro.plate("data", plate):
            program()

    return in_plate if plate else program


@pytest.mark.parametrize("bound", [ph.TraceELBO(8), ph.IWELBO(8)], ids=["elbo", "iwelbo"])
@pytest.mark.parametrize("name", NO_INVERSE)
def test_flows_without_an_inverse(name, bound):
    flow = FLOWS[name]()
    guide, model = FlowGuide(flow), flow_model()
    with torch.no_grad():
        truth = flow_log_weight(flow, (50_000, 8))
        if isinstance(bound, ph.IWELBO):
            truth = truth.logsumexp(1) - T(8.0).log()
        truth = truth.mean()
    values = torch.stack([bound.per_datum(model, guide) for _ in range(200)])
    assert (values.mean() - truth).abs() < 5 * values.std() / 200**0.5 + 0.02


# the block autoregressive flow maps the plane onto a bounded part of it, which can't cover the posterior
@pytest.mark.parametrize("name", [name for name in NO_INVERSE if name != "block autoregressive"])
def test_flows_without_an_inverse_have_evidence(name):
    guide = FlowGuide(FLOWS[name]())
    evidence = ph.log_evidence(flow_model(), guide, num_samples=4000)
    right = dist.Normal(0.0, (2 + 0.7**2) ** 0.5).log_prob(T(0.5))
    assert (evidence.value - right).abs() < 6 * evidence.stderr + 0.05


def flat_gradient(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros(()) if g is None else g).flatten() for g in found])


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("name", [name for name in FLOWS if name not in NO_INVERSE])
def test_gradients_of_parametric_flows(name, gradient):
    """The flows' parameters are those of a registered module, so that they can be held."""
    flow = FLOWS[name]()
    copies = 2_000  # independent estimates, as data of one plate
    guide, model = FlowGuide(flow, copies), flow_model(copies)
    if gradient == "stl":
        bound, size = ph.TraceELBO(1, "stl"), 1
    else:
        bound, size = ph.IWELBO(2, "dreg"), 2
    own, found = [], []
    for _ in range(8):
        log_weight = flow_log_weight(flow, (size, copies))
        own.append(flat_gradient(-(log_weight.logsumexp(0)).mean(), flow))
        found.append(flat_gradient(bound.differentiable_loss(model, guide) / copies, flow))
    own, found = torch.stack(own), torch.stack(found)
    error = (own.var(0) / len(own) + found.var(0) / len(found)).sqrt()
    assert own.mean(0).norm() > 5 * error.norm() or own.mean(0).norm() > 0.05
    # a sum over all parameters, in units of its own noise; each mean has 7 degrees of freedom
    assert (found.mean(0) - own.mean(0)).norm() < 4 * error.norm() + 1e-3


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_gradients_of_zuko_flows(gradient):
    torch.manual_seed(1)
    lazy = zuko.flows.MAF(2, context=3, transforms=1, hidden_features=(4,))
    model = ph.TopDown(z=ph.StandardNormal(2), x=ph.LinearGaussian(2, 3, weight=torch.ones(3, 2), scale=1.0))
    guide = ph.BottomUp(z=ph.Flow(lazy))
    x = T([[0.5, -1.0, 2.0]]).expand(2_000, 3)
    size = 1 if gradient == "stl" else 2
    bound = ph.TraceELBO(1, "stl") if gradient == "stl" else ph.IWELBO(2, "dreg")

    def log_weight():
        z, log_q = lazy(x).rsample_and_log_prob((size,))
        return normal(2).log_prob(z) + model.x(z).log_prob(x) - log_q

    own, found = [], []
    for _ in range(8):
        own.append(flat_gradient(-log_weight().logsumexp(0).mean(), lazy))
        found.append(flat_gradient(bound.differentiable_loss(model, guide, x) / len(x), lazy))
    own, found = torch.stack(own), torch.stack(found)
    error = (own.var(0) / len(own) + found.var(0) / len(found)).sqrt()
    assert own.mean(0).norm() > 5 * error.norm()
    assert (found.mean(0) - own.mean(0)).norm() < 4 * error.norm() + 1e-3
