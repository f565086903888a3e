"""Two gloo processes: the gradient of the joined batch, one set of weights, checkpoints for any number of ranks."""

import functools
import os

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.training import Ranks, fit
from pyro_hvae.training import checkpoint as files
from tests.processes import in_two_ranks

pytest.importorskip("lightning_fabric")


class Model(PyroModule):
    def __init__(self):
        super().__init__("model")
        self.net = nn.Linear(2, 3)

    def forward(self, x, data_size=None):
        with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Guide(PyroModule):
    """Without noise the gradient depends on the data alone, and can be compared."""

    def __init__(self, noise):
        super().__init__("guide")
        self.net = nn.Linear(3, 2)
        self.noise = noise

    def forward(self, x, data_size=None):
        with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
            loc = self.net(x)
            q = dist.Normal(loc, 1.0) if self.noise else dist.Delta(loc)
            pyro.sample("z", q.to_event(1))


class WithoutDataSize(nn.Module):
    """The same programs, whose plates know of the batch alone."""

    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, x):
        return self.program(x)


class KeepGradients:
    def __init__(self, folder):
        self.folder = folder

    def on_step(self, run, loss):
        found = {name: p.grad.clone() for name, p in run.objective.named_parameters()}
        torch.save(found, self.folder / f"{run.ranks.rank}-{run.step}.pt")


def run(fabric, run_dir, *, noise=False, steps=6, plain=False, batch_size=8, resume=False, keep_gradients=None):
    torch.manual_seed(4)
    pyro.clear_param_store()
    model, guide = Model(), Guide(noise)
    if plain:
        model, guide = WithoutDataSize(model), WithoutDataSize(guide)
    x = torch.randn(32, 3)

    return fit(
        model, guide, x, bound=TraceELBO(), steps=steps, batch_size=batch_size, fabric=fabric, run_dir=run_dir,
        optimizer=functools.partial(torch.optim.SGD, lr=0.05), seed=3, resume=resume, progress=False, log_every=2,
        callbacks=[KeepGradients(keep_gradients)] if keep_gradients else [], clip_norm=100.0,
    )  # fmt: skip


def in_ranks(run_dir, **options):
    """The same run on two processes."""
    in_two_ranks(functools.partial(run, run_dir=run_dir, **options))


@pytest.mark.parametrize("plain", [False, True], ids=["data_size", "own plates"])
def test_gradients_are_those_of_the_joined_batch(tmp_path, plain):
    single, double = tmp_path / "single", tmp_path / "double"
    single.mkdir(), double.mkdir()
    run(None, None, plain=plain, keep_gradients=single)
    in_ranks(None, plain=plain, keep_gradients=double)
    for step in (1, 2, 6):
        expected = torch.load(single / f"0-{step}.pt")
        for rank in (0, 1):
            found = torch.load(double / f"{rank}-{step}.pt")
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-9)


def keep_weights_and_noise(folder, fabric):
    result = run(fabric, None, noise=True)
    weights = [p.detach() for p in (*result.model.parameters(), *result.guide.parameters())]
    torch.save((weights, torch.randn(4)), folder / f"{fabric.global_rank}.pt")


def test_weights_stay_equal_while_the_noise_differs(tmp_path):
    in_two_ranks(functools.partial(keep_weights_and_noise, tmp_path))
    (first, noise), (second, other_noise) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(noise, other_noise)


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 2)], ids=lambda ranks: f"{ranks[0]} to {ranks[1]}")
def test_resume_on_another_number_of_ranks(tmp_path, ranks):
    run(None, tmp_path / "whole")
    for number, steps in zip(ranks, (3, 6), strict=True):
        if number == 1:
            run(None, tmp_path / "parts", steps=steps, resume=True)
        else:
            in_ranks(tmp_path / "parts", steps=steps, resume=True)
    ends = []
    for name in ("whole", "parts"):
        last = files.latest(tmp_path / name / "checkpoints")
        assert last.name == "step-00000006"
        ends.append(files.read_weights(last))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-12)


def test_two_ranks_resume_bit_for_bit(tmp_path):
    in_ranks(tmp_path / "whole", noise=True)
    in_ranks(tmp_path / "parts", noise=True, steps=3, resume=True)
    in_ranks(tmp_path / "parts", noise=True, resume=True)
    ends = [files.read_weights(files.latest(tmp_path / name / "checkpoints")) for name in ("whole", "parts")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def divide_by_two(folder, fabric):
    try:
        run(fabric, None, batch_size=5)
    except ValueError as error:
        if "do not divide among 2 processes" in str(error):
            (folder / f"{fabric.global_rank}").touch()


def test_batches_that_do_not_divide_are_refused(tmp_path):
    in_two_ranks(functools.partial(divide_by_two, tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]


def svi(folder, fabric):
    model, guide = Model(), Guide(True)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=TraceELBO())
    try:
        svi.step(torch.randn(4, 3))
    except RuntimeError as error:
        if "gradients" in str(error) and "fit" in str(error):
            (folder / f"{fabric.global_rank}").touch()


def test_svi_on_many_processes_is_refused_with_the_reason(tmp_path):
    in_two_ranks(functools.partial(svi, tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]


def test_one_process_is_no_different():
    ranks = Ranks()
    assert (ranks.first, ranks.mean(2.0), ranks.any(True)) == (True, 2.0, True)


def test_compile_with_fabric_is_refused():
    import lightning_fabric

    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    with pytest.raises(ValueError, match="can't be used together"):
        fit(Model(), Guide(True), torch.randn(8, 3), bound=TraceELBO(), steps=1, fabric=fabric, compile=True)
