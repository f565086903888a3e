"""Programs by the convention of Pyro's SMCFilter: the same estimates, and all bounds besides."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.smcfilter import SMCFilter
from pyro.nn import PyroModule
from torch import nn

import pyro_hvae as ph
from pyro_hvae.chains import unroll
from tests.programs import PAIRS, build
from tests.state_space import Linear

Y = torch.tensor([0.5, -0.3, 1.2, 0.4], dtype=torch.float64)


class Harmonic:
    """The example of Pyro's documentation: a noisy oscillator of which the position is observed."""

    def __init__(self):
        self.A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)

    def init(self, state, initial):
        self.t = 0
        state["z"] = pyro.sample("z_init", dist.Delta(initial, event_dim=1))

    def step(self, state, y=None):
        self.t += 1
        state["z"] = pyro.sample(f"z_{self.t}", dist.Normal(state["z"].matmul(self.A), 0.6).to_event(1))
        pyro.sample(f"y_{self.t}", dist.Normal(state["z"][..., 0], 0.5), obs=y)


class HarmonicGuide:
    def __init__(self, model):
        self.A = model.A

    def init(self, state, initial):
        self.t = 0
        pyro.sample("z_init", dist.Delta(initial, event_dim=1))

    def step(self, state, y=None):
        self.t += 1
        pyro.sample(f"z_{self.t}", dist.Normal(state["z"].matmul(self.A), 0.8).to_event(1))


def exact(initial):
    """log p(y) by the Kalman filter."""
    A, mean, cov, total = Harmonic().A, initial, torch.zeros(2, 2), 0.0
    for y in Y:
        mean, cov = mean @ A, A.T @ cov @ A + 0.36 * torch.eye(2)
        spread = cov[0, 0] + 0.25
        total = total + dist.Normal(mean[0], spread.sqrt()).log_prob(y)
        gain = cov[:, 0] / spread
        mean, cov = mean + gain * (y - mean[0]), cov - torch.outer(gain, cov[0])
    return total


def test_evidence_is_kalmans_and_smcfilters():
    initial = torch.tensor([1.0, 0.0])
    model = Harmonic()
    truth = exact(initial)
    unrolled = unroll(model, HarmonicGuide(model))
    for bound in (ph.SMCBound(20, ess_threshold=0.5), ph.SMCBound(20, "multinomial", 1.0), ph.IWELBO(20)):
        ratio = torch.stack([(bound.per_datum(*unrolled, Y, initial) - truth).exp() for _ in range(100)])
        assert (ratio.mean() - 1).abs() < 4 * ratio.std() / 10
    estimates = []
    for _ in range(100):
        smc = Counting(model, HarmonicGuide(model), num_particles=20, max_plate_nesting=0)
        smc.init(initial)
        for y in Y:
            smc.step(y)
        estimates.append(smc.estimate())
    theirs = torch.stack(estimates)
    mine = torch.stack([ph.SMCBound(20).per_datum(*unrolled, Y, initial) for _ in range(100)])
    assert (theirs.mean() - mine.mean()).abs() < 4 * ((theirs.var() + mine.var()) / 100) ** 0.5


class Counting(SMCFilter):
    """Pyro's filter with the normaliser that it drops."""

    total = 0.0

    def _update_weights(self, model_trace, guide_trace):
        before = self.state._log_weights.clone()
        before = before - before.logsumexp(0)
        super()._update_weights(model_trace, guide_trace)
        increment = 0.0
        for trace, sign in ((model_trace, 1), (guide_trace, -1)):
            for site in trace.nodes.values():
                if site["type"] == "sample" and site["name"] != "particles":
                    increment = increment + sign * site["fn"].log_prob(site["value"])
        self.total = self.total + (before + increment).logsumexp(0)

    def estimate(self):
        return torch.as_tensor(self.total)


def test_without_resampling_it_is_the_importance_weighted_bound():
    model = Harmonic()
    unrolled = unroll(model, HarmonicGuide(model))
    values = []
    for bound in (ph.IWELBO(7), ph.SMCBound(7, "none")):
        torch.manual_seed(1)
        values.append(bound.per_datum(*unrolled, Y, initial=torch.ones(2)))
    torch.testing.assert_close(*values)


