"""Lightning's Trainer makes the steps of fit."""

import functools
import subprocess
import sys

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pyro_hvae.bounds import IWELBO, Regularised, TraceELBO, warm_up
from pyro_hvae.data import Batches
from pyro_hvae.evidence import AnnealedBound
from pyro_hvae.models import hvae
from pyro_hvae.training import NonFiniteError, PairModule, fit
from tests.processes import in_two_ranks
from tests.training.test_distributed import Guide, Model

lightning = pytest.importorskip("lightning.pytorch")

# Lightning's advice: no validation data, few batches, other folders
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Steps(lightning.Callback):
    """The loss and the parameters after each step."""

    def __init__(self):
        self.losses, self.weights = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.weights.append([p.detach().clone() for p in module.pair.parameters()])

    def on_step(self, run, loss):
        self.losses.append(float(loss))
        self.weights.append([p.detach().clone() for p in run.objective.parameters()])


def pair():
    torch.manual_seed(4)
    pyro.clear_param_store()
    return (*hvae((6,), [3, 2], hidden=(5,)), torch.rand(40, 6).round())


def objective():
    return Regularised(TraceELBO(), kl_weight=warm_up(30))


adam = functools.partial(torch.optim.Adam, lr=0.01)


def train(*, epochs=3, bound=None, callbacks=(), resume=None, **options):
    model, guide, x = pair()
    module = PairModule(model, guide, objective() if bound is None else bound, optimizer=adam)
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**QUIET, **options})
    # a loader without a generator of its own draws from torch's, which the noise comes from
    held_out = DataLoader(x[:16], batch_size=8, generator=torch.Generator())
    trainer.fit(module, DataLoader(x, batch_size=8, generator=torch.Generator()), held_out, ckpt_path=resume)
    return module, trainer


@pytest.mark.parametrize("bound", [objective, lambda: IWELBO(3)], ids=["warm-up", "particles"])
def test_losses_and_parameters_are_those_of_fit(bound):
    model, guide, x = pair()
    expected, found = Steps(), Steps()
    result = fit(
        model, guide, x, bound=bound(), epochs=3, batch_size=8, shuffle=False, optimizer=adam, callbacks=[expected],
        validation=x[:16], progress=False, seed=3,
    )  # fmt: skip
    module, trainer = train(bound=bound(), callbacks=[found])
    assert len(found.losses) == len(expected.losses) == 15
    assert found.losses == pytest.approx(expected.losses, rel=1e-12)
    for ours, theirs in zip(found.weights, expected.weights, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    recorded = [name for name in result.history.names() if name.startswith("validation_")]
    assert len(recorded) > 1
    for name in recorded:
        assert float(trainer.callback_metrics[name]) == pytest.approx(result.history[name][-1], rel=1e-6)
    assert module.hparams["bound"] == repr(module.pair.bound)


def test_accumulated_batches_and_clipping_are_those_of_fit():
    model, guide, x = pair()
    expected, found = Steps(), Steps()
    fit(
        model, guide, x, bound=objective(), epochs=2, batch_size=8, shuffle=False, optimizer=adam,
        callbacks=[expected], accumulate=5, clip_norm=0.1, progress=False, seed=3,
    )  # fmt: skip
    module, _ = train(epochs=2, callbacks=[found], accumulate_grad_batches=5, gradient_clip_val=0.1)
    for a, b in zip(module.pair.parameters(), expected.weights[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert float(module.pair.bound.step) == 2  # steps of the optimiser, not batches


def test_a_checkpoint_of_the_trainer_resumes_the_same_steps(tmp_path):
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    whole, _ = train(epochs=4, **options)
    path = tmp_path / "two.ckpt"
    _, trainer = train(epochs=2, **options)
    trainer.save_checkpoint(path)
    parts, _ = train(epochs=4, resume=path, **options)
    assert float(parts.pair.bound.step) == float(whole.pair.bound.step) == 20
    assert whole.state_dict().keys() == parts.state_dict().keys()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=0.0, atol=0.0)


def test_load_from_checkpoint(tmp_path):
    module, trainer = train(epochs=2, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    model, guide, x = pair()
    parts = {"model": model, "guide": guide, "objective": objective()}
    before = torch.get_rng_state()
    again = PairModule.load_from_checkpoint(tmp_path / "end.ckpt", **parts, example=x[:8])
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r"pass load_from_checkpoint\(path, .*example=batch"):
        PairModule.load_from_checkpoint(tmp_path / "end.ckpt", **parts)


def latent_mean(x, data_size=None):
    mean = pyro.sample("mean", pyro.distributions.Normal(0.0, 10.0))
    with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
        pyro.sample("x", pyro.distributions.Normal(mean, 1.0), obs=x)


def test_parameters_made_at_the_first_call_are_trained():
    """The posterior of a mean, N data in minibatches: N comes from the loader."""
    torch.manual_seed(0)
    x = 3.0 + torch.randn(64)
    guide = AutoNormal(latent_mean)
    sgd = functools.partial(torch.optim.Adam, lr=0.05)
    module = PairModule(latent_mean, guide, TraceELBO(), optimizer=sgd)
    trainer = lightning.Trainer(max_epochs=60, **QUIET)
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=16, shuffle=True), DataLoader(TensorDataset(x), 64))
    assert module.pair.data_size == 64
    mean = x.sum() / (64 + 1 / 100)
    assert float(guide.median()["mean"]) == pytest.approx(float(mean), abs=0.1)
    assert float(guide.scales.mean.detach()) == pytest.approx(1 / 8, rel=0.3)


