r"""Cross-validation and held-out likelihood from draws of a guide.

Leaving datum i out of the posterior changes the weight of a draw by :math:`1/p(x_i|z)`.  ArviZ's ``loo`` starts from
draws of the posterior.  Draws of a guide also need the weight :math:`p(x, z)/q(z|x)`; without it, k-hat is small
also for a poor guide, since :math:`1/p(x_i|z)` does not depend on the guide (Bayesian Leave-One-Out Cross-Validation
for Large Data, Magnusson, Andersen, Jonasson and Vehtari, 2019).  :func:`loo` uses the right weights for a tree.

Where all latents are local to a datum, as in a VAE, the posterior without the datum is the prior, and the parameters
were still fitted to the datum: use held-out data, :func:`held_out`.

+-----------------------------+----------------------------------------------------------------------------------------+
| ArviZ function              | on a tree of ``to_datatree``                                                           |
+=============================+========================================================================================+
| summary                     | with ``kind="stats"``; R-hat and ESS of one guide's independent draws say nothing,     |
|                             | those of several guides compare the runs                                               |
+-----------------------------+----------------------------------------------------------------------------------------+
| loo_approximate_posterior,  | work, with ``lp`` and ``log_q`` of ``sample_stats`` as ``log_p`` and ``log_q``; the    |
| loo_subsample               | first is :func:`loo`                                                                   |
+-----------------------------+----------------------------------------------------------------------------------------+
| loo, loo_i, loo_metrics,    | take no weights, and the draws for the posterior's: on a tree of ``resample``          |
| loo_r2, plot_loo_pit        |                                                                                        |
+-----------------------------+----------------------------------------------------------------------------------------+
| loo_pit, loo_expectations,  | with ``log_weights`` and ``pareto_k`` of :func:`loo` (for ``loo_pit`` as datasets, a   |
| loo_score                   | variable a site), or on a tree of ``resample``                                         |
+-----------------------------+----------------------------------------------------------------------------------------+
| compare, plot_compare       | on results of :func:`loo` or :func:`held_out`, or by :func:`compare`                   |
+-----------------------------+----------------------------------------------------------------------------------------+
| plot_khat                   | on a result of :func:`loo` or :func:`held_out`                                         |
+-----------------------------+----------------------------------------------------------------------------------------+
| loo_moment_match, reloo,    | no: they need the posterior's density on flat vectors, or a wrapper that fits again;   |
| loo_kfold                   | train on a part of the data, and use :func:`held_out`                                  |
+-----------------------------+----------------------------------------------------------------------------------------+
| psense, psense_summary,     | work: prior and likelihood are scaled on the draws at hand, so for the guide, or for   |
| ``plot_psense_*``           | the posterior after ``resample``                                                       |
+-----------------------------+----------------------------------------------------------------------------------------+
| bayes_factor, plot_bf       | work (the Savage-Dickey ratio, as good as the guide's density at the point)            |
+-----------------------------+----------------------------------------------------------------------------------------+
| metrics, ``plot_ppc_*``     | work where they fit the kind of data: a rootogram takes counts, ``pava`` takes zeros   |
|                             | and ones                                                                               |
+-----------------------------+----------------------------------------------------------------------------------------+
| bayesian_r2, residual_r2    | work where the mean of the data is a (deterministic) site                              |
+-----------------------------+----------------------------------------------------------------------------------------+
| plot_lm                     | works with a covariate, a tensor among the arguments                                   |
+-----------------------------+----------------------------------------------------------------------------------------+
| hdi, eti, mode, kde,        | work; ``ecdf`` takes ``tree["posterior"].to_dataset()``                                |
| histogram, ecdf, qds        |                                                                                        |
+-----------------------------+----------------------------------------------------------------------------------------+
| kl_divergence, wasserstein  | work between trees, of two guides say                                                  |
+-----------------------------+----------------------------------------------------------------------------------------+
| plot_dist, plot_forest,     | work; the last needs the group ``prior``                                               |
| plot_ridge, plot_parallel,  |                                                                                        |
| plot_pair, plot_pair_focus  |                                                                                        |
| plot_prior_posterior        |                                                                                        |
+-----------------------------+----------------------------------------------------------------------------------------+
| plot_ecdf_pit               | works on a group of PIT values or ranks                                                |
+-----------------------------+----------------------------------------------------------------------------------------+
| rhat, rhat_nested,          | across several guides, as a comparison of the runs; of one guide they say nothing      |
| plot_rank, plot_rank_dist   |                                                                                        |
+-----------------------------+----------------------------------------------------------------------------------------+
| ess, mcse, thin, plot_ess,  | run, without use: the draws are independent                                            |
| plot_mcse, plot_autocorr,   |                                                                                        |
| plot_trace, plot_trace_dist |                                                                                        |
+-----------------------------+----------------------------------------------------------------------------------------+
| bfmi, plot_energy           | no: the energy of a Hamiltonian sampler is no quantity of a guide                      |
+-----------------------------+----------------------------------------------------------------------------------------+
| kaplan_meier,               | no, unless the data are survival times with their censoring as an argument             |
| plot_ppc_censored           |                                                                                        |
+-----------------------------+----------------------------------------------------------------------------------------+
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pyro_hvae.arguments import check_choice, check_switch
from pyro_hvae.diagnostics.arviz_versions import check_tree, elpd_data, ranked
from pyro_hvae.evidence import log_evidence
from pyro_hvae.problem import Problem, of_pair
from pyro_hvae.weights import log_mean_exp, psis

__all__ = ["compare", "held_out", "loo"]

METHODS = ("stacking", "BB-pseudo-BMA", "pseudo-BMA")


def loo(tree: Any, var_name: str | None = None) -> Any:
    r"""Run leave-one-out cross-validation with smoothed weights of a tree's draws.

    .. math:: \mathrm{elpd}_i = \log \frac{\sum_s r_{is}\,p(x_i|z_s)}{\sum_s r_{is}},\qquad
              r_{is} \propto \frac{p(x, z_s)}{q(z_s|x)\,p(x_i|z_s)},

    with :math:`p(x, z)/q(z|x) = 1` for draws of :func:`pyro_hvae.diagnostics.resample`, and ArviZ's own ``loo`` for
    those of a sampler, which depend on each other.

    Args:
        tree: of :func:`pyro_hvae.diagnostics.to_datatree`, with the groups ``log_likelihood`` and ``sample_stats``.
        var_name: the observed site, if there are several.

    Returns:
        ArviZ's ``ELPDData`` in nats, with ``elpd_i``, ``pareto_k`` and ``log_weights``; for
        ``arviz_stats.loo_pit(tree, log_weights=..., pareto_k=...)`` make datasets of the last two.  Entries whose
        log-likelihood is 0 at every draw are masked: no data, and left out.

    Raises:
        ValueError: if there is no such site, if all latents are local to a datum, in a minibatch, for a guide that is
            a point, or if every entry is masked.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_hvae.diagnostics import to_datatree
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(0.0, 0.3))
        >>> _ = torch.manual_seed(0)
        >>> result = loo(to_datatree(model, guide, torch.linspace(-1.0, 1.0, 10), num_draws=2000))
        >>> round(result.elpd, 1), bool(result.pareto_k.max() < 0.7)
        (-11.9, True)
    """
    check_tree(tree)
    likelihood = _likelihood(tree, var_name)
    data = [dim for dim in likelihood.dims if dim not in ("chain", "draw")]
    if not data:
        raise ValueError(
            f"log_likelihood of '{likelihood.name}' has no dim but the draws': its only datum can't be left out"
        )
    if tree.attrs.get("draws") == "mcmc":
        import arviz_stats

        return arviz_stats.loo(tree, pointwise=True, var_name=str(likelihood.name))
    weights = _log_ratios(tree, likelihood)
    likelihood, data = _observed(likelihood.transpose("chain", "draw", *data))
    values = torch.as_tensor(likelihood.values).double()
    flat = values.reshape(-1, *values.shape[2:])
    shape = (len(flat),) + (1,) * (flat.dim() - 1)
    ratios = torch.as_tensor(weights).double().reshape(shape) - flat
    if bool((flat.amax(0) == flat.amin(0)).all()):
        raise ValueError("every draw has the same likelihood: the guide is a point estimate, which has no weights")
    smoothed, khat = psis(ratios)
    elpd_i = (smoothed + flat).logsumexp(0)
    lppd = log_mean_exp(flat)
    pointwise = likelihood.isel(chain=0, draw=0, drop=True)
    return elpd_data(
        pointwise.copy(data=elpd_i.numpy()),
        khat.numpy(),
        (lppd - elpd_i).numpy(),
        len(flat),
        log_weights=likelihood.copy(data=smoothed.reshape(values.shape).numpy()),
        approximate=tree.attrs.get("draws") == "guide",
    )


def compare(models: Mapping[str, Any], *, method: str = "stacking", var_name: str | None = None) -> Any:
    """Rank models by their predictions of data left out or held out.

    Args:
        models: by name, trees of :func:`pyro_hvae.diagnostics.to_datatree`, whose :func:`loo` is taken, or results of
            :func:`loo` or :func:`held_out` on the same data.
        method: of the weights, ``"stacking"``, ``"BB-pseudo-BMA"`` or ``"pseudo-BMA"``, as in ``arviz_stats.compare``.
        var_name: the observed site, if there are several.

    Returns:
        ``pandas.DataFrame``, a row a model, the best first: ``elpd`` in nats, its difference to the best
        (``elpd_diff``) and that one's standard error (``dse``), ``weight``; ``warning`` where a k-hat is too large.

    Raises:
        ValueError: for fewer than two models, or as :func:`loo`.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_hvae.diagnostics import to_datatree
        >>> def at(loc):
        ...     def model(x):
        ...         z = pyro.sample("z", dist.Normal(loc, 0.1))
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        ...     return model
        >>> def guide(loc):
        ...     return lambda x: pyro.sample("z", dist.Normal(loc, 0.1))
        >>> x = torch.linspace(-1.0, 1.0, 10)
        >>> trees = {str(loc): to_datatree(at(loc), guide(loc), x, num_draws=500) for loc in (0.0, 2.0)}
        >>> list(compare(trees).index)
        ['0.0', '2.0']
    """
    import xarray as xr

    if not isinstance(models, Mapping):
        raise TypeError(f"models must be a mapping from names to trees or results of loo, got {type(models).__name__}")
    check_choice("method", method, METHODS)
    strange = [name for name, one in models.items() if not (isinstance(one, xr.DataTree) or hasattr(one, "elpd_i"))]
    if strange:
        raise TypeError(f"models {strange} are neither trees of to_datatree nor results of loo or held_out")
    if len(models) < 2:
        raise ValueError(f"a comparison takes two models or more, got {list(models)}")
    results = {name: loo(one, var_name) if isinstance(one, xr.DataTree) else one for name, one in models.items()}
    return ranked(results, method)


@of_pair
def held_out(
    problem: Problem, *, num_draws: int = 1000, chunk_size: int | None = None, progress: bool = False
) -> Any:
    r"""Compute the importance-weighted log-likelihood of held-out data, with k-hat for each, as ArviZ's result.

    .. math:: \log p(x_n) \approx \log \frac1S \sum_s \frac{p(x_n, z_s)}{q(z_s|x_n)}

    For models whose latents are all local to a datum, this is the log predictive density of a new datum given the
    trained parameters.  In expectation it is too low, by an amount that vanishes with S where k-hat is small.  Data of
    which everything is masked are left out.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``: the held-out data.
        num_draws: S a datum.
        chunk_size: draws that run at once, as in :func:`pyro_hvae.evidence.log_evidence`.
        progress: show a bar.

    Returns:
        ``ELPDData`` in nats with ``elpd_i`` and ``pareto_k``, for :func:`compare` and ``arviz_plots.plot_khat``.  Its
        ``p`` is NaN: no parameters are counted.

    Raises:
        ValueError: if some latent is shared by the data, or all data are masked.

    Reference:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016).

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> _ = torch.manual_seed(0)
        >>> held_out(model, guide(scale=1.0), torch.tensor([0.0, 2.0])).elpd_i.values.round(1)
        array([-1.3, -2.3], dtype=float32)
    """
    import xarray as xr

    check_switch("progress", progress)
    plates = problem.structure.common
    if not plates:
        raise ValueError(
            "some latent or observed site is shared by all data, so no datum has a predictive density by itself: use "
            "loo of a tree, or score new data by their posterior predictive"
        )
    evidence = log_evidence(problem, num_samples=num_draws, chunk_size=chunk_size, progress=progress)
    names = [plate.name for plate in plates]
    coords: dict[str, Any] = {plate.name: np.arange(plate.size) for plate in plates}
    value, khat = evidence.value.cpu().numpy(), evidence.khat.cpu().numpy()
    observed = _with_data(problem)
    if not observed.all():
        if not observed.any():
            raise ValueError("all data are masked, so there is nothing to predict: pass data with observed entries")
        value, khat, kept = value[observed], khat[observed], np.nonzero(observed)
        joined = "_".join(names)
        coords = {name: (joined, index) for name, index in zip(names, kept, strict=True)}
        names = [joined]
    pointwise = xr.DataArray(value, dims=names, coords=coords)
    return elpd_data(pointwise, khat, np.full(value.shape, np.nan), num_draws)


def _with_data(problem: Problem) -> np.ndarray:
    """Return which data have an observed entry: a density that is not 0 at each of some draws."""
    with torch.no_grad():
        run = problem.run(3, draw_enumerated=True)
        observed = torch.zeros(run.shape, dtype=torch.bool)
        for name, term in run.log_p.items():
            if name not in run.structure.latent:
                observed |= run.shaped(term).cpu() != 0
    return observed.any(0).numpy()


def _observed(likelihood: Any) -> tuple[Any, list[str]]:
    """Return the unmasked entries of a log-likelihood (chain, draw, ...), and their dims.

    Unmasked entries along several dims are stacked along one dim with their names joined.
    """
    masked = (likelihood == 0).all(("chain", "draw"))
    data = [str(dim) for dim in masked.dims]
    if not bool(masked.any()):
        return likelihood, data
    if bool(masked.all()):
        raise ValueError(
            f"every entry of log_likelihood of '{likelihood.name}' is masked: there are no data to leave out; pass "
            "observed ones"
        )
    (kept,) = np.nonzero(~masked.values.ravel())
    if len(data) == 1:
        return likelihood.isel({data[0]: kept}), data
    joined = "_".join(data)
    return likelihood.stack({joined: data}).isel({joined: kept}).reset_index(joined), [joined]


def _likelihood(tree: Any, var_name: str | None) -> Any:
    group = tree.children.get("log_likelihood")
    names = [] if group is None else [str(name) for name in group.data_vars]
    if var_name is None and len(names) == 1:
        var_name = names[0]
    if var_name not in names:
        raise ValueError(f"var_name {var_name!r} is none of the observed sites in log_likelihood: {names}")
    assert group is not None
    return group[var_name]


def _log_ratios(tree: Any, likelihood: Any) -> np.ndarray:
    """Return log p(x, z) - log q(z|x) of each draw up to a constant, flat."""
    if tree.attrs.get("plate_scale", 1.0) != 1.0:
        raise ValueError(
            f"the tree is of a minibatch that stands for {tree.attrs['plate_scale']:g} times as many data: leaving one "
            "out needs all data"
        )
    stats = tree.children.get("sample_stats")
    size = likelihood.sizes["chain"] * likelihood.sizes["draw"]
    if tree.attrs.get("draws") == "resampled":
        return np.zeros(size)
    if stats is None or "log_q" not in stats:
        raise ValueError(
            "the tree has no sample_stats/log_q, the density of its draws: let to_datatree make that group"
        )
    if stats["log_weight"].ndim > 2:
        raise ValueError(
            "every latent is local to a datum: left out of the posterior, a datum leaves its latents nothing but the "
            "prior. Use held_out(model, guide, new_data)"
        )
    return (stats["lp"] - stats["log_q"]).transpose("chain", "draw").values.reshape(-1)
