"""Damaged checkpoints, other settings, two runs in one directory: nothing is taken in silence, nothing crashes."""

import functools
import json
import os
import random
import shutil
import threading
import time
import warnings

import pyro
import pytest
import torch

from pyro_hvae.bounds import IWELBO, DiffusionELBO, TraceELBO
from pyro_hvae.models import vae, vdm
from pyro_hvae.nn import DenoisingMLP
from pyro_hvae.training import CheckpointError, EarlyStopping, History, fit, load
from pyro_hvae.training import checkpoint as files
from tests.processes import in_a_process, start
from tests.training.runs import assert_same_end, end_of, quiet, train
from tests.training.test_checkpoint import KillAt, kill_and_resume

adam = functools.partial(torch.optim.Adam, lr=0.01)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of 12 steps with three checkpoints, never changed."""
    torch.set_default_dtype(torch.float64)
    path = tmp_path_factory.mktemp("runs") / "whole"
    train(path, steps=12, keep=3)
    return path


@pytest.fixture
def run_dir(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


def flip(path, seed):
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(content) * 8)
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(bytes(content))


def cut(path, seed):
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(seed).randrange(len(content))])


DAMAGES = [(name, kind, seed)
           for name in ("weights.safetensors", "state.pt", "checksums.json")
           for kind in (flip, cut) for seed in (0, 1, 2, 3)]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "seed"), DAMAGES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_taken(run_dir, name, kind, seed):
    kind(files.latest(run_dir / "checkpoints") / name, seed)
    with pytest.warns(UserWarning, match=r"damaged.*taking step-00000008, the last that is whole"):
        path = files.find(run_dir, "last", files.read_config(run_dir)["run"])
    assert path.name == "step-00000008"


def test_a_run_continues_from_the_last_whole_checkpoint_bit_for_bit(whole_run, run_dir):
    flip(files.latest(run_dir / "checkpoints") / "weights.safetensors", 5)
    with pytest.warns(UserWarning, match="taking step-00000008"):
        train(run_dir, steps=12)
    assert_same_end(end_of(run_dir), end_of(whole_run))
    assert (run_dir / "checkpoints" / "damaged-step-00000012").is_dir()
    train(run_dir, steps=12)  # and there is nothing to warn of any more


def test_without_a_whole_checkpoint_the_run_is_refused_and_unchanged(run_dir):
    for path in files.checkpoints(run_dir / "checkpoints"):
        cut(path / "state.pt", 0)
    before = contents(run_dir)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*state.pt is damaged"):
        train(run_dir)
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        load(run_dir)
    assert contents(run_dir) == before


def test_a_named_checkpoint_that_is_damaged_is_refused(run_dir):
    flip(run_dir / "checkpoints" / "step-00000008" / "weights.safetensors", 1)
    with pytest.raises(CheckpointError, match=r"weights.safetensors is damaged: its SHA-256"):
        load(run_dir, which="step-00000008")
    load(run_dir)


def test_a_changed_config_and_lost_records_are_told(run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config))  # other white space
    load(run_dir)
    config["factory"]["args"]["hidden"] = [5]
    (run_dir / "config.json").write_text(json.dumps(config | {"ema": 0.5}))
    with pytest.warns(UserWarning, match="config.json has been changed since the run wrote it"):
        load(run_dir)
    (run_dir / "config.json").write_text(json.dumps(config | {"ema": 0.9}))
    lines = (run_dir / "history.jsonl").read_text().splitlines()
    (run_dir / "history.jsonl").write_text("\n".join([lines[0], lines[1][:10], *lines[2:]]))
    with pytest.warns(UserWarning, match=f"has 1 records, and the checkpoint was written after {len(lines)}"):
        train(run_dir, steps=13)


def rewritten(run_dir, change):
    """Change the trainer's state of the last checkpoint, with valid checksums."""
    for path in files.checkpoints(run_dir / "checkpoints")[:-1]:
        shutil.rmtree(path)
    path = files.latest(run_dir / "checkpoints")
    weights, state = files.read_weights(path), files.read_state(path)
    change(weights, state)
    files.save(path.parent, path.name, weights, state, run=files.read_config(run_dir)["run"])


