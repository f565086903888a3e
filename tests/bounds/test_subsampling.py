"""Minibatches: every estimate has the expectation of the whole data set, and what can't have it is refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hvae as ph
from tests.programs import build, gaussian, normal, slope, spread

N, B = 40, 4


def pair(x_all):
    """z ~ N(0, 1), x ~ N(z, 1), guide N(0, 1.3): the pair on which a scale inside the logarithm shows."""

    def model(x, size):
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(slope("prior", 0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, size):
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(slope("loc", 0.0), spread("sd", 1.3)).expand([len(x)]))

    return model, guide


OBJECTIVES = [
    ph.TraceELBO(10),
    ph.TraceELBO(10, "stl"),
    ph.LayerwiseELBO(10),
    ph.IWELBO(10),
    ph.IWELBO(10, "dreg"),
    ph.IWELBO(5, num_repeats=2),
    ph.VRBound(0.5, 10),
    ph.VRBound(2.0, 10),
    ph.ThermodynamicBound(10, 3),
    ph.CUBO(2, 10),
    ph.EUBO(10),
    ph.WakePhase(10),
    ph.ReweightedWakeSleep(10),
    ph.SleepPhase(10),
    ph.Regularised(ph.LayerwiseELBO(10), kl_weight=0.3),
    ph.Regularised(ph.IWELBO(10), kl_weight=0.3),
]


def run(objective, model, guide, x, size):
    """Loss and gradient in the parameters of the store, as one vector."""
    store = pyro.get_param_store()
    for value in store.values():
        value.unconstrained().grad = None
    loss = objective.loss_and_grads(model, guide, x, size)
    grads = [store[name].unconstrained().grad for name in sorted(store.keys())]
    return torch.stack([loss, *(torch.zeros(()) if g is None else g for g in grads)])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_minibatches_have_the_expectation_of_the_whole(objective):
    """Value and gradient; the minibatches are the parts of a partition, so that the data add no noise."""
    torch.manual_seed(2)
    x = 2**0.5 * torch.randn(N)
    model, guide = pair(x)
    run(objective, model, guide, x, N)
    whole = torch.stack([run(objective, model, guide, x, N) for _ in range(40)])
    parts = torch.stack(
        [torch.stack([run(objective, model, guide, part, N) for part in x.split(B)]).mean(0) for _ in range(10)]
    )
    error = (whole.var(0) / len(whole) + parts.var(0) / len(parts)).sqrt()
    assert ((whole.mean(0) - parts.mean(0)).abs() <= 5 * error + 1e-10).all()
    assert whole[:, 0].mean().abs() > 20 * error[0]


def test_the_value_itself():
    """-log p in closed form, and minibatch losses just above it on average."""
    torch.manual_seed(2)
    x = 2**0.5 * torch.randn(N)
    model, guide = pair(x)
    evidence = normal(x, 0.0, 2**0.5).sum()
    bound = ph.IWELBO(400)
    parts = torch.stack([bound.loss(model, guide, part, N) for part in x.split(B)])
    assert -0.2 < parts.mean() + evidence < 0.5
    each = torch.stack([bound.loss(model, guide, part, len(part)) for part in x.split(B)])
    torch.testing.assert_close(parts, each * 10, rtol=0.1, atol=1.0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_scale_is_a_factor(objective):
    """Under one seed a minibatch loss is N/B times the loss of the same data taken for the whole."""
    x = torch.randn(B)
    model, guide = pair(x)
    run(objective, model, guide, x, B)
    pyro.set_rng_seed(3)
    small = run(objective, model, guide, x, B)
    pyro.set_rng_seed(3)
    large = run(objective, model, guide, x, N)
    torch.testing.assert_close(large, 10 * small)


def test_all_particles_see_one_minibatch():
    """A plate that draws its own minibatch draws it once a step, for the guide, the model and all particles."""
    torch.manual_seed(2)
    x = 2**0.5 * torch.randn(N)
    seen = []

    def model():
        with pyro.plate("data", N, subsample_size=B) as index:
            seen.append(index)
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide():
        with pyro.plate("data", N, subsample_size=B) as index:
            seen.append(index)
            pyro.sample("z", dist.Normal(slope("gain", 0.5) * x[index], 0.8))

    bound = ph.IWELBO(10)
    bound.loss(model, guide)
    seen.clear()
    losses = torch.stack([bound.loss(model, guide) for _ in range(300)])
    assert len(seen) == 600
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert len({tuple(index.tolist()) for index in seen}) > 250
    evidence = normal(x, 0.0, 2**0.5).sum()
    assert (losses.mean() + evidence).abs() < 4 * losses.std() / 300**0.5 + 1.0


# Global latents


def hierarchical(size):
    def model(x):
        g = pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(slope("tie", 1.0) * g, 1.0))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    def guide(x):
        g = pyro.sample("g", dist.Normal(slope("g_loc", 0.3), spread("g_sd", 0.25)))
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(slope("z_x", 0.7) * x + 0.26 * g, spread("z_sd", 0.6)))

    return model, guide


def hybrid_by_hand(x, num_particles, size, runs):
    """log p(g) - log q(g) + N/B sum_n log mean_k w_nk(g), one g a run."""
    g = 0.3 + 0.25 * torch.randn(runs, 1, 1)
    loc = 0.7 * x + 0.26 * g
    z = loc + 0.6 * torch.randn(runs, num_particles, len(x))
    w = normal(z, g, 1.0) + normal(x, z, 0.6) - normal(z, loc, 0.6)
    inside = w.logsumexp(1) - torch.tensor(float(num_particles)).log()
    outside = (normal(g, 0.0, 1.0) - normal(g, 0.3, 0.25)).squeeze()
    return outside + size / len(x) * inside.sum(-1)


@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize("repeats", [1, 3])
def test_hybrid_bound(size, repeats):
    torch.manual_seed(4)
    x = 0.3 + torch.randn(8)
    model, guide = hierarchical(size)
    bound = ph.IWELBO(6, num_repeats=repeats, share_globals=True)
    ours = -torch.stack([bound.loss(model, guide, x) for _ in range(250)])
    expected = hybrid_by_hand(x, 6, size, 20_000)
    error = (ours.var() / len(ours) + expected.var() / len(expected)).sqrt()
    assert (ours.mean() - expected.mean()).abs() < 4 * error
    assert bound.per_datum(model, guide, x).shape == (8,)


def test_hybrid_bound_is_unbiased_under_minibatches_and_below_the_evidence():
    torch.manual_seed(4)
    x = 0.3 + torch.randn(N)
    model, guide = hierarchical(N)
    bound = ph.IWELBO(6, share_globals=True)
    run(bound, lambda x, _: model(x), lambda x, _: guide(x), x, N)
    whole = torch.stack([-bound.loss(model, guide, x) for _ in range(150)])
    parts = torch.stack([-bound.loss(model, guide, part) for _ in range(15) for part in x.split(B)])
    parts = parts.reshape(15, -1).mean(1)
    error = (whole.var() / len(whole) + parts.var() / len(parts)).sqrt()
    assert (whole.mean() - parts.mean()).abs() < 4.5 * error
    evidence = gaussian(x, 1.36 * torch.eye(N) + 1.0)
    assert whole.mean() < evidence + 4 * whole.std() / len(whole) ** 0.5
    single = torch.stack([-ph.TraceELBO(6).loss(model, guide, x) for _ in range(150)])
    assert whole.mean() > single.mean()


def test_hybrid_gradient_is_that_of_its_value():
    x = 0.3 + torch.randn(8)
    model, guide = hierarchical(40)
    bound = ph.IWELBO(6, share_globals=True)
    bound.loss(model, guide, x)
    store = pyro.get_param_store()
    leaves = {name: store[name].unconstrained() for name in store}
    pyro.set_rng_seed(3)
    bound.loss_and_grads(model, guide, x)
    for name, leaf in leaves.items():
        values = []
        for step in (1e-5, -1e-5):
            leaf.data.add_(step)
            pyro.set_rng_seed(3)
            values.append(bound.loss(model, guide, x))
            leaf.data.sub_(step)
        torch.testing.assert_close(leaf.grad, (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-6, msg=name)


def test_local_draws_that_reach_a_global_one_are_refused():
    def model(x):
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("g", dist.Normal(z.mean(), 1.0))

    def guide(x):
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x / 2, 0.7))
        pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError, match=r"'g' is outside of plate 'data' and depends on .*'z'"):
        ph.IWELBO(4, share_globals=True).loss(model, guide, torch.randn(4))


def test_share_globals_refuses_a_subsample_of_the_shared():
    """Plate "rows" encloses the weights alone, so its scale would stand beside those of the data."""

    def program(x, observed):
        with pyro.plate("rows", 6, subsample_size=3):
            w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            z = pyro.sample("z1", dist.Normal(z, 1.0))
            if observed:
                pyro.sample("x", dist.Normal(z + w.sum(), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"plate 'rows' shows 3 of 6 .* does not enclose every site of plate 'data'"):
        ph.IWELBO(4, share_globals=True).loss(lambda x: program(x, True), lambda x: program(x, False), torch.randn(5))


def test_share_globals_needs_local_latents():
    made = build("global_latent")
    with pytest.raises(ValueError, match="share_globals=True needs a plate around some of the latent sites"):
        ph.IWELBO(4, share_globals=True).loss(made.model, made.guide, *made.args)


@pytest.mark.parametrize("name", ["nested_subsampled", "global_and_local_minibatch"])
@pytest.mark.parametrize(
    "objective",
    [bound for bound in OBJECTIVES if not isinstance(bound, (ph.TraceELBO, ph.LayerwiseELBO, ph.SleepPhase))],
    ids=repr,
)
def test_partial_plates_are_refused(name, objective):
    made = build(name)
    if isinstance(objective, ph.Regularised) and "Layerwise" in repr(objective):
        assert objective.loss(made.model, made.guide, *made.args).isfinite()
        return
    with pytest.raises(ValueError, match=rf"plate '{made.refused[0]}' shows .*\(TraceELBO, LayerwiseELBO\)"):
        objective.loss(made.model, made.guide, *made.args)


def test_a_subsampled_inner_plate_would_exceed_the_evidence():
    """Why the refusal: with the scale inside of the logarithm the mean lies above log p by far more than its error."""
    torch.manual_seed(0)
    rows, columns, seen = 20, 40, 4
    a = torch.randn(rows, 1)
    x = a + 2 * torch.randn(rows, columns)
    evidence = gaussian(x, 4 * torch.eye(columns) + 1.0).sum()

    def log_weights(part, scale, runs, num_particles):
        precision = 1 + columns / 4
        loc = x.sum(-1) / 4 / precision
        draws = loc + precision**-0.5 * torch.randn(runs, num_particles, rows)
        likelihood = normal(part, draws[..., None], 2.0).sum(-1) * scale
        return normal(draws, 0.0, 1.0) + likelihood - normal(draws, loc, precision**-0.5)

    naive = []
    for _ in range(50):
        part = x[:, torch.randperm(columns)[:seen]]
        w = log_weights(part, columns / seen, 20, 100)
        naive.append((w.logsumexp(1) - torch.tensor(100.0).log()).sum(-1).mean())
    naive = torch.stack(naive)
    assert naive.mean() > evidence + 4 * naive.std() / 50**0.5
    whole = log_weights(x, 1.0, 20, 100)
    torch.testing.assert_close((whole.logsumexp(1) - torch.tensor(100.0).log()).sum(-1).mean(), evidence)