class Learned(PyroModule):
    """A minibatch of sequences in a plate, with parameters; y (N,) at each step."""

    def __init__(self, guide):
        super().__init__("guide" if guide else "model")
        self.guide = guide
        self.net = nn.Linear(2 if guide else 1, 1)
        self.to(torch.float64)

    def init(self, state, size):
        self.t = 0
        with pyro.plate("data", size):
            z = pyro.sample("z0", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        if not self.guide:
            state["z"] = z

    def step(self, state, y):
        self.t += 1
        with pyro.plate("data", len(y)):
            given = state["z"]
            if self.guide:
                given = torch.cat([given, y.unsqueeze(-1).expand(*given.shape[:-1], 1)], -1)
            z = pyro.sample(f"z{self.t}", dist.Normal(self.net(given), 0.7).to_event(1))
            if not self.guide:
                state["z"] = z
                pyro.sample(f"y{self.t}", dist.Normal(z[..., 0], 0.5), obs=y)


def test_modules_with_a_minibatch_train_by_the_module_route():
    model, guide = unroll(Learned(False), Learned(True))
    y = torch.randn(5, 3)
    values = []
    for bound in (ph.IWELBO(4), ph.SMCBound(4, "none")):
        torch.manual_seed(1)
        values.append(bound.per_datum(model, guide, y, 3))
    assert values[0].shape == (3,)
    torch.testing.assert_close(*values)
    ph.SMCBound(4)(model, guide)(y, 3).backward()
    assert all(p.grad is not None for program in (model, guide) for p in program.parameters())
    assert len(list(model.parameters())) == len(list(guide.parameters())) == 2


def test_what_is_refused():
    with pytest.raises(TypeError, match="the model Linear has no init and no step"):
        unroll(Linear(), Linear())
    model = Harmonic()
    unrolled = unroll(model, HarmonicGuide(model))
    with pytest.raises(ValueError, match="no list of draws"):
        ph.SMCBound(3).filter(*unrolled, Y, torch.ones(2))
    model.step = lambda state, y: state.update(c=torch.zeros(()))
    guide = HarmonicGuide(model)
    guide.step = lambda state, y: None
    with pytest.raises(ValueError, match="state 'c' is"):
        ph.SMCBound(3).per_datum(*unroll(model, guide), Y, torch.ones(2))
    assert math.isfinite(exact(torch.ones(2)))


# --- every pair of the registry: right, or refused with what is missing


@pytest.mark.parametrize(
    ("resample", "count"),
    [("systematic", 30), *(pytest.param(how, 300, marks=pytest.mark.slow) for how in ("systematic", "multinomial"))],
)
@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_is_filtered_or_refused(name, resample, count):
    """The mean of the estimates is p(x), where it is known, whether particles are resampled or not."""
    pair = build(name)
    if not all(hasattr(program, "stepwise") for program in (pair.model, pair.guide)):
        with pytest.raises(TypeError, match=r"has no method stepwise.*IWELBO"):
            ph.SMCBound(4).per_datum(pair.model, pair.guide, *pair.args, **pair.kwargs)
        return
    bound = ph.SMCBound(8, resample=resample, ess_threshold=1.0)
    plain = ph.SMCBound(8, resample="none")
    log_z = [
        torch.stack([one.per_datum(pair.model, pair.guide, *pair.args, **pair.kwargs) for _ in range(count)])
        for one in (bound, plain)
    ]
    if pair.log_evidence is not None:
        log_z.append(pair.log_evidence.expand(count, *log_z[0].shape[1:]))
    centre = log_z[-1].logsumexp(0) - math.log(count)
    first, *others = [(value - centre).exp() for value in log_z]
    for other in others:
        error = ((first.var(0) + other.var(0)) / count).sqrt()
        assert ((first.mean(0) - other.mean(0)).abs() <= 4.5 * error + 1e-9).all()
