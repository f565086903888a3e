"""Checkpoints, written atomically.

A run directory holds::

    config.json                     how to build the programs again, and the arguments of fit
    history.jsonl                   one record a line
    checkpoints/step-00001200/      weights.safetensors, state.pt
    checkpoints/best/               the same, at the best validation loss

A checkpoint is written into a temporary directory, forced to the disk, and renamed, so no partial one remains.
Weights are plain tensors; ``state.pt`` (optimiser, schedules, averages, position in the data, generators) is read
with ``weights_only``, so that no checkpoint can run code.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = [
    "CheckpointError",
    "checkpoints",
    "generators",
    "latest",
    "read_config",
    "read_state",
    "read_weights",
    "restore_generators",
    "restore_weights",
    "save",
    "tidy",
    "write_config",
]

FORMAT = 1
WEIGHTS, STATE, CONFIG = "weights.safetensors", "state.pt", "config.json"


class CheckpointError(ValueError):
    """Error: a file is no checkpoint, is damaged, or belongs to another architecture."""


def save(
    directory: Path, name: str, weights: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int | None = None
) -> Path:
    """Write a checkpoint atomically, then drop all but the ``keep`` newest numbered ones.

    Raises:
        OSError: if it cannot be written (a full disk, say); earlier checkpoints are untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target, temporary = directory / name, directory / f".{name}.tmp-{os.getpid()}"
    try:
        temporary.mkdir()
        _write(temporary / WEIGHTS, _pack(weights))
        with open(temporary / STATE, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        _sync(temporary)
        if target.exists():
            aside = directory / f".{name}.old-{os.getpid()}"
            target.rename(aside)
            temporary.rename(target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(target)
        _sync(directory)
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


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint under all their names.

    Raises:
        CheckpointError: naming the file, if it is missing, truncated or something else.
    """
    path = checkpoint / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {checkpoint} is not a checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error})") from error
    for name, original in json.loads(metadata.get("aliases", "{}")).items():
        weights[name] = weights[original]
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


def restore_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Copy weights into a module; nothing is changed unless every name and shape fits.

    Raises:
        CheckpointError: naming the file and the differences.
    """
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    wrong = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in the program"
        for name in sorted(set(own) & set(weights))
        if isinstance(own[name], Tensor) and own[name].shape != weights[name].shape
    ]
    if missing or extra or wrong:
        parts = []
        if missing:
            parts.append(f"lacks {_few(missing)}")
        if extra:
            parts.append(f"has {_few(extra)}, which the program does not")
        if wrong:
            parts.append(f"has other shapes ({_few(wrong)})")
        raise CheckpointError(f"{source / WEIGHTS} is of another architecture: it {'; it '.join(parts)}")
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
    """Write ``config.json`` atomically."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f".{CONFIG}.tmp"
    _write(temporary, (json.dumps({"format": FORMAT, **config}, indent=2) + "\n").encode())
    temporary.replace(run_dir / CONFIG)


def read_config(run_dir: Path) -> dict[str, Any]:
    """Read the config of a run directory.

    Raises:
        CheckpointError: if there is none, or one of another format.
    """
    path = run_dir / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {run_dir} is not a run directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON ({error})") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}, the one this version reads")
    return config
