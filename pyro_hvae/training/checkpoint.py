"""Checkpoints, written atomically.

A run directory holds::

    config.json                     how to build the programs again, and the arguments of fit
    history.jsonl                   one record a line
    checkpoints/step-00001200/      weights.safetensors, state.pt, checksums.json
    checkpoints/best/               the same, at the best validation loss

A checkpoint is written into a temporary directory, forced to the disk, and renamed, so no partial one remains.
Weights are plain tensors; ``state.pt`` (optimiser, schedules, averages, position in the data, generators) is read
with ``weights_only``, so that no checkpoint can run code.  ``checksums.json`` has the SHA-256 of both, and the number
of the run that they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pyro_hvae.training.files import CheckpointError, digest, inside, sync, write, write_atomically

__all__ = [
    "CheckpointError",
    "check_weights",
    "checkpoints",
    "find",
    "generators",
    "latest",
    "read_config",
    "read_state",
    "read_weights",
    "restore_generators",
    "restore_weights",
    "save",
    "tidy",
    "verify",
    "write_config",
]

FORMAT = 2
READ = (1, 2)
"""Formats of ``config.json`` that this version reads; the first had no checksums and no settings."""

WEIGHTS, STATE, CONFIG, CHECKSUMS = "weights.safetensors", "state.pt", "config.json", "checksums.json"


def save(
    directory: Path,
    name: str,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: int | None = None,
    run: str | None = None,
) -> Path:
    """Write a checkpoint atomically, then drop all but the ``keep`` newest numbered ones.

    Args:
        run: the number of the run, of its ``config.json``.

    Raises:
        OSError: if it cannot be written (a full disk, say); earlier checkpoints are untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target, temporary = directory / name, directory / f".{name}.tmp-{os.getpid()}"
    try:
        temporary.mkdir()
        write(temporary / WEIGHTS, _pack(weights))
        with open(temporary / STATE, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        sums = {name: digest(temporary / name) for name in (WEIGHTS, STATE)}
        write(temporary / CHECKSUMS, json.dumps({"run": run, "sha256": sums}).encode())
        sync(temporary)
        if target.exists():
            aside = directory / f".{name}.old-{os.getpid()}"
            target.rename(aside)
            temporary.rename(target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(target)
        sync(directory)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = latest(directory)
        earlier = f"the last good one is {last}" if last else "there is none before it"
        raise OSError(f"could not write checkpoint {target}: {error}; {earlier}") from error
    if keep is not None:
        for old in checkpoints(directory)[:-keep]:
            aside = directory / f".{old.name}.old-{os.getpid()}"
            old.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    return target


def tidy(directory: Path) -> None:
    """Clean up after a killed run: restore a renamed checkpoint, remove partial ones."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        match = re.fullmatch(r"\.(.+)\.(old|tmp)-\d+", path.name)
        if match is None:
            continue
        target = directory / match[1]
        replaced = match[1] == "best" or not checkpoints(directory) or match[1] > checkpoints(directory)[-1].name
        if match[2] == "old" and replaced and not target.exists():  # killed between the two renames
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def checkpoints(directory: Path) -> list[Path]:
    """Return the numbered checkpoints of a run, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def latest(directory: Path) -> Path | None:
    """Return the newest numbered checkpoint, or None."""
    numbered = checkpoints(directory)
    return numbered[-1] if numbered else None


def _pack(weights: Mapping[str, Tensor]) -> bytes:
    """Serialise the distinct tensors; further names of the same tensor go into the metadata."""
    unique: dict[str, Tensor] = {}
    names: dict[tuple, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in names:
            aliases[name] = names[key]
            continue
        names[key] = name
        unique[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    return safetensors.torch.save(unique, metadata={"aliases": json.dumps(aliases), "format": "pt"})


def verify(checkpoint: Path, run: str | None = None) -> None:
    """Compare the files of a checkpoint with their checksums, and its run with ``run``.

    Raises:
        CheckpointError: naming the file that is missing or differs, or the checkpoint of another run.
    """
    for name in (WEIGHTS, STATE, CHECKSUMS):
        inside(checkpoint.parent, checkpoint / name)
    for name in (WEIGHTS, STATE):
        if not (checkpoint / name).is_file():
            raise CheckpointError(f"{checkpoint / name} does not exist: {checkpoint} is not a whole checkpoint")
    path = checkpoint / CHECKSUMS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sums, owner = content["sha256"], content["run"]
    except FileNotFoundError:
        warnings.warn(
            f"{checkpoint} has no {CHECKSUMS}, as version 0.1 wrote it: damage to it would not be noticed",
            UserWarning,
            stacklevel=2,
        )
        return
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    for name in (WEIGHTS, STATE):
        if sums.get(name) != digest(checkpoint / name):
            raise CheckpointError(f"{checkpoint / name} is damaged: its SHA-256 is not that of {CHECKSUMS}")
    if run is not None and owner != run:
        raise CheckpointError(f"{checkpoint} belongs to another run than {CONFIG} of its directory")


def find(run_dir: Path, which: str, run: str | None) -> Path:
    """Return a verified checkpoint: ``"last"``, ``"best"`` or a name; ``"last"`` goes back to the last whole one.

    Raises:
        CheckpointError: for a name that is none, or a checkpoint that is missing, damaged or of another run.
    """
    directory = inside(run_dir, run_dir / "checkpoints")
    numbered = checkpoints(directory)
    if which == "last" and numbered:
        return whole(numbered, run)
    names = [path.name for path in numbered] + ["best"] * (directory / "best").is_dir()
    if which not in names:
        raise CheckpointError(f"{directory} has no checkpoint {which!r}; it has {names or 'none'}")
    verify(inside(run_dir, directory / which), run)
    return directory / which


def whole(numbered: Sequence[Path], run: str | None) -> Path:
    """Return the newest checkpoint that is whole; warn of those after it.

    Raises:
        CheckpointError: if none is.
    """
    damaged: list[str] = []
    for path in reversed(numbered):
        try:
            verify(path, run)
            read_weights(path)
            read_state(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if damaged:
            what = f"{'; '.join(damaged)}: taking {path.name}, the last that is whole"
            warnings.warn(what, UserWarning, stacklevel=3)
        return path
    raise CheckpointError(f"no checkpoint is whole: {'; '.join(damaged)}")


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint under all their names.

    Raises:
        CheckpointError: naming the file, if it is missing, truncated or something else, or holds NaN.
    """
    path = checkpoint / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {checkpoint} is not a checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        for name, original in json.loads(metadata.get("aliases", "{}")).items():
            weights[name] = weights[original]
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error})") from error
    bad = [name for name, value in weights.items() if value.is_floating_point() and bool(torch.isnan(value).any())]
    if bad:
        raise CheckpointError(f"{path} holds NaN in {_few(bad)}: take an earlier checkpoint by its name")
    return weights


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the trainer's state of a checkpoint.

    Raises:
        CheckpointError: naming the file, if it is missing, truncated or something else.
    """
    path = checkpoint / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {checkpoint} is not a checkpoint of a training run") from None
    except Exception as error:  # torch raises many types
        raise CheckpointError(f"{path} is truncated or no trainer state ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict) or "step" not in state:
        raise CheckpointError(f"{path} holds no trainer state")
    return state


def check_weights(own: Mapping[str, Any], weights: Mapping[str, Tensor], source: Path, *, dtypes: bool = False) -> None:
    """Refuse weights whose names or shapes are not those of a module's state.

    Args:
        own: ``module.state_dict()``.
        dtypes: compare dtypes too.

    Raises:
        CheckpointError: naming the file and the differences.
    """
    missing, extra = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    wrong = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in the program"
        for name in sorted(set(own) & set(weights))
        if isinstance(own[name], Tensor) and own[name].shape != weights[name].shape
    ]
    others = [
        f"{name}: {weights[name].dtype} in the file, {own[name].dtype} in the program"
        for name in sorted(set(own) & set(weights))
        if dtypes and own[name].dtype != weights[name].dtype
    ]
    parts = []
    if missing:
        parts.append(f"lacks {_few(missing)}")
    if extra:
        parts.append(f"has {_few(extra)}, which the program does not")
    if wrong:
        parts.append(f"has other shapes ({_few(wrong)})")
    if others:
        parts.append(f"has other dtypes ({_few(others)})")
    if parts:
        raise CheckpointError(f"{source / WEIGHTS} is of another architecture: it {'; it '.join(parts)}")


def restore_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Copy weights into a module; nothing is changed unless every name and shape fits.

    Raises:
        CheckpointError: naming the file and the differences.
    """
    own = module.state_dict()
    check_weights(own, weights, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def generators() -> dict[str, Any]:
    """Return the states of torch's, numpy's and Python's random number generators."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_generators(state: Mapping[str, Any]) -> None:
    """Restore the states that :func:`generators` returned."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def write_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` atomically, with the SHA-256 of its entries."""
    run_dir.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, **config}
    content["sha256"] = _sum(content)
    write_atomically(run_dir / CONFIG, (json.dumps(content, indent=2) + "\n").encode())


def read_config(run_dir: Path) -> dict[str, Any]:
    """Read the config of a run directory; warn if it has been changed.

    Raises:
        CheckpointError: if there is none, or one of another format.
    """
    path = inside(run_dir, run_dir / CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {run_dir} is not a run directory") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error})") from error
    if not isinstance(config, dict) or config.get("format") not in READ:
        raise CheckpointError(f"{path} is of none of the formats {READ}, which this version reads")
    if config["format"] > 1 and config.pop("sha256", None) != _sum(config):
        warnings.warn(f"{path} has been changed since the run wrote it", UserWarning, stacklevel=2)
    return config


def _sum(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a config, whatever its white space and the order of its entries."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(config)), sort_keys=True).encode()).hexdigest()
