"""Posteriors that are neither tables nor Gaussian: matched moments, gradients, and their comparison."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_hvae.factorized import compare_guides, forward_kl, reverse_kl, total_correlation


def close(actual, expected, error):
    torch.testing.assert_close(actual, torch.as_tensor(expected).to(actual), rtol=0.0, atol=error)


COUNTS = torch.tensor([2.0, 1.0, 3.0])


def conjugate(counts, flips, cells):
    """Each posterior is known, and of the family that the site's support suggests or that is named."""
    with pyro.plate("data", len(counts)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        bias = pyro.sample("bias", dist.Beta(2.0, 1.5))
        shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        level = pyro.sample("level", dist.LogNormal(torch.zeros(()), 0.7))
        pyro.sample("counts", dist.Poisson(rate), obs=counts)
        pyro.sample("flips", dist.Binomial(4, bias), obs=flips)
        pyro.sample("cells", dist.Multinomial(4, shares), obs=cells)
        pyro.sample("log", dist.Normal(level.log(), 0.7), obs=counts / 5)


FLIPS = torch.tensor([2.0, 4.0, 2.0])
CELLS = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [0.0, 1.0, 3.0]])


def test_exponential_families_are_matched_to_conjugate_posteriors():
    guide = forward_kl(conjugate, COUNTS, FLIPS, CELLS, families={"rate": "gamma"}, num_samples=20_000)
    rate, bias, shares, level = (guide.distribution(name) for name in ("rate", "bias", "shares", "level"))
    close(rate.concentration / (2 + COUNTS), torch.ones(3), 0.12)
    close(rate.rate / 2, torch.ones(3), 0.12)
    close(bias.mean, (2 + FLIPS) / 7.5, 0.01)
    close(bias.concentration1 / (2 + FLIPS), torch.ones(3), 0.12)
    expected = torch.tensor([1.0, 2.0, 3.0]) + CELLS
    close(shares.mean, expected / expected.sum(-1, keepdim=True), 0.01)
    close(shares.concentration.sum(-1) / 10, torch.ones(3), 0.12)
    close(level.base_dist.loc, COUNTS / 10, 0.03)
    close(level.base_dist.scale, math.sqrt(0.245) * torch.ones(3), 0.02)
    assert guide.khat.shape == guide.ess.shape == (3,)
    found = compare_guides(conjugate, COUNTS, FLIPS, CELLS, guides={"forward": guide}, num_samples=4000)
    assert found.how == "importance weights"
    # The posterior is a product of these families, so nothing but the noise of the match is left.
    assert (found.forward.abs() < 0.02).all()
    assert (found.reverse.abs() < 0.02).all()
    with pytest.raises(ValueError, match="at least the total correlation"):
        total_correlation(conjugate, COUNTS, FLIPS, CELLS)


def test_poisson_and_bernoulli_beside_a_continuous_site():
    def model(x):
        number = pyro.sample("number", dist.Poisson(torch.tensor(2.0)))
        side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.3)))
        shift = pyro.sample("shift", dist.Normal(0.0, 0.2))
        pyro.sample("x", dist.Normal(number + 4 * side + shift, 1.0), obs=x)

    x = torch.tensor(5.0)
    guide = forward_kl(model, x, num_samples=60_000)
    n, s = torch.arange(40.0), torch.tensor([0.0, 1.0])
    log = dist.Poisson(2.0).log_prob(n)[:, None] + torch.tensor([0.7, 0.3]).log()
    log = log + dist.Normal(n[:, None] + 4 * s, math.sqrt(1.04)).log_prob(x)
    table = (log - log.logsumexp((0, 1))).exp()
    close(guide.distribution("number").rate, (table.sum(1) * n).sum(), 0.04)
    close(guide.distribution("side").probs, table.sum(0)[1], 0.01)


class Student(nn.Module):
    def __init__(self, loc=0.0):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self):
        return dist.StudentT(4.0, self.loc, self.log_scale.exp())


def test_any_other_family_is_fitted_by_gradient():
    def model(x):
        z = pyro.sample("z", dist.StudentT(4.0, 1.0, 0.5))
        pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)

    guide = forward_kl(model, torch.tensor(0.0), families={"z": Student}, num_samples=20_000)
    close(guide.distribution("z").loc, 1.0, 0.02)
    close(guide.distribution("z").scale, 0.5, 0.02)

    # A family without closed moments also for an exact Gaussian posterior
    def gaussian():
        pyro.sample("z", dist.Normal(1.0, 0.5))

    close(forward_kl(gaussian, families={"z": Student}).distribution("z").loc, 1.0, 0.02)