def test_the_setup_draws_nothing():
    model, guide, x = pair()
    module = PairModule(model, guide, TraceELBO())
    module.trainer = lightning.Trainer(max_epochs=1, **QUIET)
    module.trainer.fit_loop._data_source.instance = DataLoader(x, batch_size=8, shuffle=True)
    before = torch.get_rng_state()
    module.setup("fit")
    assert torch.equal(torch.get_rng_state(), before)
    assert module.pair is not None


def test_a_schedule_beside_the_optimizer():
    def make(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        }

    model, guide, x = pair()
    trainer = lightning.Trainer(max_epochs=2, **QUIET)
    trainer.fit(PairModule(model, guide, TraceELBO(), optimizer=make), Batches(x, batch_size=20))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.025


def fitting(module, loader):
    return lambda: lightning.Trainer(max_epochs=1, **QUIET).fit(module, loader)


def test_refusals():
    model, guide, x = pair()
    with pytest.raises(TypeError, match="the class TraceELBO: call it"):
        PairModule(model, guide, TraceELBO)
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="pass a function"):
        PairModule(model, guide, TraceELBO(), optimizer=made)
    with pytest.raises(ValueError, match="seen no batch"):
        PairModule(model, guide, TraceELBO())(x)
    with pytest.raises(ValueError, match="one-shot iterator"):
        fitting(PairModule(model, guide, TraceELBO()), iter(x.split(8)))()
    with pytest.raises(TypeError, match=r"the data are torch.float32 and the parameters torch.float64"):
        fitting(PairModule(model, guide, TraceELBO()), DataLoader(x.float(), batch_size=8))()
    with pytest.raises(ValueError, match=r"site 'x'"):
        fitting(PairModule(model, guide, TraceELBO()), DataLoader(x + 0.5, batch_size=8))()
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"site 'x'"):
        fitting(PairModule(model, guide, TraceELBO()), DataLoader(x + 0.5, batch_size=8))()
    part = PairModule(model, guide, TraceELBO(), optimizer=lambda parameters: torch.optim.SGD(parameters[:1], lr=0.1))
    with pytest.raises(ValueError, match="does not hold"):
        fitting(part, DataLoader(x, batch_size=8))()
    with pytest.raises(ValueError, match=r"torch.compile\(module\) can't trace"):
        fitting(torch.compile(PairModule(model, guide, TraceELBO()), backend="eager"), DataLoader(x, batch_size=8))()


