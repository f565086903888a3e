"""Bounds of a guide's error, on Gaussian pairs of which divergences, moments and quantiles are known (oracle 13)."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyro_hvae import conjugate
from pyro_hvae.diagnostics import diagnose, posterior_error, to_datatree
from pyro_hvae.diagnostics.divergence_bounds import errors_by_chi2, errors_by_kl, total_variation_bound


def random_pairs(count, dim, spread):
    """Random guides and posteriors; the smaller ``spread``, the closer."""
    factor = torch.randn(count, dim, dim).tril(-1) * 0.5 + torch.diag_embed(0.5 + torch.rand(count, dim))
    other = factor @ (torch.eye(dim) + spread * torch.randn(count, dim, dim).tril())
    other = other * other.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    loc = torch.randn(count, dim)
    q = MultivariateNormal(loc, scale_tril=factor)
    shift = spread * (factor @ torch.randn(count, dim, 1))[..., 0]
    return q, MultivariateNormal(loc + shift, scale_tril=other)


def chi2(q, p):
    """chi-squared of p from q: E_q (p/q)^2 - 1, infinite where q's tails are too light."""
    precision = 2 * p.precision_matrix - q.precision_matrix
    light = torch.linalg.eigvalsh(precision)[..., 0] <= 0
    precision = torch.where(light[:, None, None], torch.eye(precision.shape[-1]), precision)
    linear, constant = 0.0, 0.0
    for sign, one in ((2, p), (-1, q)):
        weighted = (one.precision_matrix @ one.loc[..., None])[..., 0]
        linear = linear + sign * weighted
        constant = constant + sign * (one.loc * weighted).sum(-1)
    log = 0.5 * ((linear * torch.linalg.solve(precision, linear)).sum(-1) - constant)
    log = log + torch.logdet(p.precision_matrix) - 0.5 * torch.logdet(q.precision_matrix)
    return torch.where(light, math.inf, torch.expm1(log - 0.5 * torch.logdet(precision)))


def true_errors(q, p):
    """Distances of the means in sds of q, and sds of p in those of q, coordinate by coordinate."""
    scale = q.variance.sqrt()
    return (p.loc - q.loc).abs() / scale, p.variance.sqrt() / scale