def test_a_block_keeps_what_it_joins():
    """p(z, r | x) of a LogNormal-Normal pair that is Gaussian on the real line, one for each datum."""
    x = torch.tensor([0.5, -1.0])

    def model(x):
        with pyro.plate("data", 2):
            scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 1.0))
            z = pyro.sample("z", dist.Normal(scale.log(), 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = forward_kl(model, x, blocks=[("scale", "z")], num_samples=40_000)
    found = compare_guides(model, x, guides={"block": guide, "product": forward_kl(model, x)}, num_samples=5000)
    assert (found.forward[0].abs() < 0.01).all()
    # prior of (log scale, z): covariance [[1, 1], [1, 1.25]]; the posterior's precision adds 1 at z
    precision = torch.tensor([[1.0, 1.0], [1.0, 1.25]]).inverse() + torch.diag(torch.tensor([0.0, 1.0]))
    covariance = precision.inverse()
    correlation = 0.5 * (covariance.diagonal().log().sum() - covariance.logdet())
    close(found.forward[1], correlation.expand(2), 0.03)
    other = reverse_kl(model, x, blocks=[("scale", "z")], num_steps=200)
    refit = compare_guides(model, x, guides={"reverse": other}, num_samples=4000)
    assert (refit.reverse.abs() < 0.03).all()


def test_reverse_by_gradient_reaches_the_conditionals():
    """LogNormal-Normal as above: the fixed point of mean field is known on the real line."""

    def model():
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 1.0))
        pyro.sample("z", dist.Normal(0.8 * scale.log(), 0.6))

    precision = torch.tensor([[1.0, 0.8], [0.8, 1.0]]).inverse()
    guide = reverse_kl(model, num_steps=300)
    close(guide.distribution("scale").base_dist.scale, precision[0, 0] ** -0.5, 0.02)
    close(guide.distribution("z").scale, precision[1, 1] ** -0.5, 0.02)
    close(guide.distribution("z").loc, 0.0, 0.03)


def mixture():
    means = torch.tensor([[-1.6, -1.6], [1.6, 1.6]])
    parts = dist.MultivariateNormal(means, torch.tensor([[1.0, 0.7], [0.7, 1.0]]))
    pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), parts))


def test_two_modes_forward_covers_both_reverse_settles_in_one():
    forward = forward_kl(mixture, num_samples=40_000).distribution("z")
    close(forward.mean, torch.full((2,), 0.32), 0.03)
    close(forward.variance, torch.full((2,), 1.0 + 1.6**2 * (1 - 0.2**2)), 0.06)
    ends = {side: reverse_kl(mixture, start={"z": torch.full((2,), 1.6 * side)}, num_steps=300) for side in (-1, 1)}
    for side, guide in ends.items():
        q = guide.distribution("z")
        close(q.mean, torch.full((2,), 1.55 * side), 0.12)
        close(q.variance, torch.full((2,), 0.51), 0.12)  # 1/L_ii of one component
    found = compare_guides(mixture, guides={str(side): guide for side, guide in ends.items()}, num_samples=4000)
    assert found.reverse[1] < found.reverse[0]
    close(found.reverse, -torch.tensor([0.4, 0.6]).log() + 0.336, 0.06)


def test_a_proposal_too_far_is_said_to_be_and_the_result_is_a_better_one():
    def model(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.log(), 0.2), obs=x)

    def far(x):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.LogNormal(torch.tensor([0.0, 0.6]), torch.tensor([0.3, 0.15])))

    x = torch.zeros(2)
    with pytest.warns(UserWarning, match=r"k-hat of the weights is .* for 1 of 2 data: the proposal is too far"):
        first = forward_kl(model, x, proposal=far, num_samples=4000)
    assert first.khat[1] > 0.7 > first.khat[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = forward_kl(model, x, proposal=first, num_samples=4000)
        third = forward_kl(model, x, proposal=second, num_samples=4000)
    assert second.ess[1] > 3 * first.ess[1]
    close(third.distribution("z").base_dist.loc, torch.zeros(2), 0.02)


def test_comparison_is_a_dataset_and_a_table():
    def model(x):
        with pyro.plate("row", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.0, 2.0])

    def narrow(x):
        with pyro.plate("row", 2):
            pyro.sample("z", dist.Normal(x / 2, 0.2))

    found = compare_guides(model, x, guides={"product": forward_kl(model, x), "narrow": narrow}, num_samples=2000)
    data = found.to_dataset()
    assert data["reverse_kl"].dims == ("guide", "row")
    assert list(data["guide"].values) == ["product", "narrow"]
    assert abs(float(data["reverse_kl"].sel(guide="product").max())) < 1e-12
    ratio = 0.04 / 0.5
    gap = 0.5 * (ratio - 1 - math.log(ratio))
    close(found.reverse[1], torch.full((2,), gap), 4 * float(found.reverse_stderr[1].max()))
    far = 0.5 * (1 / ratio - 1 + math.log(ratio))
    close(found.forward[1], torch.full((2,), far), 4 * float(found.forward_stderr[1].max()))
    assert 0 < found.forward_stderr[1].max() < 0.3
    close(found.log_evidence, dist.Normal(0.0, math.sqrt(2)).log_prob(x), 1e-12)
    close(found.elbo, found.log_evidence - found.reverse, 1e-12)
    text = str(found)
    assert "means over 2 data" in text
    assert "total correlation 0.0000" in text
    (row,) = [line for line in text.splitlines() if line.startswith("narrow")]
    assert row.endswith("!")


