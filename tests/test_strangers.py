"""The eleven models of benchmarks/strangers.py on small data: densities of hand-written formulas, draws at once."""

import math
import sys
from pathlib import Path

import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import Gamma, HalfCauchy, HalfNormal, MultivariateNormal, Normal, Poisson

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from strangers import MODELS

DATA = {
    "arK-arK": {"K": 2, "T": 5, "y": [0.1, -0.4, 0.7, 1.2, -0.3]},
    "arma-arma11": {"T": 4, "y": [0.1, -0.4, 0.7, 1.2]},
    "eight_schools-eight_schools_noncentered": {"J": 3, "y": [28, 8, -3], "sigma": [15.0, 10.0, 16.0]},
    "garch-garch11": {"T": 4, "y": [5.1, 4.0, 6.2, 5.5], "sigma1": 0.5},
    "gp_pois_regr-gp_pois_regr": {"N": 3, "x": [-1.0, 0.0, 2.0], "k": [3, 5, 1], "y": [0.0, 0.0, 0.0]},
    "gp_pois_regr-gp_regr": {"N": 3, "x": [-1.0, 0.0, 2.0], "y": [0.3, -0.5, 1.0], "k": [0, 0, 0]},
    "hmm_example-hmm_example": {"N": 3, "K": 2, "y": [3.2, 9.0, 2.5]},
    "kilpisjarvi_mod-kilpisjarvi": {
        "N": 2,
        "x": [1.0, 2.0],
        "y": [9.0, 9.5],
        "pmualpha": 9.3,
        "psalpha": 100,
        "pmubeta": 0,
        "psbeta": 0.03,
    },
    "low_dim_gauss_mix-low_dim_gauss_mix": {"N": 3, "y": [-2.0, 3.0, 2.5]},
    "nes2000-nes": {
        "age_discrete": [1, 2, 4],
        "partyid7": [3, 5, 1],
        **{name: [1.0, 2.0, 3.0] for name in ("educ1", "gender", "income", "race_adj", "real_ideo")},
    },
    "sblrc-blr": {"N": 3, "D": 2, "X": [[1.0, 0.2], [0.3, -1.0], [0.4, 0.5]], "y": [0.3, 1.0, -0.2]},
}


def trace(name, values, count=None, only=None):
    """Trace of a model at values; with ``count`` copies of them, or of the site ``only``, along a first dim."""
    placed = poutine.Trace()
    for site, value in values.items():
        value = torch.as_tensor(value, dtype=torch.float64)
        value = value if count is None or only not in (None, site) else value.expand(count, *value.shape)
        placed.add_node(site, type="sample", name=site, value=value, is_observed=False, infer={})
    return poutine.trace(poutine.replay(MODELS[name](DATA[name]), trace=placed)).get_trace()


VALUES = {
    "arK-arK": {"alpha": 0.2, "beta": [0.3, -0.1], "sigma": 0.8},
    "arma-arma11": {"mu": 0.1, "phi": 0.5, "theta": 0.3, "sigma": 0.9},
    "eight_schools-eight_schools_noncentered": {"mu": 4.0, "tau": 3.0, "theta_trans": [0.1, 0.5, -1.0]},
    "garch-garch11": {"mu": 5.0, "alpha0": 1.0, "alpha1": 0.4, "share": 0.5},
    "gp_pois_regr-gp_pois_regr": {"rho": 5.0, "alpha": 1.5, "f_tilde": [0.3, 0.1, -0.2]},
    "gp_pois_regr-gp_regr": {"rho": 5.0, "alpha": 1.5, "sigma": 0.3},
    "hmm_example-hmm_example": {"theta1": [0.7, 0.3], "theta2": [0.2, 0.8], "low": 3.0, "gap": 6.0},
    "kilpisjarvi_mod-kilpisjarvi": {"alpha": 9.0, "beta": 0.02, "sigma": 1.1},
    "low_dim_gauss_mix-low_dim_gauss_mix": {"low": -2.0, "gap": 4.5, "sigma": [1.0, 0.7], "theta": 0.4},
    "nes2000-nes": {"beta": [1.0, 0.2, 0.1, 0.0, 0.3, -0.2, 0.1, 0.0, 0.1], "sigma": 2.0},
    "sblrc-blr": {"beta": [0.5, -0.3], "sigma": 0.9},
}


