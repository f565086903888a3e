r"""Check the calibration of a guide, averaged over data simulated from the model.

If :math:`(z^*, x)` is drawn from the model and :math:`z_1,\ldots,z_L` from :math:`q(z|x)=p(z|x)`, then the rank of
:math:`f(z^*)` among the :math:`f(z_l)` is uniform on 0, ..., L, for every function f, also of x.  The choice of f
determines which errors are detected:

- each coordinate of each latent, the ranks of simulation-based calibration (Talts, Betancourt, Simpson, Vehtari and
  Gelman, 2018); they detect errors of every marginal, and none between coordinates or layers;
- ``log_joint``, log p(x, z), and ``log_q``, log q(z|x): the second is the rank of the highest-density region, whose
  uniformity is the expected coverage of credible regions (not of guides that draw sites of their own, as AutoGuides do,
  where the density of the truth is unknown);
- ``tarp``, the distance to a random point, which detects any error that depends on the data (Sampling-Based Accuracy
  Testing of Posterior Estimators for General Inference, Lemos, Coogan, Hezaveh and Perreault-Levasseur, 2023);
- functions that the user passes, such as a product of two layers.

An amortised guide is evaluated on all simulated data in one pass; others are fitted to each simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hvae.arguments import check_count, check_number
from pyro_hvae.diagnostics.layers import data_first, draw_runs
from pyro_hvae.diagnostics.uniformity import Uniformity, uniformity
from pyro_hvae.problem import Layout, Problem, Run, of_pair, total

__all__ = ["JOINT", "Calibration", "calibrate"]

JOINT = ("log_joint", "log_q", "tarp")
"""Test quantities of all latents of a datum together."""

_DENSITIES = {"log_joint": "log_p", "log_q": "log_q"}
"""Attributes of a run by the name of the quantity."""

_ENTRIES = 4_000_000
"""Numbers that are compared at once."""

Quantity = Callable[[Mapping[str, Tensor], tuple], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Ranks of simulated truths among the guide's draws.

    Attributes:
        ranks: by test quantity, integers (simulations, *event_shape), 0 to ``num_draws``.
        num_draws: L.
        alpha: level of the tests, for all quantities together (Holm, 1979), down to the resolution 1 / 2001 of each;
            ``dataclasses.replace(calibration, alpha=0.05)`` tests at another.

    Raises:
        ValueError: for an ``alpha`` outside of (0, 1).
    """

    ranks: dict[str, np.ndarray]
    num_draws: int
    alpha: float = 0.01

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0.0, 1.0, ends="()")

    def tests(self) -> dict[str, Uniformity]:
        """Test each coordinate; return the tests by name (``z1[0]``)."""
        tests = {}
        for name, ranks in self.ranks.items():
            for index in np.ndindex(ranks.shape[1:]):
                label = f"{name}[{','.join(map(str, index))}]" if index else name
                tests[label] = uniformity(ranks[(slice(None), *index)], self.num_draws)
        return tests

    def failures(self) -> dict[str, str]:
        """Return the quantities whose ranks are not uniform, with the direction in words, the worst first."""
        tests = sorted(self.tests().items(), key=lambda item: item[1].p_value)
        failures = {}
        for position, (name, test) in enumerate(tests):
            level = max(self.alpha / (len(tests) - position), 1.5 / 2001)  # the resolution of a p-value
            if test.p_value >= level:
                break
            failures[name] = _in_words(name, test, level)
        return failures

    @property
    def passed(self) -> bool:
        """Whether no quantity fails."""
        return not self.failures()

    def point_bias(self) -> dict[str, tuple[float, float]]:
        """Return the asymmetry of each coordinate's ranks: (p-value, mean rank less a half, as a fraction).

        A point estimate such as the guide's mean may be good though its spread is not: it is unbiased, on average over
        data, where the ranks are symmetric (Yes, but Did It Work?: Evaluating Variational Inference, Yao, Vehtari,
        Simpson and Gelman, 2018).  The p-value is that of Wilcoxon's signed-rank test.
        """
        from scipy.stats import wilcoxon

        biases = {}
        for name, ranks in self.ranks.items():
            if name in JOINT:
                continue
            for index in np.ndindex(ranks.shape[1:]):
                label = f"{name}[{','.join(map(str, index))}]" if index else name
                centred = (ranks[(slice(None), *index)] + 0.5) / (self.num_draws + 1) - 0.5
                p_value = 1.0 if not centred.any() else float(wilcoxon(centred).pvalue)
                biases[label] = (p_value, float(centred.mean()))
        return biases

    def to_datatree(self) -> Any:
        """Return ranks as probabilities in the group ``prior_sbc``, (chain, draw, event dims), for
        ``arviz_plots.plot_ecdf_pit``; draws are simulations."""
        import xarray as xr

        values = {
            name: (
                ("chain", "draw", *(f"{name}_dim_{i}" for i in range(ranks.ndim - 1))),
                ((ranks + 0.5) / (self.num_draws + 1))[None],
            )
            for name, ranks in self.ranks.items()
        }
        data = xr.Dataset(values, attrs={"num_draws": self.num_draws})
        data = data.assign_coords(chain=[0], draw=np.arange(data.sizes["draw"]))
        return xr.DataTree.from_dict({"prior_sbc": data})

    def __str__(self) -> str:
        failures, size = self.failures(), len(next(iter(self.ranks.values())))
        head = (
            f"{size} simulations, {self.num_draws} draws each, level {self.alpha:g} for {len(self.tests())} quantities"
        )
        if not failures:
            return f"{head}: all ranks uniform"
        lines = [f"  {name}: {words}" for name, words in failures.items()]
        return "\n".join([f"{head}: {len(failures)} not uniform", *lines])


