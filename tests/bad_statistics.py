"""Bad inputs of what takes results: plots, weights, k-hats, cross-validation, products of factors.

The table of :mod:`tests.bad_inputs` goes on here.
"""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr

import pyro_hvae as ph
from pyro_hvae import diagnostics, factorized, plots, weights
from pyro_hvae.diffusion import LinearSchedule

nan, inf = math.nan, math.inf
COUNT = (0, -1, 2.5, nan, inf, "3", True, [3])
PROBABILITY = (0.0, 1.0, -0.1, 2.0, nan, "0.5", True)
SWITCH = ("no", 2, 0.5, None)
CHOICE = ("nothing", 3, True, "")
NO_TREE = (3, None, "tree", {}, [])
NO_WEIGHTS = ("w", 3, None, [0.0, 1.0], np.zeros(30), torch.zeros(0), torch.zeros(()), torch.arange(30))
INVALID = (torch.full((30,), nan), torch.full((30,), inf), torch.tensor([0.0] * 29 + [nan]))
DIM = (1, -2, 0.5, "0", None, True)
SHAPE = (3, None, (2,), (2, 3, 1), (0, 6), (-2, -3), (2.0, 3), ("2", 3), (2, 2))
X = torch.tensor([0.5, -1.0, 2.0])


def model(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    pyro.sample("z", dist.Normal(x.sum() / 4, 0.6))


@functools.cache
def tree():
    with torch.random.fork_rng(devices=[]), pyro.poutine.block():
        return diagnostics.to_datatree(model, guide, X, num_draws=30)


def with_pair(verb, **fixed):
    return lambda **options: verb(model, guide, X, **(fixed | options))


def with_model(verb, **fixed):
    return lambda **options: verb(model, X, **(fixed | options))


def of_weights(verb, **fixed):
    return lambda **options: verb(**({"log_weights": torch.linspace(0.0, 1.0, 30)} | fixed | options))


class Bracket:
    lower, upper, upper_is_bound = np.array([-2.0, -1.0]), np.array([-1.9, -0.8]), True


CALIBRATION = diagnostics.Calibration({"z": np.arange(20).reshape(20, 1) % 10}, 9)
KHATS = xr.Dataset({"per_datum": ("data", [0.1, 0.9])}, attrs={"good_k": 0.7})
KL = torch.tensor(0.1)
PLAIN, _ = ph.vae(6, 2, hidden=(4,))
CONDITIONAL, _ = ph.vae(6, 2, hidden=(4,), context_dim=3)
PICTURE = plots.schedule(LinearSchedule())

STATISTICS = {
    "plots.samples": (
        lambda **o: plots.samples(**({"images": torch.zeros(4, 6), "shape": (2, 3)} | o)),
        {"images": ("x", 3, None, torch.zeros(0, 6), torch.zeros(3, 5), [], [torch.zeros(0, 6)]),
         "shape": SHAPE, "columns": COUNT, "titles": (["a", "b"], 3, [])},
    ),
    "plots.reconstructions": (
        lambda **o: plots.reconstructions(**({"x": torch.zeros(4, 6), "xhat": torch.zeros(4, 6), "shape": (2, 3)} | o)),
        {"x": ("x", 3, torch.zeros(0, 6), torch.zeros(4, 5), torch.zeros(3, 6)),
         "xhat": ("x", 3, torch.zeros(0, 6), torch.zeros(4, 5), torch.zeros(5, 6)), "shape": SHAPE, "columns": COUNT},
    ),
    "plots.traversal": (
        lambda **o: plots.traversal(
            **({"model": PLAIN, "latents": {"z1": torch.zeros(1, 2)}, "shape": (2, 3), "units": {"z1": [0]}} | o)
        ),
        {"model": (3, None, "vae", torch.nn.Linear(2, 6), ph.BottomUp(z1=ph.Gaussian(torch.nn.Linear(6, 4)))),
         "latents": (3, None, {}, torch.zeros(1, 2), {"z9": torch.zeros(1, 2)}, {"z1": [[0.0, 0.0]]}, {"z1": None},
                     {"z1": torch.zeros(2)}, {"z1": torch.zeros(2, 2)}, {"z1": torch.zeros(0, 2)},
                     {"z1": torch.zeros(1, 0)}, {"z1": torch.zeros(1, 5)}, {"z1": torch.zeros(1, 1)},
                     {"z1": torch.tensor([[0.0, nan]])}, {"z1": torch.tensor([[0.0, inf]])},
                     {"z1": torch.zeros(1, 2), "z2": torch.zeros(1, 2)}, {"x": torch.zeros(1, 6)}),
         "shape": SHAPE,
         "units": (3, None, "z1", [0], {}, {"z2": [0]}, {"z1": []}, {"z1": 0}, {"z1": "0"}, {"z1": [2]}, {"z1": [-1]},
                   {"z1": [0.5]}, {"z1": [True]}, {"z1": ["0"]}, {"z1": [nan]}, {"z1": None}),
         "at": (3, None, "all", (), (nan,), (0.0, inf), ("low",), [[0.0, 1.0]], torch.zeros(0)),
         "context": (torch.zeros(3), torch.zeros(1, 3))},
    ),
    "plots.traversal of a conditional model": (
        lambda **o: plots.traversal(
            **({"model": CONDITIONAL, "latents": {"z1": torch.zeros(1, 2)}, "shape": (2, 3), "units": {"z1": [0]},
                "context": torch.zeros(3)} | o)
        ),
        {"context": (None, 3, "four", [0.0, 0.0, 1.0], torch.zeros(()), torch.zeros(0), torch.zeros(2),
                     torch.zeros(1, 2), torch.zeros(2, 3), torch.zeros(1, 1, 3), torch.tensor([0.0, nan, 1.0]),
                     torch.zeros(0, 3))},
    ),
    "plots.latent_map": (
        lambda **o: plots.latent_map(**({"z": torch.randn(6, 2)} | o)),
        {"z": (3, None, "z", [], {}, torch.zeros(6), torch.zeros(6, 1), torch.zeros(0, 2), torch.zeros(6, 2, 1),
               torch.full((6, 2), nan), torch.tensor([[0.0, 1.0], [inf, 0.0]]), [["a", "b"]], torch.zeros(1, 3),
               [[0.0, 1.0], [2.0]]),
         "labels": (3, "abcdef", [0, 1], torch.zeros(7), torch.zeros(6, 1), torch.zeros(0), {}, [0, 1, "a", 2, 3, None],
                    [[0], [1, 2], [], [], [], []], np.array([1, "a", 2, 3, 4, 5], dtype=object)),
         "names": (3, "xy", ("x",), ("x", "y", "z"), (1, 2), [None, "y"], [], PICTURE.axes[0], PICTURE),
         "label_name": (3, None, ["a"], PICTURE.axes[0]), "title": (3, "", " ", ["a"], PICTURE.axes[0])},
    ),
    "plots.latent_map of four units": (
        lambda **o: plots.latent_map(**({"z": torch.randn(6, 4)} | o)), {"names": (("a", "b"), 3)},
    ),
    "plots.samples beside data": (
        lambda **o: plots.samples(**({"images": torch.zeros(4, 6), "shape": (2, 3), "data": torch.zeros(9, 6)} | o)),
        {"data": ("x", 3, torch.zeros(0, 6), torch.zeros(3, 5), []), "title": (3, "", ["a"])},
    ),
    "plots.schedule": (
        lambda **o: plots.schedule(*o.pop("schedules", (LinearSchedule(),)), **o),
        {"schedules": ((), (3,), ("linear",), (None,)), "labels": (["a", "b"], [], 3), "points": (*COUNT, 1)},
    ),
    "plots.training_curves": (
        lambda **o: plots.training_curves(**({"history": [{"step": 1, "loss": 3.0}]} | o)),
        {"history": ([], 3, None, "history", [3], [{"loss": 3.0}], [{"step": 1}], [{"step": 1, "loss": "low"}]),
         "terms": SWITCH},
    ),
    "plots.layer_kl": (
        lambda **o: plots.layer_kl(**({"terms": {"kl_z": 1.0}} | o)),
        {"terms": ({}, 3, None, "kl_z", {"reconstruction": 1.0}, {"kl_z": "much"}, {"kl_z": nan},
                   {"kl_z": torch.zeros(0)}),
         "units": (3, "z", {"z": "many"}, {"z": -1})},
    ),
    "plots.khat_scatter": (
        lambda **o: plots.khat_scatter(**({"khats": KHATS} | o)),
        {"khats": (3, None, "khats", {}, xr.Dataset(), KHATS.drop_attrs(), KHATS * nan)},
    ),
    "plots.calibration_ecdf": (
        lambda **o: plots.calibration_ecdf(**({"calibration": CALIBRATION} | o)),
        {"calibration": (3, None, {}, "ranks"), "names": (["nothing"], "z", 3, []), "level": PROBABILITY},
    ),
    "plots.evidence_bracket": (
        lambda **o: plots.evidence_bracket(**({"bracket": Bracket} | o)),
        {"bracket": (3, None, "bracket"), "elbo": (torch.zeros(3), "low", torch.zeros(())),
         "others": (3, "IWELBO", {"IWELBO": torch.zeros(5)}, {"IWELBO": "low"})},
    ),
    "weights.effective_sample_size": (
        of_weights(weights.effective_sample_size), {"log_weights": (*NO_WEIGHTS, *INVALID), "dim": DIM},
    ),
    "weights.log_mean_exp_stderr": (
        of_weights(weights.log_mean_exp_stderr), {"log_weights": (*NO_WEIGHTS, *INVALID, torch.zeros(1)), "dim": DIM},
    ),
    "weights.log_mean_exp": (of_weights(weights.log_mean_exp), {"log_weights": NO_WEIGHTS, "dim": DIM}),
    "weights.check_weights": (
        of_weights(weights.check_weights),
        {"log_weights": (*NO_WEIGHTS, *INVALID, torch.full((30,), -inf)), "dim": DIM},
    ),
    "weights.pareto_khat": (
        of_weights(weights.pareto_khat), {"log_weights": (*NO_WEIGHTS, *INVALID, torch.zeros(4)), "dim": DIM},
    ),
    "weights.psis of a dim": (of_weights(weights.psis), {"log_weights": (*NO_WEIGHTS, *INVALID), "dim": DIM}),
    "weights.chunks": (
        lambda **o: weights.chunks(**({"num_draws": 9, "chunk_size": 4} | o)),
        {"num_draws": COUNT, "chunk_size": COUNT},
    ),
    "weights.markov_lower": (
        of_weights(weights.markov_lower, delta=0.1),
        {"log_weights": (*NO_WEIGHTS[:-1], *INVALID), "delta": PROBABILITY, "sum_dims": (-1, 2.5, "1", 3, True)},
    ),
    "weights.product_lower": (
        of_weights(weights.product_lower, delta=0.1),
        {"log_weights": (*NO_WEIGHTS[:-1], *INVALID), "delta": PROBABILITY, "sum_dims": (-1, 2.5, "1", 3, True)},
    ),
    "diagnostics.khats": (
        with_pair(diagnostics.khats), {"num_draws": (*COUNT, 19), "layers": (["nothing"], "x", 3), "chunk_size": COUNT},
    ),
    "diagnostics.loo": (
        lambda **o: diagnostics.loo(**({"tree": tree()} | o)), {"tree": NO_TREE, "var_name": ("nothing", 3, "")},
    ),
    "diagnostics.compare": (
        lambda **o: diagnostics.compare(**({"models": {"a": tree(), "b": tree()}} | o)),
        {"models": (3, None, {}, {"a": tree}, {"a": 3, "b": 4}, "ab"), "method": CHOICE, "var_name": ("nothing", 3)},
    ),
    "diagnostics.held_out": (
        lambda **o: diagnostics.held_out(ph.TopDown(z=ph.StandardNormal(1), x=ph.Gaussian(torch.nn.Linear(1, 2))),
                                         ph.BottomUp(z=ph.Gaussian(torch.nn.Linear(1, 2))), X[:, None], **o),
        {"num_draws": COUNT, "chunk_size": COUNT, "progress": SWITCH},
    ),
    "diagnostics.smoothed_weights": (
        lambda **o: diagnostics.smoothed_weights(**({"tree": tree()} | o)), {"tree": NO_TREE},
    ),
    "diagnostics.resample": (
        lambda **o: diagnostics.resample(**({"tree": tree()} | o)),
        {"tree": NO_TREE, "num_draws": COUNT, "seed": (-1, 2.5, "0", nan, True)},
    ),
    "forward_kl of a model": (
        with_model(factorized.forward_kl, num_samples=200),
        {"num_samples": (*COUNT, 99), "families": ({"nothing": "normal"}, {"z": "nothing"}, {"z": 3}, 3, "normal"),
         "blocks": ("z", 3, [["nothing"]], [["z"], ["z"]], [3]), "proposal": (3, "prior")},
    ),
    "reverse_kl": (
        with_model(factorized.reverse_kl, num_steps=2),
        {"num_steps": COUNT, "learning_rate": (0.0, -1.0, nan, inf, "1", True),
         "families": ({"nothing": "normal"}, {"z": "nothing"}, {"z": 3}, 3, "normal"),
         "blocks": ("z", 3, [["nothing"]], [["z"], ["z"]], [3]),
         "start": (3, "z", {"nothing": KL}, {"z": torch.full((), nan)}, {"z": torch.zeros(2)}, {"z": "0"})},
    ),
    "compare_guides": (
        with_model(factorized.compare_guides, num_samples=200),
        {"num_samples": (*COUNT, 99), "guides": ({}, 3, "guide", {"a": 3}), "proposal": (3, "prior"),
         "families": ({"nothing": "normal"}, 3), "blocks": ("z", 3, [["nothing"]])},
    ),
    "total_correlation": (with_model(factorized.total_correlation), {"blocks": ("z", 3, [["nothing"]], [3])}),
}  # fmt: skip