@pytest.mark.parametrize("name", MODELS)
def test_several_draws_at_once_have_the_density_of_one(name):
    single = trace(name, VALUES[name])
    together = trace(name, VALUES[name], count=3)
    single.compute_log_prob()
    together.compute_log_prob()
    for site, node in single.nodes.items():
        if "log_prob" in node:
            several = together.nodes[site]["log_prob"].expand(3)  # a flat prior's 0 has no dims
            torch.testing.assert_close(several, node["log_prob"].expand(3))


@pytest.mark.parametrize("name", MODELS)
def test_draws_of_one_site_at_once(name):
    """Others are held, as for the k-hats of layers."""
    exact = log_joint(name)
    for site in VALUES[name]:
        several = trace(name, VALUES[name], count=3, only=site)
        several.compute_log_prob()
        terms = [node["log_prob"] for node in several.nodes.values() if "log_prob" in node]
        torch.testing.assert_close(sum(term.expand(3) for term in terms), exact.expand(3))


def log_joint(name):
    return trace(name, VALUES[name]).log_prob_sum()


def test_densities_by_hand():
    v, d = VALUES["arma-arma11"], DATA["arma-arma11"]
    error, total = d["y"][0] - 0.1 - 0.5 * 0.1, Normal(0.0, 10.0).log_prob(torch.tensor(0.1))
    total = total + Normal(0.0, 2.0).log_prob(torch.tensor([0.5, 0.3])).sum()
    total = total + HalfCauchy(2.5).log_prob(torch.tensor(0.9))
    total = total + Normal(0.0, 0.9).log_prob(torch.tensor(error))
    for before, now in zip(d["y"], d["y"][1:], strict=False):
        error = now - (v["mu"] + v["phi"] * before + v["theta"] * error)
        total = total + Normal(0.0, 0.9).log_prob(torch.tensor(error))
    torch.testing.assert_close(log_joint("arma-arma11"), total)

    y = torch.tensor(DATA["garch-garch11"]["y"])
    variance, total = 0.25, math.log(0.6)
    for t in range(4):
        total = total + Normal(5.0, math.sqrt(variance)).log_prob(y[t])
        variance = 1.0 + 0.4 * (float(y[t]) - 5.0) ** 2 + 0.3 * variance
    torch.testing.assert_close(log_joint("garch-garch11"), total)

    x = torch.tensor([-1.0, 0.0, 2.0])
    covariance = 2.25 * (-((x[:, None] - x) ** 2) / 50).exp()
    prior = Gamma(25.0, 4.0).log_prob(torch.tensor(5.0)) + HalfNormal(2.0).log_prob(torch.tensor(1.5))
    y = torch.tensor([0.3, -0.5, 1.0])
    total = MultivariateNormal(torch.zeros(3), covariance + 0.3 * torch.eye(3)).log_prob(y)
    torch.testing.assert_close(
        log_joint("gp_pois_regr-gp_regr"), prior + HalfNormal(1.0).log_prob(torch.tensor(0.3)) + total
    )
    raw = torch.tensor([0.3, 0.1, -0.2])
    f = torch.linalg.cholesky(covariance + 1e-10 * torch.eye(3)) @ raw
    total = Normal(0.0, 1.0).log_prob(raw).sum() + Poisson(f.exp()).log_prob(torch.tensor([3.0, 5.0, 1.0])).sum()
    torch.testing.assert_close(log_joint("gp_pois_regr-gp_pois_regr"), prior + total)


def test_hidden_states_by_enumeration():
    y, mu = torch.tensor(DATA["hmm_example-hmm_example"]["y"]), torch.tensor([3.0, 9.0])
    rows = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    parts = []
    for a in range(2):
        for b in range(2):
            for c in range(2):
                states = torch.tensor([a, b, c])
                parts.append(rows[a, b].log() + rows[b, c].log() + Normal(mu[states], 1.0).log_prob(y).sum())
    prior = Normal(torch.tensor([3.0, 10.0]), 1.0).log_prob(mu).sum()
    torch.testing.assert_close(log_joint("hmm_example-hmm_example"), torch.stack(parts).logsumexp(0) + prior)