@of_pair
def calibrate(
    problem: Problem,
    *,
    num_draws: int = 99,
    num_simulations: int | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    fit: Callable[..., Any] | None = None,
    progress: bool = False,
) -> Calibration:
    r"""Run simulation-based calibration of a guide, with its expected coverage.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``, among which the observed data are; of
            these only the shape matters, since the model simulates others.
        num_draws: L >= 9 draws of the guide for each simulation.
        num_simulations: number of data sets; by default one, where the data of a plate are so many simulations (an
            amortised guide), and 100 with ``fit``.
        quantities: ``f(values, args)`` of values by site (..., N, *event) and the programs' arguments, giving (..., N).
        fit: ``fit(*args, **kwargs)`` trains and returns a guide for one simulated data set, ``guide`` if that is not
            amortised.  It should start with ``pyro.clear_param_store()`` if the guide's parameters are kept there.
        progress: show a bar over data sets.

    Returns:
        :class:`Calibration`.

    Raises:
        ValueError: for too few draws, a quantity of the wrong shape or with a name that is taken, or no simulations to
            compare (one data set without a plate over its data).

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> _ = torch.manual_seed(0)
        >>> print(calibrate(model, guide(scale=0.3), torch.zeros(500)).failures()["z"])
        draws too narrow (p < 0.001)
    """
    check_count("num_draws", num_draws)
    if num_simulations is not None:
        check_count("num_simulations", num_simulations)
    if num_draws < 9:
        raise ValueError(f"num_draws must be at least 9 for a test of ranks, got {num_draws}")
    sets = (100 if fit is not None else 1) if num_simulations is None else num_simulations
    collected: dict[str, list[Tensor]] = {}
    prior = problem.prior()
    for _ in tqdm(range(sets), disable=not progress, desc="calibrate", unit="data set"):
        simulated = problem.simulate()
        pair = simulated.problem
        if fit is not None:
            pair = pair.with_guide(fit(*pair.args, **pair.kwargs))
        with torch.no_grad():
            ranks = _Ranks(pair, prior, simulated.values, num_draws)
            by_name = ranks.of_latents() | ranks.of_densities() | {"tarp": ranks.of_distances()}
            by_name |= ranks.of_quantities(quantities or {}, taken=set(by_name))
        for name, rank in by_name.items():
            collected.setdefault(name, []).append(rank)
    joined = {name: torch.cat(parts).cpu().numpy() for name, parts in collected.items()}
    size = min(map(len, joined.values()))
    if size < 20:
        raise ValueError(
            f"only {size} simulation(s) to compare: give num_simulations, or data in a plate common to all sites, each "
            "of which is a simulation"
        )
    return Calibration(joined, num_draws)