def test_chi2_of_a_pair():
    """Oracle 3: m = .7, v = .5, guide m' = .4, s2 = .8 gives chi2/20 = .008534."""
    q, p = (MultivariateNormal(torch.tensor([[m]]), torch.tensor([[[v]]])) for m, v in ((0.4, 0.8), (0.7, 0.5)))
    torch.testing.assert_close(chi2(q, p) / 20, torch.tensor([0.008534]), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
def test_moment_bounds_are_never_violated_over_1000_gaussian_pairs(dim, spread):
    q, p = random_pairs(1000, dim, spread)
    shift, ratio = true_errors(q, p)
    for bounds in (errors_by_kl(kl_divergence(q, p)), errors_by_chi2(chi2(q, p), 3.0)):
        assert (shift <= bounds.mean_shift[:, None] + 1e-9).all()
        assert (bounds.sd_low[:, None] - 1e-9 <= ratio).all()
        assert (ratio <= bounds.sd_high[:, None] + 1e-9).all()


def test_bounds_by_kl_are_attained():
    """By a mean that is furthest off at its divergence, and by a standard deviation alone."""
    kl = 0.3
    s = math.exp(-kl)
    q, p = Normal(torch.zeros(()), s), Normal(torch.tensor(math.sqrt(1 - s**2)), 1.0)
    torch.testing.assert_close(kl_divergence(q, p), torch.tensor(kl))
    torch.testing.assert_close(errors_by_kl(torch.tensor(kl)).mean_shift, p.loc / s)
    for scale in (0.4, 0.8, 1.3, 3.0):
        q = Normal(torch.zeros(()), scale)
        bounds = errors_by_kl(kl_divergence(q, Normal(torch.zeros(()), 1.0)))
        torch.testing.assert_close(bounds.sd_high if scale < 1 else bounds.sd_low, torch.tensor(1 / scale))


@pytest.mark.parametrize("dim", [1, 2])
def test_bounds_are_within_a_factor_of_5_for_mild_pairs(dim):
    """Pairs with divergences below 0.5 nats: the larger of the two errors against its bound."""
    q, p = random_pairs(1000, dim, 0.25)
    kl = kl_divergence(q, p)
    shift, ratio = true_errors(q, p)
    bounds = errors_by_kl(kl)
    of_mean = bounds.mean_shift / shift.amax(-1)
    of_sd = torch.maximum(bounds.sd_high.log(), -bounds.sd_low.log()) / ratio.log().abs().amax(-1)
    ratios = torch.minimum(of_mean, of_sd)[kl < 0.5]
    assert len(ratios) > 800
    assert ratios.min() >= 1 - 1e-9
    assert (ratios < 5).double().mean() > 0.99
    assert ratios.median() < 2


def test_total_variation_and_quantiles_of_pairs():
    """Total variation by quadrature; the posterior's quantile between those of the guide."""
    grid = torch.linspace(-12, 12, 4001)
    for _ in range(300):
        q, p = (Normal(torch.randn(()), 0.4 + torch.rand(())) for _ in range(2))
        variation = 0.5 * (q.log_prob(grid).exp() - p.log_prob(grid).exp()).abs().sum() * (grid[1] - grid[0])
        bound = total_variation_bound(kl_divergence(q, p))
        assert variation <= bound + 1e-6
        for level in (0.1, 0.5, 0.9):
            quantile = p.icdf(torch.tensor(level))
            assert level - bound <= 0 or q.icdf(level - bound) <= quantile
            assert level + bound >= 1 or quantile <= q.icdf(level + bound)


def test_nothing_known_is_infinite():
    bounds = errors_by_kl(torch.tensor([0.0, math.inf]))
    torch.testing.assert_close(bounds.mean_shift, torch.tensor([0.0, math.inf]))
    torch.testing.assert_close(bounds.sd_low, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(bounds.sd_high, torch.tensor([1.0, math.inf]))
    torch.testing.assert_close(total_variation_bound(torch.tensor([0.0, math.inf])), torch.tensor([0.0, 1.0]))


def conjugate_truth(x, slope, scale):
    q, p = Normal(slope * x, scale), Normal(0.5 * x, 0.5**0.5)
    return q, p, kl_divergence(q, p)


@pytest.mark.parametrize("draws", [False, True], ids=["moment", "posterior draws"])
def test_bounds_of_programs_hold_for_1000_data(draws):
    slope, scale = 0.45, 0.8
    problem = conjugate_problem(slope, scale, 1000)
    latents, problem = problem.simulate()
    (x,) = problem.args
    error = posterior_error(problem, num_draws=1000, budget=1000, posterior_samples=latents if draws else None)
    q, p, kl = conjugate_truth(x, slope, scale)
    assert (error.kl >= kl).double().mean() >= 0.95
    assert (error.gaussian.mean_shift >= (p.mean - q.mean).abs() / scale).double().mean() >= 0.95
    assert (error.gaussian.sd_high >= 0.5**0.5 / scale).double().mean() >= 0.95
    assert (error.moment.mean_shift >= (p.mean - q.mean).abs() / scale).double().mean() >= 0.95
    assert (error.moment.sd_low <= 0.5**0.5 / scale).double().mean() >= 0.95
    # Estimates are near the truth, where bounds are on one side of it.
    assert (error.estimates.kl - kl).abs().median() < 0.02
    assert (error.estimates.mean_shift["z"] - ((p.mean - q.mean) / scale).numpy()).std() < 0.1
    if not draws:
        assert error.kl.median() < 0.2


def conjugate_problem(slope, scale, count):
    from pyro_hvae import Problem

    return Problem(conjugate.model, conjugate.guide(slope=slope, scale=scale))(torch.zeros(count))


def test_bounds_of_programs_over_1000_random_gaussian_pairs():
    """One problem of 1000 data, each with a posterior and a guide of its own."""
    q, p = random_pairs(1000, 2, 0.25)

    def model():
        with pyro.plate("data", 1000):
            pyro.sample("z", dist.MultivariateNormal(p.loc, scale_tril=p.scale_tril))

    def guide():
        with pyro.plate("data", 1000):
            pyro.sample("z", dist.MultivariateNormal(q.loc, scale_tril=q.scale_tril))

    error = posterior_error(model, guide, num_draws=2000, budget=3000)
    shift, ratio = true_errors(q, p)
    assert (error.kl >= kl_divergence(q, p)).all()
    assert error.kl.isfinite().double().mean() > 0.75  # others have k-hat above 0.5, and no upper side
    for bounds in (error.gaussian, error.moment):
        assert (shift <= bounds.mean_shift[:, None]).all()
        assert (ratio <= bounds.sd_high[:, None]).all()
        assert (bounds.sd_low[:, None] <= ratio).all()


def test_quantiles_of_draws():
    x = torch.tensor([0.0, 2.0])
    error = posterior_error(conjugate.model, conjugate.guide(scale=0.75), x)
    draws = Normal(0.5 * x, 0.75).sample((20_000,))
    low, high = error.quantile(draws, 0.5)
    assert ((low < 0.5 * x) & (0.5 * x < high)).all()
    assert ((high - low) < 0.6).all()
    low, high = error.quantile(draws, 0.001)
    assert (low == -math.inf).all()
    assert high.isfinite().all()
    with pytest.raises(ValueError, match="level of a quantile"):
        error.quantile(draws, 1.0)


def test_a_guide_that_is_too_narrow_has_no_bound():
    error = posterior_error(conjugate.model, conjugate.guide(scale=0.1), torch.zeros(3), budget=1000)
    assert (error.kl == math.inf).all()
    assert (error.total_variation == 1).all()
    assert "inf" in str(error)


def test_diagnose_and_the_tree_carry_the_bounds():
    x = torch.randn(20)
    guide = conjugate.guide(scale=0.75)
    report = diagnose(conjugate.model, guide, x, error={"budget": 2000})
    error = report.numbers["error"]
    assert error.kl.shape == (20,)
    (finding,) = [f for f in report.findings if "KL" in f.what]
    assert finding.level == "note"
    assert "moment" in finding.meaning
    assert "error" in report.to_json()
    tree = to_datatree(conjugate.model, guide, x, num_draws=50, error=error)
    group = tree["posterior_error"].to_dataset()
    assert group["kl"].dims == ("data",)
    torch.testing.assert_close(torch.as_tensor(group["kl"].values), error.kl)
    assert group.attrs["delta"] == 0.05


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
def test_files_carry_the_bounds(tmp_path, suffix):
    x = torch.randn(3)
    guide = conjugate.guide(scale=0.75)
    error = posterior_error(conjugate.model, guide, x, budget=500, num_draws=500)
    path = tmp_path / f"draws.{suffix}"
    tree = to_datatree(conjugate.model, guide, x, num_draws=20, error=error, path=path, chunk_size=7)
    torch.testing.assert_close(torch.as_tensor(tree["posterior_error"]["kl"].values), error.kl)
    tree.close()


def test_refusals():
    with pytest.raises(ValueError, match="num_draws must be at least 100, got 3"):
        posterior_error(conjugate.model, conjugate.guide(), torch.zeros(2), num_draws=3)
    with pytest.raises(ValueError, match="guide is None"):
        posterior_error(conjugate.model, None, torch.zeros(2))
    error = posterior_error(conjugate.model, conjugate.guide(), torch.zeros(2), budget=500, num_draws=500)
    with pytest.raises(ValueError, match=r"error has data of shape \(2,\), and the tree \(3,\)"):
        to_datatree(conjugate.model, conjugate.guide(), torch.zeros(3), num_draws=5, error=error)