def test_errors_of_a_comparison_are_those_of_its_repeats():
    def model(x):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    def wide(x):
        pyro.sample("z", dist.LogNormal(torch.tensor(0.3), 0.9))

    x = torch.tensor(1.0)
    runs = [compare_guides(model, x, guides={"wide": wide}, num_samples=400) for _ in range(100)]
    exact_reverse = 0.5 * (0.81 / 0.5 - 1 - math.log(0.81 / 0.5) + 0.04 / 0.5)
    exact_forward = 0.5 * (0.5 / 0.81 - 1 + math.log(0.81 / 0.5) + 0.04 / 0.81)
    for values, errors, exact in (
        ([r.forward[0] for r in runs], [r.forward_stderr[0] for r in runs], exact_forward),
        ([r.reverse[0] for r in runs], [r.reverse_stderr[0] for r in runs], exact_reverse),
    ):
        values, errors = torch.stack(values), torch.stack(errors)
        close(values.mean(), exact, 4 * float(values.std()) / 10)
        assert 0.8 < float(values.std() / errors.mean()) < 1.25


def test_matched_expectations_agree_to_round_off():
    guide = forward_kl(conjugate, COUNTS, FLIPS, CELLS, families={"rate": "gamma"}, num_samples=200)
    weights = torch.rand(50, 3).log_softmax(0).exp()
    values = {
        "rate": torch.rand(50, 3) * 4,
        "bias": torch.rand(50, 3),
        "shares": dist.Dirichlet(torch.full((3,), 0.2)).sample((50, 3)).clamp(min=1e-9),
    }
    for name, value in values.items():
        guide.factor(name).match(value, weights if value.dim() == 2 else weights[..., None])
    rate, bias, shares = (guide.distribution(name) for name in values)
    close(rate.mean, (weights * values["rate"]).sum(0), 1e-9)
    close(rate.concentration.digamma() - rate.rate.log(), (weights * values["rate"].log()).sum(0), 1e-9)
    total = (bias.concentration0 + bias.concentration1).digamma()
    close(bias.concentration1.digamma() - total, (weights * values["bias"].log()).sum(0), 1e-8)
    close(bias.concentration0.digamma() - total, (weights * torch.log1p(-values["bias"])).sum(0), 1e-8)
    a = shares.concentration
    expected = (weights[..., None] * values["shares"].log()).sum(0)
    close(a.digamma() - a.sum(-1, keepdim=True).digamma(), expected, 1e-7)


@pytest.mark.parametrize("size", [1, 3])
def test_a_support_with_fewer_numbers_than_entries(size):
    """Of a Cholesky factor of correlations the three free numbers are matched, alone or one factor a datum."""

    def model():
        with pyro.plate("data", size):
            pyro.sample("factor", dist.LKJCholesky(3, torch.tensor(2.0)))

    site = dist.LKJCholesky(3, torch.tensor(2.0))
    free = dist.transforms.CorrCholeskyTransform().inv(site.sample((20_000,)))
    guide = forward_kl(model, num_samples=20_000)
    normal = guide.factor("factor")
    close(normal.loc, free.mean(0).expand(size, 3), 0.03)
    close(normal.log_scale.exp(), free.std(0).expand(size, 3), 0.03)
    assert guide.distribution("factor").sample().shape == (size, 3, 3)
    for elbo in compare_guides(model, guides={"forward": guide}, num_samples=2000).elbo[0].reshape(-1):
        assert -0.2 < elbo < 0.0