class _Ranks:
    """Ranks of the truths of one simulated data set among the guide's draws: ``(data, *event)``.

    Of the guide's runs the draws alone are kept, and everything else is counted run by run.

    Args:
        problem: the pair, with the simulated data and the guide to test.
        prior: the model with its prior as the guide; it gives log p where the guide draws sites of its own.
        truths: the latents that the data were simulated from.
        num_draws: L.
    """

    def __init__(self, problem: Problem, prior: Problem, truths: Mapping[str, Tensor], num_draws: int) -> None:
        self.problem, self.num_draws = problem, num_draws
        # A guide with auxiliary sites, such as an AutoGuide, has no density of the truth in closed form.
        self.opaque = bool(problem.structure.auxiliary)
        evaluated = prior(*problem.args, **problem.kwargs) if self.opaque else problem
        values = {name: truths[name] for name in evaluated.structure.drawn if name in truths}
        at_truth = evaluated.run(1, values, draw_enumerated=True)
        self.draws: dict[str, Tensor] = {}
        self.densities: dict[str, _Rank] = {}
        start = 0
        for run in draw_runs(problem, num_draws):
            if not start:
                self._begin(run, at_truth, truths)
            for name in self.latent:
                part = self._laid_out(name, run.values[name], run.layout)
                if name not in self.draws:
                    self.draws[name] = part.new_empty(num_draws, *part.shape[1:])
                self.draws[name][start : start + len(part)] = part
            for label, rank in self.densities.items():
                rank.add(self._per_datum(run, _DENSITIES[label]))
            start += run.num_particles

    def _begin(self, run: Run, at_truth: Run, truths: Mapping[str, Tensor]) -> None:
        """Read the structure from the first run, and lay out the truths by it."""
        self.plates, self.latent = run.plates, run.structure.latent
        self._nesting = run.structure.max_plate_nesting
        self.truths = {name: self._laid_out(name, truths[name], Layout(self._nesting, 1))[0] for name in self.latent}
        self.size = len(self.truths[self.latent[0]]) if self.latent else 1
        for label, attribute in _DENSITIES.items():
            if label != "log_q" or not self.opaque:
                self.densities[label] = _Rank(self._per_datum(at_truth, attribute)[0])

    def _laid_out(self, name: str, value: Tensor, layout: Layout) -> Tensor:
        """Reshape a value of a site to ``(K, data, *other plates, *event)``."""
        plates = [plate for plate in self.problem.structure.sites[name].plates if plate.dim is not None]
        event_dim = self.problem.template.nodes[name]["fn"].event_dim
        placed = layout.put(value, plates, value.shape[value.dim() - event_dim :])
        return data_first(placed, plates, self.plates)

    def _per_datum(self, run: Run, attribute: str) -> Tensor:
        run = run.over(self.plates)
        return run.shaped(total(getattr(run, attribute))).reshape(run.num_particles, -1)

    def of_latents(self) -> dict[str, Tensor]:
        return {name: _rank(self.truths[name], self.draws[name]) for name in self.latent}

    def of_densities(self) -> dict[str, Tensor]:
        """Return the ranks of log p(x, z) and, where it has a closed form, of log q(z|x)."""
        return {label: rank.drawn() for label, rank in self.densities.items()}

    def of_distances(self) -> Tensor:
        """Return the ranks of the distance to a draw of the prior, each coordinate scaled by the sd of truth and draws.

        The truth counts in the sd as each draw does, since the rank is uniform only if they are exchangeable.
        """
        released, points = self.problem.released(), {}
        for name, true in self.truths.items():
            point = self._laid_out(name, released.nodes[name]["value"], Layout(self._nesting, 1))
            points[name] = point.reshape(true.shape)
        entries = sum(true[0].numel() for true in self.truths.values())
        ranks = []
        for data in torch.arange(self.size).split(_block(self.num_draws * max(1, entries))):
            distances: Any = 0.0
            for name, true in self.truths.items():
                together = torch.cat([true[data][None], self.draws[name][:, data]]).to(torch.get_default_dtype())
                together = together.reshape(*together.shape[:2], -1)
                point = points[name][data].to(together).reshape(1, *together.shape[1:])
                scale = together.std(0).clamp(min=torch.finfo(together.dtype).tiny ** 0.25)
                distances = distances + (((together - point) / scale) ** 2).sum(-1)
            ranks.append(_rank(distances[0], distances[1:]))
        return torch.cat(ranks)

    def of_quantities(self, quantities: Mapping[str, Quantity], taken: set[str]) -> dict[str, Tensor]:
        ranks = {}
        size, args = self.size, self.problem.args
        for name, quantity in quantities.items():
            if name in taken:
                raise ValueError(f"quantity {name!r} has the name of another quantity: rename it")
            true, many = quantity(self.truths, args), quantity(self.draws, args)
            if true.shape != (size,) or many.shape != (self.num_draws, size):
                raise ValueError(
                    f"quantity {name!r} must map values (..., {size}, *event) to (..., {size}), got "
                    f"{tuple(true.shape)} and {tuple(many.shape)}"
                )
            ranks[name] = _rank(true, many)
        return ranks


class _Rank:
    """Count the draws below a truth, as they come."""

    def __init__(self, true: Tensor) -> None:
        self.true = true
        self.below = torch.zeros(true.shape, dtype=torch.long, device=true.device)
        self.ties = torch.zeros_like(self.below)

    def add(self, draws: Tensor) -> None:
        self.below += (draws < self.true).sum(0)
        self.ties += (draws == self.true).sum(0)

    def drawn(self) -> Tensor:
        """Return the rank, with ties broken at random."""
        share = torch.rand(self.ties.shape, device=self.ties.device)
        return self.below + (share * (self.ties + 1)).floor().to(self.below.dtype)


def _rank(true: Tensor, draws: Tensor) -> Tensor:
    rank = _Rank(true)
    for part in draws.split(_block(true.numel())):
        rank.add(part)
    return rank.drawn()


def _block(entries: int) -> int:
    """Return how many times so many entries are held at once."""
    return max(1, _ENTRIES // max(1, entries))


def _in_words(name: str, test: Uniformity, level: float) -> str:
    p_value = "p < 0.001" if test.p_value < 0.001 else f"p = {test.p_value:.3f}"
    if name in JOINT:
        words = test.words(level)
        if name == "log_q" and test.shift != 0:
            words = "regions too small" if test.shift < 0 else "regions too large"
        elif words.startswith("draws"):
            words = "not as the truth lies"
        return f"{words} ({p_value})"
    return f"{test.words(level)} ({p_value})"
