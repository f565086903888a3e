"""``fit`` on programs whose global latents stand for more data than a batch, and what it records."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_hvae as ph
from tests.kinds.outcomes import right_or_refused

T = torch.tensor


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def adam(rate):
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


class Steps:
    """Callback that counts steps."""

    def __init__(self):
        self.count = 0

    def on_step(self, *args):
        self.count += 1


def prior():
    return pyro.sample("mu", dist.Normal(T(0.0), 10.0))


def hand_written(*args, **kwargs):
    loc = pyro.param("loc", T(0.0))
    pyro.sample("mu", dist.Normal(loc, pyro.param("sd", T(1.0), constraint=dist.constraints.positive)))


# --- the scale of global latents is not known: programs that must be refused


def plain_plate(x):
    mu = prior()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def no_plate(x):
    mu = prior()
    pyro.sample("x", dist.Normal(mu.unsqueeze(-1).expand(mu.shape + x.shape), 1.0).to_event(1), obs=x)


def one_datum_a_site(x):
    mu = prior()
    for i in pyro.plate("data", 20):
        pyro.sample(f"x{i}", dist.Normal(mu, 1.0), obs=x[i])


def plate_of_the_batch(x):
    mu = prior()
    with pyro.plate("data", 20):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def with_local_latents(x):
    mu = prior()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x):
    hand_written(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def by_factor(x):
    mu = prior()
    pyro.factor("likelihood", dist.Normal(mu.unsqueeze(-1), 1.0).log_prob(x).sum(-1))


def of_keywords(*, x):
    plain_plate(x)


def regression(covariate, x):
    mu = prior()
    slope = pyro.sample("slope", dist.Normal(T(0.0), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu + slope * covariate, 1.0), obs=x)


class BayesianLinear(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(torch.zeros(1, 1), 1.0).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def forward(self, covariate, x):
        loc = (covariate[:, None] @ self.linear.weight.transpose(-1, -2))[..., 0] + self.linear.bias
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


UNSCALED = {  # program, guide or maker of one, and what is passed to fit
    "an AutoNormal": (lambda: plain_plate, autoguide.AutoNormal, {}),
    "an AutoDiagonalNormal of a regression": (lambda: regression, autoguide.AutoDiagonalNormal, {}),
    "points": (lambda: plain_plate, autoguide.AutoDelta, {}),
    "by hand": (lambda: plain_plate, lambda model: hand_written, {}),
    "no plate": (lambda: no_plate, lambda model: hand_written, {}),
    "a site a datum": (lambda: one_datum_a_site, lambda model: hand_written, {}),
    "a plate of the batch's size": (lambda: plate_of_the_batch, autoguide.AutoNormal, {}),
    "local latents too": (lambda: with_local_latents, lambda model: local_guide, {}),
    "a factor": (lambda: by_factor, lambda model: hand_written, {}),
    "keywords": (lambda: of_keywords, autoguide.AutoNormal, {}),
    "weights of a network": (BayesianLinear, autoguide.AutoDiagonalNormal, {}),
    "a size that nobody takes": (lambda: plain_plate, autoguide.AutoNormal, {"data_size": 100}),
    "weighted bound": (lambda: plain_plate, lambda model: hand_written, {"bound": ph.IWELBO(4)}),
}


@pytest.mark.parametrize("name", UNSCALED)
def test_global_latents_of_unknown_scale_are_refused_before_a_step(name):
    build, make_guide, options = UNSCALED[name]
    model = build()
    guide, steps = make_guide(model), Steps()
    x = torch.randn(100) + 2
    data = {"keywords": {"x": x}}.get(name, x)
    if name in ("an AutoDiagonalNormal of a regression", "weights of a network"):
        data = (torch.randn(100), x)
    options = {"bound": ph.TraceELBO(), "steps": 3, "batch_size": 20, "progress": False, **options}
    with pytest.raises((ValueError, TypeError), match=r"data_size|batch_size"):
        ph.fit(model, guide, data, callbacks=[steps], **options)
    assert steps.count == 0


def test_the_default_batch_of_a_hundred_is_a_batch_too():
    with pytest.raises((ValueError, TypeError), match=r"data_size|batch_size"):
        ph.fit(plain_plate, hand_written, torch.randn(150), bound=ph.TraceELBO(), steps=1, progress=False)


def test_all_data_at_once_are_not_refused():
    """A guard: without batches the same program is right."""
    x = torch.randn(150)
    result = ph.fit(plain_plate, hand_written, x, bound=ph.TraceELBO(), steps=1, batch_size=None, progress=False)
    assert result.steps == 1


# --- data_size reaches autoguides

N, BATCH = 2000, 100


def subsampled(y, data_size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", data_size or len(y), subsample=torch.arange(len(y))):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def scaled_by_hand(y, *, data_size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)), poutine.scale(scale=(data_size or len(y)) / len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def of_two_means(y, data_size=None):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("data", data_size or len(y), subsample=torch.arange(len(y))):
        pyro.sample("y", dist.Normal(mu[..., 0] + mu[..., 1], 1.0), obs=y)
        pyro.sample("v", dist.Normal(mu[..., 0] - mu[..., 1], 1.0), obs=0 * y)


AUTOGUIDES = {
    "diagonal": (autoguide.AutoDiagonalNormal, subsampled, 1),
    "multivariate": (autoguide.AutoMultivariateNormal, subsampled, 1),
    "low rank": (autoguide.AutoLowRankMultivariateNormal, subsampled, 1),
    "scaled by hand": (autoguide.AutoNormal, scaled_by_hand, 1),
    "two means": (autoguide.AutoNormal, of_two_means, 2),
    "two means, multivariate": (autoguide.AutoMultivariateNormal, of_two_means, 2),
}


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_data_size_reaches_autoguides(name):
    family, model, size = AUTOGUIDES[name]
    y = torch.randn(N) + 1
    mean = torch.full((2,), float(y.mean()) / 2) if size == 2 else y.mean()
    guide = family(model, init_loc_fn=autoguide.init_to_value(values={"mu": mean}), init_scale=0.03)

    def sd():
        ph.fit(
            model,
            guide,
            y,
            bound=ph.TraceELBO(16),
            steps=150,
            batch_size=BATCH,
            data_size=N,
            progress=False,
            optimizer=adam(1e-2),
        )
        draws = torch.stack([guide(y[:BATCH], data_size=N)["mu"] for _ in range(500)])
        return draws.std(0).mean()

    # precision .01 + N each: of two means, y and v give each of them N (1 + 1) / 1
    right = (0.01 + size * N) ** -0.5
    right_or_refused(sd, right, 0.2 * right, names=["data_size"])


# --- autoguides that know of a subsample


def pair_of_subsample(family, global_latent, nested=False):
    def create(y):
        rows = pyro.plate("data", 60, subsample_size=12, dim=-1)
        return [rows, pyro.plate("columns", 2, dim=-2)] if nested else rows

    def model(y):
        mu = pyro.sample("mu", dist.Normal(T(0.0), 1.0)) if global_latent else 0.0
        if nested:
            rows, columns = create(y)
            with columns, rows as index:
                z = pyro.sample("z", dist.Normal(mu, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y[index].T)
        else:
            with create(y) as index:
                z = pyro.sample("z", dist.Normal(mu + torch.zeros(()), 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    options = {} if family is autoguide.AutoDelta else {"init_scale": 0.1}
    return model, family(
        model, init_loc_fn=lambda site: torch.zeros(site["fn"].shape()), create_plates=create, **options
    )


SUBSAMPLED = {
    "a global latent too": (autoguide.AutoNormal, True, False),
    "two plates": (autoguide.AutoNormal, False, True),
    "two plates and a global latent": (autoguide.AutoNormal, True, True),
    "points": (autoguide.AutoDelta, False, False),
}


@pytest.mark.parametrize("name", SUBSAMPLED)
def test_autoguides_with_plates_that_draw_a_subsample(name):
    family, global_latent, nested = SUBSAMPLED[name]
    y = torch.randn(60, 2) if nested else torch.randn(60)
    model, guide = pair_of_subsample(family, global_latent, nested)
    result = ph.fit(
        model, guide, y, bound=ph.TraceELBO(), steps=150, batch_size=None, log_every=1, optimizer=still, progress=False
    )
    v, c = (0.0 if family is autoguide.AutoDelta else 0.01), 0.5 * math.log(2 * math.pi)
    entropy = 0.0 if v == 0 else 0.5 * math.log(v) + c + 0.5
    local = y.numel() * (-2 * c - ((v + global_latent * v) + v) / 2 + entropy) - (y**2).sum() / 2
    right = -(local + global_latent * (-c - v / 2 + entropy))
    losses = T([record["loss"] for record in result.history])
    right = right / len(y)  # nats a row of what was passed
    assert (losses.mean() - right).abs() < 5 * losses.std() / len(losses) ** 0.5 + 1e-6


# --- validation of estimates from above


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class LocalGuide(PyroModule):
    def __init__(self, slope=0.5):
        super().__init__()
        self.slope = nn.Parameter(T(slope))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 0.5**0.5))


UPPER = {"cubo": ph.CUBO(2, 50), "cubo of order 1.5": ph.CUBO(1.5, 50), "eubo": ph.EUBO(50)}


@pytest.mark.parametrize("name", UPPER)
def test_validation_loss_of_an_upper_estimate_has_the_sign_of_the_loss(name):
    """With the exact posterior both are log p(x), which training makes small."""
    x, held_out = torch.full((8,), 1.3), torch.full((4,), -0.4)
    result = ph.fit(
        local_model,
        LocalGuide(),
        x,
        bound=UPPER[name],
        steps=2,
        batch_size=None,
        validation=held_out,
        validate_every=1,
        log_every=1,
        optimizer=still,
        progress=False,
    )
    losses = [record["loss"] for record in result.history if "loss" in record]
    validated = [record["validation_loss"] for record in result.history if "validation_loss" in record]
    assert losses == pytest.approx([dist.Normal(0.0, 2**0.5).log_prob(T(1.3)).item()] * len(losses))
    assert validated
    assert validated == pytest.approx([dist.Normal(0.0, 2**0.5).log_prob(T(-0.4)).item()] * len(validated))


@pytest.mark.parametrize("name", UPPER)
def test_improvement_of_an_upper_estimate_is_no_plateau(name):
    x = 2 * torch.randn(40)
    result = ph.fit(
        local_model,
        LocalGuide(0.2),
        x,
        bound=UPPER[name],
        steps=12,
        batch_size=None,
        validation=x,
        validate_every=1,
        log_every=1,
        optimizer=adam(0.01),
        schedule=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=3, threshold=0.0),
        progress=False,
    )
    rates = [record["rate"] for record in result.history if "rate" in record]
    assert rates == pytest.approx([0.01] * len(rates))


@pytest.mark.parametrize("name", UPPER)
def test_training_of_an_upper_estimate_is_not_stopped_while_it_improves(name):
    x = 2 * torch.randn(40)
    guide = LocalGuide(0.2)
    result = ph.fit(
        local_model,
        guide,
        x,
        bound=UPPER[name],
        steps=12,
        batch_size=None,
        validation=x,
        validate_every=1,
        optimizer=adam(0.01),
        callbacks=[ph.training.EarlyStopping(patience=3)],
        progress=False,
    )
    assert result.steps == 12


# --- a short last batch of programs that take no data_size

SHORT = {
    "tensor": (lambda x: x, {}),
    "tuple": (lambda x: (x,), {}),
    "mapping": (lambda x: {"x": x}, {}),
    "loader": (lambda x: torch.utils.data.DataLoader(x, batch_size=5), {}),
    "weighted bound": (lambda x: x, {"bound": ph.IWELBO(3)}),
    "pyro's loss": (lambda x: x, {"bound": pyro.infer.Trace_ELBO()}),
    "a batch of one": (lambda x: x, {"batch_size": 11}),
}


@pytest.mark.parametrize("name", SHORT)
def test_loss_of_a_short_last_batch(name):
    """The exact guide gives each of 12 data the same nats, whatever batch they come in."""
    prepare, options = SHORT[name]
    x = torch.full((12,), 1.3)
    result = ph.fit(
        local_model,
        LocalGuide(),
        prepare(x),
        **{"bound": ph.TraceELBO(), "batch_size": 5, **options},
        epochs=2,
        log_every=1,
        optimizer=still,
        progress=False,
    )
    losses = [record["loss"] for record in result.history if "loss" in record]
    assert losses == pytest.approx([-dist.Normal(0.0, 2**0.5).log_prob(T(1.3)).item()] * len(losses))


def test_step_on_a_short_last_batch():
    """Loss (x - b)^2 / 2 + const a datum: SGD on batches of 5, 5 and 2 is known in closed form."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(T(0.0))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(self.b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    model, x = Model(), torch.arange(12.0)
    ph.fit(
        model,
        guide,
        x,
        bound=ph.TraceELBO(),
        epochs=1,
        batch_size=5,
        shuffle=False,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        progress=False,
    )
    right = T(0.0)
    for batch in x.split(5):
        right = right + 0.1 * (batch.mean() - right)
    assert torch.allclose(model.b.detach(), right)
