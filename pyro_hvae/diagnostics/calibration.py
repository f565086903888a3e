r"""Whether a guide's draws are as uncertain as they should be, averaged over data that the model itself makes.

If :math:`(z^*, x)` is drawn from the model and :math:`z_1,\ldots,z_L` from :math:`q(z|x)=p(z|x)`, then the rank of
:math:`f(z^*)` among the :math:`f(z_l)` is uniform on 0, ..., L, for every function f, also of x.  Which f is looked at
decides what can be seen:

- each coordinate of each latent, the ranks of simulation-based calibration (Talts, Betancourt, Simpson, Vehtari and
  Gelman, 2018); they see every marginal, and no error between coordinates or layers;
- ``log_joint``, log p(x, z), and ``log_q``, log q(z|x): the second is the rank of the highest-density region, whose
  uniformity is the expected coverage of credible regions (not of guides that draw sites of their own, as AutoGuides do,
  where the density of the truth is not known);
- ``tarp``, the distance to a random point, which sees any error that depends on the data (Sampling-Based Accuracy
  Testing of Posterior Estimators for General Inference, Lemos, Coogan, Hezaveh and Perreault-Levasseur, 2023);
- whatever the user passes, such as a product of two layers.

An amortised guide answers for all simulated data in one pass; others are fitted to each simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hvae.diagnostics.uniformity import Uniformity, uniformity
from pyro_hvae.traces import given, prior_guide, read, simulate, structure
from pyro_hvae.traces.reading import total

__all__ = ["JOINT", "Calibration", "calibrate"]

JOINT = ("log_joint", "log_q", "tarp")
"""Test quantities of all latents of a datum together."""

Quantity = Callable[[Mapping[str, Tensor], tuple], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Ranks of simulated truths among the guide's draws.

    Attributes:
        ranks: by test quantity, integers (simulations, *event_shape), 0 to ``num_draws``.
        num_draws: L.
        alpha: level of the tests, for all quantities together (Holm, 1979), down to the resolution 1 / 2001 of each.
    """

    ranks: dict[str, np.ndarray]
    num_draws: int
    alpha: float = 0.01

    def tests(self) -> dict[str, Uniformity]:
        """Test of each coordinate, by name (``z1[0]``)."""
        found = {}
        for name, ranks in self.ranks.items():
            for index in np.ndindex(ranks.shape[1:]):
                label = f"{name}[{','.join(map(str, index))}]" if index else name
                found[label] = uniformity(ranks[(slice(None), *index)], self.num_draws)
        return found

    def failures(self) -> dict[str, str]:
        """Quantities whose ranks are not uniform, with the direction in words, the worst first."""
        tests = sorted(self.tests().items(), key=lambda item: item[1].p_value)
        found = {}
        for position, (name, test) in enumerate(tests):
            level = max(self.alpha / (len(tests) - position), 1.5 / 2001)  # the resolution of a p-value
            if test.p_value >= level:
                break
            found[name] = _in_words(name, test, level)
        return found

    @property
    def passed(self) -> bool:
        """Whether no quantity fails."""
        return not self.failures()

    def point_bias(self) -> dict[str, tuple[float, float]]:
        """Asymmetry of each coordinate's ranks about the middle, (p-value, mean rank less a half, as a share).

        A point estimate such as the guide's mean may be good though its spread is not: it is unbiased, on average over
        data, where the ranks are symmetric (Yes, but Did It Work?: Evaluating Variational Inference, Yao, Vehtari,
        Simpson and Gelman, 2018).  The p-value is that of Wilcoxon's signed-rank test.
        """
        from scipy.stats import wilcoxon

        found = {}
        for name, ranks in self.ranks.items():
            if name in JOINT:
                continue
            for index in np.ndindex(ranks.shape[1:]):
                label = f"{name}[{','.join(map(str, index))}]" if index else name
                centred = (ranks[(slice(None), *index)] + 0.5) / (self.num_draws + 1) - 0.5
                p_value = 1.0 if not centred.any() else float(wilcoxon(centred).pvalue)
                found[label] = (p_value, float(centred.mean()))
        return found

    def to_datatree(self) -> Any:
        """Ranks as probabilities in the group ``prior_sbc``, (chain, draw, event dims), for
        ``arviz_plots.plot_ecdf_pit``; draws are simulations."""
        import xarray as xr

        values = {
            name: (("chain", "draw", *(f"{name}_dim_{i}" for i in range(ranks.ndim - 1))), self._shares(ranks)[None])
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

    def _shares(self, ranks: np.ndarray) -> np.ndarray:
        return (ranks + 0.5) / (self.num_draws + 1)


def calibrate(
    model: Any,
    guide: Any,
    *args: Any,
    num_draws: int = 99,
    num_simulations: int | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    fit: Callable[..., Any] | None = None,
    alpha: float = 0.01,
    progress: bool = False,
    **kwargs: Any,
) -> Calibration:
    r"""Simulation-based calibration and expected coverage of a guide.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``, among which the observed data are; of those
            only the shape matters, since the model draws others.
        num_draws: L >= 9 draws of the guide for each simulation.
        num_simulations: how many data sets; by default one, where the data of a plate are so many simulations (an
            amortised guide), and 100 with ``fit``.
        quantities: ``f(values, args)`` of values by site (..., N, *event) and the programs' arguments, giving (..., N).
        fit: ``fit(*args, **kwargs)`` trains and returns a guide for one simulated data set, ``guide`` if that is not
            amortised.  It should start with ``pyro.clear_param_store()`` if the guide's parameters are kept there.
        alpha: level of all tests together.
        progress: show a bar over data sets.

    Returns:
        :class:`Calibration`.

    Raises:
        ValueError: for too few draws, a quantity of the wrong shape or with a name that is taken, or no simulations to
            compare (one data set without a plate over its data).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def narrow(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.3))
        >>> _ = torch.manual_seed(0)
        >>> print(calibrate(model, narrow, torch.zeros(500)).failures()["z"])
        draws too narrow (p < 0.001)
    """
    if num_draws < 9:
        raise ValueError(f"num_draws must be at least 9 for ranks to say something, got {num_draws}")
    sets = (100 if fit is not None else 1) if num_simulations is None else num_simulations
    if sets < 1:
        raise ValueError(f"num_simulations must be at least 1, got {num_simulations}")
    collected: dict[str, list[Tensor]] = {}
    for _ in tqdm(range(sets), disable=not progress, desc="calibrate", unit="data set"):
        truths, new_args, new_kwargs = simulate(model, args, kwargs)
        answer = guide if fit is None else fit(*new_args, **new_kwargs)
        for name, ranks in _ranks(model, answer, truths, new_args, new_kwargs, num_draws, quantities or {}).items():
            collected.setdefault(name, []).append(ranks)
    found = {name: torch.cat(parts).cpu().numpy() for name, parts in collected.items()}
    size = min(map(len, found.values()))
    if size < 20:
        raise ValueError(
            f"only {size} simulation(s) to compare: give num_simulations, or data in a plate common to all sites, each "
            "of which is a simulation"
        )
    return Calibration(found, num_draws, alpha)


def _ranks(
    model: Any,
    guide: Any,
    truths: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    num_draws: int,
    quantities: Mapping[str, Quantity],
) -> dict[str, Tensor]:
    """Ranks of the truths of one data set among the guide's draws: (data, *event) by quantity."""
    with torch.no_grad():
        drawn = read(model, guide, args, kwargs, num_particles=num_draws)
        pair = structure(model, guide, args, dict(kwargs))
        # Of a guide with sites of its own, such as an AutoGuide, nobody knows the density of the truth.
        opaque = bool(pair.auxiliary)
        at_truth = given(model, prior_guide(model) if opaque else guide, truths, args, kwargs)
        shape = drawn.log_weights.shape[1:]
        size = shape.numel()
        found: dict[str, Tensor] = {}
        true_values, draws = {}, {}
        for name in pair.latent:
            event = truths[name].shape[truths[name].dim() - at_truth.guide_trace.nodes[name]["fn"].event_dim :]
            if truths[name].numel() != size * event.numel():
                rest = truths[name].numel() // size
                event = torch.Size([rest]) if rest * size == truths[name].numel() else event
            true_values[name] = truths[name].reshape(size, *event)
            draws[name] = drawn.values[name].reshape(num_draws, size, *event)
            found[name] = _rank(true_values[name], draws[name])
        joint = {"log_joint": tuple(total(reading.log_p) for reading in (at_truth, drawn))}
        if not opaque:
            joint["log_q"] = tuple(total(reading.log_q) for reading in (at_truth, drawn))
        for name, (true, many) in joint.items():
            found[name] = _rank(
                true.expand(1, *shape).reshape(size), many.expand(num_draws, *shape).reshape(num_draws, size)
            )
        points = simulate(model, args, kwargs)[0]
        found["tarp"] = _rank(*_distances(true_values, draws, points))
        for name, quantity in quantities.items():
            if name in found:
                raise ValueError(f"quantity {name!r} has the name of what is ranked anyway: rename it")
            true, many = quantity(true_values, args), quantity(draws, args)
            if true.shape != (size,) or many.shape != (num_draws, size):
                raise ValueError(
                    f"quantity {name!r} must map values (..., {size}, *event) to (..., {size}), got "
                    f"{tuple(true.shape)} and {tuple(many.shape)}"
                )
            found[name] = _rank(true, many)
    return found


def _rank(true: Tensor, draws: Tensor) -> Tensor:
    """How many draws lie below, ties broken at random."""
    below = (draws < true).sum(0)
    ties = (draws == true).sum(0)
    return below + (torch.rand(ties.shape, device=ties.device) * (ties + 1)).floor().to(below.dtype)


def _distances(
    true: Mapping[str, Tensor], draws: Mapping[str, Tensor], points: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Distances of truth and draws to points of the prior, in standard deviations of the draws."""
    to_true: Any = 0.0
    to_draws: Any = 0.0
    for name, value in true.items():
        values = value.to(torch.get_default_dtype()).reshape(len(value), -1)
        many = draws[name].reshape(len(draws[name]), *values.shape).to(values)
        point = points[name].reshape(values.shape).to(values)
        scale = many.std(0).clamp(min=torch.finfo(values.dtype).tiny ** 0.25)
        to_true = to_true + (((values - point) / scale) ** 2).sum(-1)
        to_draws = to_draws + (((many - point) / scale) ** 2).sum(-1)
    return to_true, to_draws


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
