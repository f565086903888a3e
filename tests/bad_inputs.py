"""Bad inputs over the public surface: each entry is a call that works, and for each argument values that are wrong."""

import math

import pyro
import pyro.distributions as dist
import torch

import pyro_hvae as ph
from pyro_hvae import bounds, data, diffusion, kernels, models, nn, training, weights
from pyro_hvae.bounds import TraceELBO
from pyro_hvae.training import fit

nan, inf = math.nan, math.inf
COUNT = (0, -1, 2.5, nan, inf, "3", True, [3])
SIZE_OR_ZERO = (-1, 2.5, nan, "3", True, [3])
POSITIVE = (0.0, -1.0, nan, inf, "0.1", True)
NOT_NEGATIVE = (-1.0, nan, inf, "0.1", True)
PROBABILITY = (0.0, 1.0, -0.1, 2.0, nan, "0.5", True)
SWITCH = ("no", 2, 0.5, None)
CHOICE = ("nothing", 3, True, "")
NETWORK = ("net", 3, None)


def linear_pair():
    """z ~ N(0, 1), x | z ~ N(z, 1), with its posterior as the guide."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    return model, guide


X = torch.tensor([0.5, -1.0, 2.0])


def with_pair(verb):
    def call(**options):
        return verb(*linear_pair(), X, **options)

    return call


def fitted(**options):
    model, guide = models.vae(4, 2, hidden=(3,))
    x = torch.ones(8, 4)
    settings = {"data": x, "bound": TraceELBO(), "steps": 1, "progress": False}
    settings = settings | options
    if "epochs" in options:
        settings.pop("steps")
    return fit(model, guide, settings.pop("data"), **settings)


def compiled(**options):
    model, guide = models.vae(4, 2, hidden=(3,))
    objective = TraceELBO()(model, guide)
    optimizer = torch.optim.Adam(objective.parameters())
    return ph.compile_step(objective, optimizer, torch.ones(8, 4), backend=options.pop("backend", "eager"), **options)


def sampled(**options):
    model, _ = models.vdm(nn.DenoisingMLP(3, hidden=4), event_shape=3, num_layers=5)
    return diffusion.ddim(model, **({"size": 2} | options))


def linear(**options):
    return kernels.LinearGaussian(2, 2, **options)


# name: (call, {argument: values that are wrong})
CALLS = {
    "models.vae": (
        lambda **o: models.vae(**({"event_shape": 4, "latent_dim": 2, "hidden": (3,)} | o)),
        {"event_shape": (*COUNT[:-1], [], [0], [2.5], ["4"], [-1]), "latent_dim": COUNT,
         "hidden": ("wide", 3.5, (0,), (2.5,), ("4",), (-3,), (nan,)), "likelihood": CHOICE,
         "context_dim": SIZE_OR_ZERO},
    ),
    "models.hvae": (
        lambda **o: models.hvae(**({"event_shape": 4, "latent_dims": [3, 2], "hidden": (3,)} | o)),
        {"event_shape": COUNT[:-1], "latent_dims": ("ab", [], [0], [2.5], [3, -1], ["3"], 3.5, [True], [nan]),
         "likelihood": CHOICE, "context_dim": SIZE_OR_ZERO},
    ),
    "models.ladder_vae": (
        lambda **o: models.ladder_vae(**({"event_shape": 4, "latent_dims": [3, 2], "hidden": (3,)} | o)),
        {"event_shape": COUNT[:-1], "latent_dims": ("ab", [], [0], [2.5], [3, -1], ["3"], [nan])},
    ),
    "models.vdm": (
        lambda **o: models.vdm(**({"denoiser": nn.DenoisingMLP(3, hidden=4), "event_shape": 3, "num_layers": 4} | o)),
        {"event_shape": COUNT[:-1], "num_layers": COUNT, "parameterisation": CHOICE, "denoiser": NETWORK},
    ),
    "kernels.StandardNormal": (lambda size: kernels.StandardNormal(size), {"size": COUNT}),
    "kernels.Gaussian": (
        lambda **o: kernels.Gaussian(**({"net": torch.nn.Linear(2, 4)} | o)),
        {"net": ("net", 3, torch.nn.Linear), "event_dim": (0, -1, 2.5, nan, "1", True), "scale": CHOICE,
         "min_scale": PROBABILITY},
    ),
    "kernels.LinearGaussian": (
        lambda **o: kernels.LinearGaussian(**({"in_features": 2, "out_features": 2} | o)),
        {"in_features": SIZE_OR_ZERO, "out_features": COUNT, "scale": (0.0, -1.0, nan, inf, "1", True),
         "covariance": (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.eye(3), -torch.eye(2), torch.full((2, 2), nan), 3,
                        "I"),
         "weight": (torch.zeros(3, 3), "w", torch.full((2, 2), nan)),
         "bias": (torch.zeros(3), "b", torch.full((2,), nan)),
         "learn": SWITCH},
    ),
    "kernels.Bernoulli": (
        lambda **o: kernels.Bernoulli(**({"net": torch.nn.Linear(2, 4)} | o)),
        {"net": ("net", 3, torch.nn.Linear), "event_dim": (-1, 2.5, nan, "1", True)},
    ),
    "kernels.Categorical": (
        lambda **o: kernels.Categorical(**({"net": torch.nn.Linear(2, 4), "num_categories": 4} | o)),
        {"num_categories": COUNT, "event_dim": (-1, 2.5, "1", True)},
    ),
    "kernels.Transition": (
        lambda **o: kernels.Transition(**({"num_states": 2, "num_parents": 2} | o)),
        {"num_parents": COUNT, "num_states": COUNT,
         "probs": (torch.tensor([[1.5, -0.5], [0.5, 0.5]]), torch.full((2, 2), nan), torch.ones(2, 2),
                   torch.ones(3, 3) / 3, "p", 0.5)},
    ),
    "nn.MLP": (
        lambda **o: nn.MLP(**({"in_features": 2, "out_features": 2} | o)),
        {"in_features": COUNT, "out_features": COUNT, "hidden": ("wide", (0,), (2.5,), ("4",), 3.5, (nan,), (True,)),
         "activation": ("relu", 3)},
    ),
    "nn.DenoisingMLP": (
        lambda **o: nn.DenoisingMLP(**({"features": 2, "hidden": 4} | o)),
        {"features": COUNT, "hidden": (*COUNT, 3), "num_layers": COUNT, "context_features": SIZE_OR_ZERO},
    ),
    "bounds.TraceELBO": (
        lambda **o: bounds.TraceELBO(**o), {"num_particles": COUNT, "gradient": CHOICE},
    ),
    "bounds.LayerwiseELBO": (lambda **o: bounds.LayerwiseELBO(**o), {"num_particles": COUNT}),
    "bounds.IWELBO": (
        lambda **o: bounds.IWELBO(**({"num_particles": 2} | o)),
        {"num_particles": COUNT, "gradient": CHOICE, "chunk_size": COUNT, "num_repeats": COUNT,
         "share_globals": SWITCH},
    ),
    "bounds.VRBound": (
        lambda **o: bounds.VRBound(**({"alpha": 0.5, "num_particles": 2} | o)),
        {"alpha": (1, 1.0, -0.5, nan, inf, "0.5", True), "num_particles": COUNT},
    ),
    "bounds.ThermodynamicBound": (
        lambda **o: bounds.ThermodynamicBound(**({"num_particles": 2, "betas": 3} | o)),
        {"num_particles": COUNT, "betas": (0, -1, 2.5, "3", [0.5, 0.1], [nan], [0.0, 2.0], [], True, [0.0, "a"])},
    ),
    "bounds.CUBO": (
        lambda **o: bounds.CUBO(**({"num_particles": 2} | o)),
        {"num_particles": COUNT, "order": (1, 0.5, nan, inf, "2", True)},
    ),
    "bounds.EUBO": (lambda **o: bounds.EUBO(**o), {"num_particles": COUNT}),
    "bounds.DiffusionELBO": (
        lambda **o: bounds.DiffusionELBO(**o), {"num_layers_sampled": COUNT, "sampling": CHOICE},
    ),
    "bounds.Regularised": (
        lambda **o: bounds.Regularised(TraceELBO(), **o),
        {"kl_weight": (-1.0, nan, inf, "1", True, None), "free_bits": (-1.0, nan, inf, "1", True, None)},
    ),
    "bounds.warm_up": (
        lambda **o: bounds.warm_up(**({"steps": 10} | o)), {"steps": COUNT, "start": (-0.5, 2.0, nan, "0", True)},
    ),
    "log_evidence": (
        with_pair(ph.log_evidence), {"num_samples": COUNT, "method": CHOICE, "chunk_size": COUNT},
    ),
    "evidence_sandwich": (
        with_pair(lambda *a, **o: ph.evidence_sandwich(*a, **({"num_chains": 2, "betas": 3} | o))),
        {"num_chains": COUNT, "betas": (0, -1, 2.5, nan, "3", [0.5, 0.1], [nan, 1.0], True)},
    ),
    "to_datatree": (
        with_pair(lambda *a, **o: ph.to_datatree(*a, **({"num_draws": 2} | o))),
        {"num_draws": COUNT, "chunk_size": COUNT, "groups": ("posterior", ["nothing"], 3)},
    ),
    "diagnose": (with_pair(ph.diagnose), {"num_draws": COUNT}),
    "calibrate": (
        with_pair(lambda *a, **o: ph.diagnostics.calibrate(*a, **o)),
        {"num_draws": (*COUNT, 3), "num_simulations": COUNT},
    ),
    "Calibration": (lambda alpha: ph.diagnostics.Calibration({}, 9, alpha), {"alpha": PROBABILITY}),
    "weights.good_khat": (lambda n: weights.good_khat(n), {"n": (0, -1, nan, "3")}),
    "weights.psis": (
        lambda w: weights.psis(w), {"w": ("w", torch.full((9,), nan), torch.full((9,), inf), [], torch.zeros(2))},
    ),
    "weights.effective_sample_size": (
        lambda w: weights.effective_sample_size(w), {"w": ("w", 3, torch.zeros(0))},
    ),
    "data.binarize": (
        lambda **o: data.binarize(**({"x": torch.rand(3, 4)} | o)),
        {"threshold": (-0.1, 2.0, nan, "0.5", True, [0.5]), "x": (torch.full((2,), 2.0), torch.full((2,), nan), "x",
                                                                torch.full((2,), -1.0))},
    ),
    "data.Batches": (
        lambda **o: data.Batches(torch.zeros(6, 2), **({"batch_size": 2} | o)),
        {"batch_size": COUNT, "seed": (-1, 2.5, "0", nan, True), "shuffle": SWITCH, "drop_last": SWITCH},
    ),
    "diffusion.LinearSchedule": (
        lambda **o: diffusion.LinearSchedule(**({"gamma_min": -3.0, "gamma_max": 3.0} | o)),
        {"gamma_min": (5.0, nan, -inf, "a", True), "gamma_max": (-5.0, nan, inf, "a", True)},
    ),
    "diffusion.CosineSchedule": (
        lambda **o: diffusion.CosineSchedule(**({"gamma_min": -3.0, "gamma_max": 3.0} | o)),
        {"gamma_min": (5.0, nan, -inf, "a"), "gamma_max": (-5.0, nan, inf, "a")},
    ),
    "training.EarlyStopping": (
        lambda **o: training.EarlyStopping(**({"patience": 2} | o)),
        {"patience": COUNT, "min_delta": NOT_NEGATIVE, "monitor": (3, "", None)},
    ),
    "training.fit": (
        fitted,
        {"steps": COUNT, "epochs": COUNT, "batch_size": COUNT, "data_size": (*COUNT, 3),
         "seed": (-1, 2.5, "0", nan, True),
         "accumulate": COUNT, "keep": COUNT, "log_every": COUNT, "terms_every": COUNT, "check_every": COUNT,
         "validate_every": COUNT, "checkpoint_every": COUNT, "clip_norm": POSITIVE,
         "ema": (1.0, -0.1, 2.0, nan, "0.9", True), "shuffle": SWITCH, "drop_last": SWITCH,
         "resume": ("no", 2, None, True, "anyway"), "progress": SWITCH, "tensorboard": ("no", 2, None, True),
         "compile": (None, 0, 1, "yes"), "precision": ("fp4", 16, True), "bound": (TraceELBO, "ELBO", None, 3),
         "optimizer": ("Adam", 3, torch.optim.LBFGS, pyro.optim.Adam({}), lambda p: 3),
         "data": (None, 3, "digits", torch.tensor(1.0), torch.zeros(0, 4), torch.full((3, 4), nan), [], {}, (),
                  torch.zeros(3, 5), torch.full((3, 4), 0.5), torch.full((3, 4), 2.0), {"y": torch.zeros(3, 4)}),
         "transform": (3, "t", lambda x: None), "schedule": (3, "cosine", lambda o: 3), "callbacks": (3,),
         "validation": (3, torch.zeros(3, 5), torch.full((3, 4), nan), torch.full((3, 4), 2.0)),
         "factory": (3, "vae", ("vae",)), "run_dir": (3, "\0")},
    ),
    "training.fit_restarts": (
        lambda **o: training.fit_restarts(lambda: models.vae(4, 2, hidden=(3,)), torch.ones(8, 4), bound=TraceELBO(),
                                          steps=1, progress=False, **({"restarts": 1} | o)),
        {"restarts": COUNT, "seed": (-1, 2.5, "0", nan)},
    ),
    "training.load": (
        lambda **o: ph.load(**({"run_dir": "nowhere"} | o)), {"run_dir": ("nowhere", "/", 3, None, ""), "which": (3,)},
    ),
    "compile_step": (
        compiled, {"clip_norm": POSITIVE, "steps": COUNT, "check": SWITCH, "backend": CHOICE, "noise": CHOICE},
    ),
    "forward_kl": (
        lambda **o: ph.forward_kl(*linear_pair(), X, **({"num_samples": 20} | o)), {"num_samples": COUNT},
    ),
    "diffusion.ddim": (sampled, {"size": COUNT, "num_steps": COUNT, "eta": (-0.1, 2.0, nan, "1", True)}),
}  # fmt: skip