def moments_of_other_shapes(weights, state):
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(3, 5, 7)


def fewer_moments(weights, state):
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg_sq"] = moments["exp_avg_sq"][:1]


def other_order(weights, state):
    state["parameters"].reverse()


def another_class(weights, state):
    state["optimizer_class"] = "SGD"


def fewer_parameters(weights, state):
    state["optimizer"]["param_groups"][0]["params"].pop()


def repeated_parameters(weights, state):
    state["optimizer"]["param_groups"][0]["params"][1] = 0


def whole_numbers(weights, state):
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].long()


def no_groups(weights, state):
    del state["optimizer"]["param_groups"]


def no_optimizer(weights, state):
    del state["optimizer"]


def averages_of_others(weights, state):
    state["ema"]["parameters"].popitem()


def nan(weights, state):
    next(value for value in weights.values() if value.is_floating_point()).view(-1)[0] = torch.nan


def single_precision(weights, state):
    weights.update({name: value.float() for name, value in weights.items() if value.is_floating_point()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moments_of_other_shapes, r"exp_avg of .* has shape \(3, 5, 7\), and the parameter"),
        (fewer_moments, "exp_avg_sq of .* has shape"),
        (other_order, "the optimiser's parameters differ: number 0 is"),
        (another_class, "holds the state of SGD, and this run's optimiser is Adam"),
        (fewer_parameters, "parameters by group"),
        (repeated_parameters, "parameters by group"),
        (whole_numbers, "no floating-point number"),
        (no_groups, "holds no state of an optimiser"),
        (no_optimizer, r"lacks \['optimizer'\]"),
        (averages_of_others, "moving averages are of other parameters"),
        (nan, "holds NaN in"),
        (single_precision, "has other dtypes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("compiled", [False, {"backend": "eager"}], ids=["eager", "compiled"])
def test_a_state_that_does_not_fit_is_refused_before_anything_is_touched(run_dir, change, message, compiled):
    rewritten(run_dir, change)
    config = json.loads((run_dir / "config.json").read_text())
    config["settings"]["compile"] = compiled
    files.write_config(run_dir, {k: v for k, v in config.items() if k != "sha256"})
    before = contents(run_dir)
    with pytest.raises(CheckpointError, match=message):
        train(run_dir, compile=compiled)
    assert contents(run_dir) == before


def pair_and_data():
    torch.manual_seed(0)
    pyro.clear_param_store()
    return *vae(4, 2, hidden=(5,)), torch.rand(20, 4).round()


def simple(run_dir, **options):
    model, guide, x = pair_and_data()
    settings = {"bound": TraceELBO(), "steps": 4, "batch_size": 5, "seed": 1, "optimizer": adam, "resume": True}
    return fit(model, guide, **{"data": x, "run_dir": run_dir} | settings | options, **quiet)


OTHER = {
    "data": ({"data": torch.ones(20, 4, dtype=torch.float64)}, r"data\.0 was \(20, 4\) torch.float64 #\w+, and is"),
    "one value": ({"data": None}, r"data\.0 was"),
    "rows": ({"data": torch.ones(10, 4, dtype=torch.float64)},
             r"data\.0 was \(20, 4\) .* \(10, 4\).*data_size was 20, and is 10 now"),
    "N": ({"data_size": 40}, "data_size was 20, and is 40 now"),
    "batch_size": ({"batch_size": 10}, "batch_size was 5, and is 10 now"),
    "bound": ({"bound": IWELBO(2)}, r"bound\.class was pyro_hvae.bounds.elbo.TraceELBO, and is"),
    "particles": ({"bound": TraceELBO(2)}, r"bound\.num_particles was 1, and is 2 now"),
    "seed": ({"seed": 2}, "seed was 1, and is 2 now"),
    "schedule": (
        {"schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)}, "schedule was None, and is",
    ),
    "ema": ({"ema": 0.9}, r"ema was None, and is 0\.9 now"),
    "transform": ({"transform": torch.bernoulli}, "transform was None, and is"),
    "clip": ({"clip_norm": 1.0}, r"clip_norm was None, and is 1\.0 now"),
    "optimizer": ({"optimizer": torch.optim.RMSprop}, r"optimizer\.class was torch.optim.adam.Adam, and is torch"),
    "rate": ({"optimizer": None}, r"optimizer\.groups\.lr was 0\.01, and is 0\.001 now"),
    "accumulate": ({"accumulate": 2}, "accumulate was 1, and is 2 now"),
    "shuffle": ({"shuffle": False}, "shuffle was True, and is False now"),
    "drop_last": ({"drop_last": True}, "drop_last was False, and is True now"),
    "precision": ({"precision": "bf16"}, "precision was None, and is bf16 now"),
    "compile": ({"compile": {"backend": "eager"}}, "compile was False, and is"),
    "validation": ({"validation": torch.ones(5, 4, dtype=torch.float64)}, "validation was None, and is"),
}  # fmt: skip


@pytest.fixture(scope="module")
def simple_run(tmp_path_factory):
    torch.set_default_dtype(torch.float64)
    path = tmp_path_factory.mktemp("runs") / "simple"
    simple(path)
    return path


@pytest.mark.parametrize("what", OTHER)
def test_another_setting_is_named_and_anyway_takes_it(simple_run, tmp_path, what):
    shutil.copytree(simple_run, tmp_path / "run")
    options, message = OTHER[what]
    if what == "one value":
        data = pair_and_data()[2]
        data[7, 2] = 1 - data[7, 2]
        options = {"data": data}
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"started with other settings: .*{message}.*resume='anyway'"):
        simple(tmp_path / "run", steps=6, **options)
    assert contents(tmp_path / "run") == before
    with pytest.warns(UserWarning, match=f"{message}.*The run goes on with those of now"):
        result = simple(tmp_path / "run", steps=6, **(options | {"resume": "anyway"}))
    assert result.steps == 6
    simple(tmp_path / "run", steps=7, **options)  # the new settings are the run's from now on


def rate_at_the_end(path, optimizer, schedule):
    rates = []

    class Rate:
        def on_step(self, run, loss):
            rates.append(run.rate)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        simple(path, steps=6, optimizer=optimizer, schedule=schedule, callbacks=[Rate()], resume="anyway")
    return rates


def test_anyway_takes_the_new_rate_and_goes_on_in_the_new_schedule(simple_run, tmp_path):
    shutil.copytree(simple_run, tmp_path / "run")
    assert rate_at_the_end(tmp_path / "run", functools.partial(torch.optim.Adam, lr=0.5), None) == [0.5, 0.5]
    linear = torch.optim.lr_scheduler.LambdaLR
    simple(tmp_path / "steps", schedule=lambda o: linear(o, lambda step: 0.9**step))
    halved = rate_at_the_end(tmp_path / "steps", adam, lambda o: linear(o, lambda step: 0.5**step))
    assert halved[-1] == pytest.approx(0.01 * 0.5**6)


def test_what_is_no_setting_may_change(simple_run, tmp_path):
    shutil.copytree(simple_run, tmp_path / "run")
    x = pair_and_data()[2].numpy()
    simple(tmp_path / "run", steps=9, log_every=2, keep=5, checkpoint_every=3, check_every=None, seed=None, data=x)


class StopAtStart:
    def on_start(self, run):
        assert (run.run_dir / "config.json").exists()
        os._exit(5)


def test_a_run_exists_from_its_first_byte(tmp_path):
    assert in_a_process(functools.partial(simple, tmp_path, callbacks=[StopAtStart()])) == 5
    with pytest.raises(FileExistsError, match=r"it has no checkpoint yet.*resume=True to start it again"):
        simple(tmp_path, resume=False)
    simple(tmp_path)
    with pytest.raises(FileExistsError, match="last checkpoint is step-00000004"):
        simple(tmp_path, resume=False)


def test_best_belongs_to_its_run(tmp_path):
    held_out = pair_and_data()[2][:5]
    simple(tmp_path / "first", validation=held_out, validate_every=1)
    simple(tmp_path / "second", validation=held_out, validate_every=1)
    best = tmp_path / "second" / "checkpoints" / "best"
    shutil.rmtree(best)
    shutil.copytree(tmp_path / "first" / "checkpoints" / "best", best)
    with pytest.raises(CheckpointError, match="best belongs to another run"):
        load(tmp_path / "second", which="best")
    for path in files.checkpoints(tmp_path / "second" / "checkpoints"):
        shutil.rmtree(path)
    simple(tmp_path / "second")  # starts again, and nothing of the earlier start is left
    assert not best.exists()
    assert len(History.read(tmp_path / "second" / "history.jsonl")) == 1


def test_two_runs_do_not_share_a_directory(tmp_path):
    refused = []

    class Second:
        def on_step(self, run, loss):
            if run.step == 2:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()
                assert in_a_process(functools.partial(simple, tmp_path)) == 70

    def second():
        try:
            simple(tmp_path)
        except RuntimeError as error:
            refused.append(str(error))

    simple(tmp_path, callbacks=[Second()])
    assert "is in use by another thread of this process" in refused[0]
    simple(tmp_path, steps=5)


class Wait:
    def on_start(self, run):
        (run.run_dir / "waiting").touch()
        time.sleep(600)


def test_the_lock_names_its_process_and_goes_with_it(tmp_path):
    child = start(functools.partial(simple, tmp_path, callbacks=[Wait()]))
    while not (tmp_path / "waiting").exists():
        assert child.is_alive()
        time.sleep(0.05)
    with pytest.raises(RuntimeError, match=f"in use by process {child.pid} on "):
        simple(tmp_path)
    child.kill()
    child.join()
    simple(tmp_path)


def test_callbacks_get_their_own_state_back(tmp_path):
    class Other:
        def state_dict(self):
            return {"calls": 3}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    held_out = pair_and_data()[2][:5]
    simple(tmp_path, validation=held_out, callbacks=[Other(), EarlyStopping(patience=3)])
    stopping, other = EarlyStopping(patience=3), Other()
    simple(tmp_path, validation=held_out, callbacks=[stopping, other])
    assert other.calls == 3
    assert stopping.best < float("inf")


def learned_times(run_dir, **options):
    """A diffusion whose bound learns the times it draws."""
    torch.manual_seed(1)
    pyro.clear_param_store()
    x = torch.randn(60, 3)
    model, guide = vdm(DenoisingMLP(3, hidden=8), event_shape=3, num_layers=40)
    torch.manual_seed(2)
    bound = DiffusionELBO(sampling="importance")
    return fit(model, guide, x, bound=bound, run_dir=run_dir, resume=True, steps=40, batch_size=7, checkpoint_every=4,
               ema=0.9, optimizer=adam, **options, **quiet)  # fmt: skip


def kill_learned_times(tmp_path, kills):
    whole = learned_times(tmp_path / "whole")
    assert whole.steps == 40
    expected = end_of(tmp_path / "whole")
    assert len(expected[1]["bound.magnitudes"].unique()) > 2
    for number in range(kills):
        step = random.Random(number).randrange(1, 40)
        path = tmp_path / f"killed-{number}"
        assert in_a_process(functools.partial(learned_times, path, callbacks=[KillAt(step)])) == -9
        assert in_a_process(functools.partial(learned_times, path)) == 0
        assert_same_end(end_of(path), expected)


def test_a_killed_run_with_learned_times_resumes_bit_for_bit(tmp_path):
    kill_learned_times(tmp_path, 1)


@pytest.mark.slow
def test_twenty_kills_with_learned_times(tmp_path):
    kill_learned_times(tmp_path, 20)


@pytest.mark.slow
def test_twenty_kills_of_a_compiled_run(tmp_path):
    kill_and_resume(tmp_path, kills=10, seed=3, compile={"backend": "eager"})  # each killed twice


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    kill_and_resume(tmp_path, kills=10, seed=4)


def test_adafactor_and_others_resume(tmp_path):
    """Each optimiser's state is checked by its own shapes."""
    for kind in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adafactor, torch.optim.AdamW):
        optimizer = functools.partial(kind, lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        simple(tmp_path / kind.__name__, optimizer=optimizer)
        simple(tmp_path / kind.__name__, optimizer=optimizer, steps=8)
        simple(tmp_path / "whole", optimizer=optimizer, steps=8)
        ends = [files.read_weights(files.latest(tmp_path / n / "checkpoints")) for n in (kind.__name__, "whole")]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
        shutil.rmtree(tmp_path / "whole")
