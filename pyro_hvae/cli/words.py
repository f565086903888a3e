"""Prepare the words of a command line, and check its YAML file, before jsonargparse reads them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_hvae.training.trust import UntrustedError, check_trusted

__all__ = ["FILES", "TABLES", "check_config", "flags_of", "is_code", "prepare", "suggest"]


def suggest(word: str, names: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"``, or nothing if no name is close.

    Example:
        >>> suggest("IWEBLO", ["IWELBO", "TraceELBO"])
        " (did you mean 'IWELBO'?)"
    """
    known = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f" (did you mean {known[close[0]]!r}?)" if close else ""


def flags_of(*verbs: Callable[..., Any]) -> dict[str, bool]:
    """Return the parameters of functions by name, and whether each is a switch."""
    return {
        name: parameter.annotation in (bool, "bool")
        for verb in verbs
        for name, parameter in inspect.signature(verb).parameters.items()
    }


def prepare(words: Sequence[str], flags: Mapping[str, bool]) -> list[str]:
    """Give plain switches their value, take dashes for underscores, and name the optimiser of ``--optimizer.lr``.

    Raises:
        ValueError: for an unknown flag, with the nearest one.
    """
    done: list[str] = []
    for place, word in enumerate(words):
        if not word.startswith("--") or word == "--":
            done.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        head = name.partition(".")[0].replace("-", "_").removesuffix("+")
        if head in ("config", "help", "print_config", "version"):
            done.append(word)
            continue
        off = head.removeprefix("no_")
        if head not in flags and head != off and flags.get(off):
            done += [f"--{off}", "false"]
            continue
        if head not in flags:
            raise ValueError(f"there is no --{name}{suggest(head, flags)}")
        rest = name[len(head) :]
        done.append(f"--{head}{rest}{equals}{value}")
        following = words[place + 1].lower() if place + 1 < len(words) else ""
        if flags[head] and not equals and following not in ("true", "false", "yes", "no", "null"):
            done.append("true")
    named = any(word.startswith(("--optimizer=", "--config")) or word == "--optimizer" for word in done)
    first = next((place for place, word in enumerate(done) if word.startswith("--optimizer.")), None)
    if first is not None and not named:
        done.insert(first, "--optimizer=Adam")
    return done


def check_config(words: Sequence[str], trust: bool) -> None:
    """Refuse YAML that names anything but this library's own, torch's and Pyro's classes.

    Raises:
        UntrustedError: naming what would be called or imported.
        ValueError: for a file that is no YAML mapping, or that names another file.
    """
    import yaml

    for place, word in enumerate(words):
        if not word.startswith("--config"):
            continue
        name, _, value = word.partition("=")
        if name != "--config":
            raise ValueError(f"{name} is not understood: write --config FILE")
        source = value or (words[place + 1] if place + 1 < len(words) else "")
        try:
            text = Path(source).read_text(encoding="utf-8") if Path(source).is_file() else source
            content = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
            raise ValueError(f"{source} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"--config {source!r} is no file, or no mapping of arguments")
        if "config" in content:
            raise ValueError(f"{source} names another config file, which is not read: write its entries here")
        if not trust:
            _check_entries(content, source)


def _check_entries(content: Mapping[str, Any], source: str) -> None:
    spec = dict(content)
    if isinstance(spec.get("pair"), str) and not {".", ":"} & set(spec["pair"]):
        del spec["pair"]  # a short name of a ready-made pair
    for name in ("bound", "optimizer"):
        value = spec.get(name)
        if isinstance(value, str):
            spec[name] = value = {"class_path": value}
        if isinstance(value, Mapping):
            spec[name] = _without_short_names(value)
    check_trusted(spec, source, False)
    for name in ("data", "held_out"):
        value = spec.get(name)
        if isinstance(value, str) and is_code(value):
            raise UntrustedError(
                f"{source} would run {value!r} as its {name}, which is Python. If you trust whoever wrote it, pass "
                f"--trust, or give {name} on the command line"
            )


def _without_short_names(value: Any) -> Any:
    """Drop class paths without a dot, which only name a class that the argument accepts."""
    if isinstance(value, Mapping):
        return {
            key: _without_short_names(item)
            for key, item in value.items()
            if not (key == "class_path" and isinstance(item, str) and item.isidentifier())
        }
    return [_without_short_names(item) for item in value] if isinstance(value, list) else value


FILES = (".npy", ".npz", ".pt", ".csv", ".parquet")
"""Suffixes of data files; none of them is executed."""

TABLES = (".csv", ".parquet")
"""Suffixes of those that hold a table."""


def is_code(data: str) -> bool:
    """Whether a name of data is an object in Python."""
    return data != "digits" and not data.startswith("idx:") and Path(data).suffix not in FILES