def test_batches_of_a_latent_of_all_data_are_refused():
    def unscaled(x):
        mean = pyro.sample("mean", pyro.distributions.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", pyro.distributions.Normal(mean, 1.0), obs=x)

    module = PairModule(unscaled, AutoNormal(unscaled), TraceELBO())
    with pytest.raises(ValueError, match=r"latent site\(s\) \['mean'"):
        fitting(module, DataLoader(torch.randn(32), batch_size=8))()


def test_nan_stops_the_run_with_the_sites():
    model, guide, x = pair()
    module = PairModule(model, guide, TraceELBO(), optimizer=functools.partial(torch.optim.SGD, lr=1e30))
    trainer = lightning.Trainer(max_epochs=5, log_every_n_steps=2, **QUIET)
    with pytest.raises(NonFiniteError, match=r"between steps \d and \d; not finite now: .*'z"):
        trainer.fit(module, DataLoader(x, batch_size=8))


def test_without_lightning_the_error_says_what_to_install():
    code = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
import pyro_hvae.training as training
assert "lightning.pytorch" not in sys.modules
try:
    training.PairModule(None, None, None)
except ImportError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'pyro-hvae[distributed]'" in told.stdout


def test_test_data_are_evaluated_under_the_noise_of_validation():
    module, trainer = train(epochs=1)
    _, _, x = pair()
    (found,) = trainer.test(module, DataLoader(x[:16], batch_size=8), verbose=False)
    (again,) = trainer.validate(module, DataLoader(x[:16], batch_size=8), verbose=False)
    assert found["test_loss"] == again["validation_loss"]


def on_devices(folder, devices):
    """Train by the Trainer on one of several processes, without noise; keep losses, parameters and records."""
    torch.manual_seed(4)
    model, guide, x = Model(), Guide(noise=False), torch.randn(40, 3)
    steps = Steps()
    module = PairModule(model, guide, TraceELBO(), optimizer=adam)
    options = {"devices": devices, "callbacks": [steps]}
    if devices > 1:
        options["strategy"] = lightning.strategies.DDPStrategy(process_group_backend="gloo")
    # the sampler that Lightning adds shuffles the training data
    trainer = lightning.Trainer(max_epochs=3, use_distributed_sampler=False, **{**QUIET, **options})
    rank = trainer.global_rank
    loaders = (
        DataLoader(part, batch_size=8 // devices, sampler=DistributedSampler(part, devices, rank, shuffle=False))
        for part in (x, x[:16])
    )
    trainer.fit(module, *loaders)
    validation = float(trainer.callback_metrics["validation_loss"])
    torch.save((steps.losses, steps.weights, validation, torch.randn(4)), folder / f"{rank}.pt")


def test_two_ranks_make_the_steps_of_one_and_of_fit(tmp_path):
    (tmp_path / "single").mkdir()
    on_devices(tmp_path / "single", 1)
    in_two_ranks(functools.partial(on_devices, tmp_path, 2), fabric=False)
    losses, _, validation, _ = torch.load(tmp_path / "single" / "0.pt")
    (first, own, held_out, noise), (second, others, _, other_noise) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    torch.manual_seed(4)
    model, guide, x = Model(), Guide(noise=False), torch.randn(40, 3)
    expected = Steps()
    fit(
        model, guide, x, bound=TraceELBO(), epochs=3, batch_size=8, shuffle=False, optimizer=adam,
        callbacks=[expected], seed=3, progress=False,
    )  # fmt: skip
    assert losses == pytest.approx(expected.losses, rel=1e-12)
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(expected.losses, rel=1e-6)
    assert held_out == pytest.approx(validation, rel=1e-5)  # Lightning averages in float32
    for step in range(15):
        for a, b, c in zip(own[step], others[step], expected.weights[step], strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-9)
    assert not torch.equal(noise, other_noise)


def test_objectives_that_need_gradients_are_evaluated_in_the_trainers_inference_mode():
    model, guide, x = pair()
    module = PairModule(model, guide, AnnealedBound(num_temperatures=2), optimizer=adam)
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, DataLoader(x, batch_size=20), DataLoader(x, batch_size=20))
    assert torch.isfinite(trainer.callback_metrics["validation_loss"])
