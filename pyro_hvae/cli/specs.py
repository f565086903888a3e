"""Convert words of a command line into objects, programs and data."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from inspect import isfunction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_hvae import models
from pyro_hvae.amortized import amortize
from pyro_hvae.cli.words import FILES, TABLES, is_code, suggest
from pyro_hvae.data import binarize, digits, idx_folder, table
from pyro_hvae.problem.reading import read_data
from pyro_hvae.training.feed import as_batch
from pyro_hvae.training.trust import UntrustedError

__all__ = [
    "Redrawn", "absolute", "full_name", "load_data", "load_object", "make", "make_pair", "place_of", "thresholded",
    "with_frame",
]  # fmt: skip

Spec = str | dict[str, Any]


def load_object(path: str) -> Any:
    """Import an object by name.

    Args:
        path: ``file.py:name``, ``package.module:name`` or ``package.module.name``.

    Raises:
        ImportError: if there is no such module, or it has no such name, with the names that it has.
        FileNotFoundError: if there is no such file.

    Example:
        >>> load_object("math.pi"), load_object("math:pi") == load_object("math.pi")
        (3.141592653589793, True)
    """
    place, colon, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    if not place:
        raise ImportError(f"{path!r} is not the path of an object: write file.py:name or package.module:name.")
    if colon == ":" and place.endswith(".py"):
        module = _module_of(Path(place))
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ImportError(f"can't import {place!r} of {path!r}: {error}.") from error
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = sorted(key for key in getattr(value, "__dict__", {}) if not key.startswith("_"))
            near = suggest(part, known)
            raise ImportError(f"{place!r} has no {part!r}{near}; it has {', '.join(known[:20]) or 'nothing'}.")
        value = getattr(value, part)
    return value


def make(spec: Any, made: Mapping[str, Any] | None = None) -> Any:
    """Build the object that a specification in YAML describes.

    ``{class_path: path, args: [...], init_args: {...}}`` is a call of that class or function, ``{object: path}`` the
    object itself, a string ``$name`` an object in ``made``. Items of lists and mappings are built one by one; other
    values are returned unchanged.

    Example:
        >>> make({"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 1}})
        Linear(in_features=2, out_features=1, bias=True)
    """
    made = made or {}
    if isinstance(spec, str) and spec.startswith("$"):
        if spec[1:] not in made:
            raise ValueError(f"{spec!r} is not among the objects made before it: {sorted(made)}.")
        return made[spec[1:]]
    if isinstance(spec, Mapping):
        if "class_path" in spec:
            extra = set(spec) - {"class_path", "args", "init_args"}
            if extra:
                raise ValueError(f"class_path takes args and init_args only, got {sorted(extra)}.")
            positional, named = make(spec.get("args") or [], made), make(spec.get("init_args") or {}, made)
            return load_object(spec["class_path"])(*positional, **named)
        if set(spec) == {"object"}:
            return load_object(spec["object"])
        return {key: make(value, made) for key, value in spec.items()}
    if isinstance(spec, (list, tuple)):
        return [make(value, made) for value in spec]
    return spec


def make_pair(
    pair: str | None = None,
    pair_args: Mapping[str, Any] | None = None,
    model: Spec | None = None,
    guide: Spec | None = None,
    example: str | None = None,
) -> tuple[Any, Any]:
    """Build a model and a guide from the arguments of a command line or of a run directory.

    Args:
        pair: path of a function that returns (model, guide).
        pair_args: its arguments.
        model: path of a program, or a specification for :func:`make`; instead of ``pair``.
        guide: the same for the guide, which may refer to ``$model``; ``amortize`` makes one from the model.
        example: data for ``amortize``, as in :func:`load_data`.

    Raises:
        ValueError: for neither of the two ways, or both; or a function that returns no pair.
    """
    if (pair is None) == (model is None) or (model is None) != (guide is None):
        raise ValueError("name the programs either by pair, or by model and guide.")
    if pair is not None:
        function = load_object(full_name(pair))
        if not callable(function):
            raise ValueError(f"{pair} must be a function that returns (model, guide), got {type(function).__name__}.")
        programs = function(**make(dict(pair_args or {})))
        if not isinstance(programs, tuple) or len(programs) != 2:
            raise ValueError(f"{pair} must return (model, guide), got {type(programs).__name__}.")
        return programs
    assert model is not None
    assert guide is not None
    first = _program(model, {})
    if guide == "amortize":
        if example is None:
            raise ValueError("guide amortize is made from a model and example data: name the data.")
        args, kwargs = as_batch(load_data(example)[0])
        return first, amortize(first, *args, **kwargs)
    return first, _program(guide, {"model": first})


def full_name(pair: str) -> str:
    """Return the path of a pair; a name without a dot is a function of :mod:`pyro_hvae.models`.

    Raises:
        ValueError: for such a name that is none, with the nearest one.

    Example:
        >>> full_name("hvae")
        'pyro_hvae.models.hvae'
    """
    if "." in pair or ":" in pair:
        return pair
    known = [name for name in models.__all__ if isfunction(getattr(models, name))]
    if pair not in known:
        raise ValueError(f"there is no pair {pair!r}{suggest(pair, known)}: name one of {', '.join(known)}, or a "
                         "function as package.module.name or file.py:name.")  # fmt: skip
    return f"pyro_hvae.models.{pair}"


def with_frame(pair: str | None, pair_args: dict[str, Any] | None, data: str) -> dict[str, Any] | None:
    """Return the arguments of a pair of tables, with the columns of a data file; those of other pairs unchanged.

    The columns are recorded (names, families, means, labels), so that a run directory needs no data to be loaded.

    Args:
        pair: full name of the function.
        pair_args: its arguments.
        data: as in :func:`load_data`.
    """
    if pair != "pyro_hvae.models.table_vae" or "frame" in (pair_args or {}):
        return pair_args
    if Path(data).suffix not in TABLES:
        raise ValueError(f"table_vae is made of the columns of a table, and the data are {data!r}: name a file "
                         f"{' or '.join(TABLES)}.")  # fmt: skip
    return {"frame": table(_read(data, _frame)).schema.record(), **(pair_args or {})}


def load_data(spec: str, *, source: Any = None, model: Any = None) -> tuple[Any, Any]:
    """Load data by name.

    Args:
        spec: ``digits``; ``idx:FOLDER`` in MNIST's format; a file ``.npy`` (one array), ``.npz`` (arrays by the names
            of the programs' arguments), ``.pt`` (tensor, tuple or dict), ``.csv`` or ``.parquet`` (a table of numbers,
            one row a datum; any columns for a model that reads tables); or the path of an object or function in Python,
            ``file.py:name``.
        source: the file that names it, which is not trusted; Python is refused then.
        model: the model that gets the data.

    Returns:
        Data to train on and data held out, or ``None``. Each is a tensor, a tuple (positional arguments) or a
        dict (by name), floats in the default dtype.

    Raises:
        ValueError: for an unknown name, or a damaged file.
        FileNotFoundError: for a missing file.
        UntrustedError: for Python named by an untrusted file.
    """
    if not isinstance(spec, str) or not spec:
        raise ValueError(f"data must be a name, got {spec!r}.")
    if source is not None and is_code(spec):
        raise UntrustedError(
            f"{source} would run {spec!r} to get the data. If you trust whoever wrote it, pass --trust, or name the "
            "data by --data"
        )
    if spec == "digits":
        split = digits()
        return split.train, split.test
    if spec.startswith("idx:"):
        split = idx_folder(spec.removeprefix("idx:"))
        return split.train, split.test
    suffix = Path(spec).suffix
    if suffix in TABLES and getattr(model, "schema", None) is not None:
        return _tensors(read_data(model, _read(spec, _frame))), None
    if suffix in FILES:
        return _tensors(_read(spec, _READERS[suffix])), None
    if ":" in spec or "." in spec:
        data = load_object(spec)
        return _tensors(data() if callable(data) else data), None
    raise ValueError(
        f"data can't be {spec!r}{suggest(spec, ['digits'])}: name digits, idx:FOLDER, a file {', '.join(FILES)}, or an "
        "object as file.py:name."
    )


def thresholded(data: Any, threshold: float) -> Any:
    """Binarise the first tensor of the data, or ``x`` of a dict, by a threshold."""
    return _first(data, lambda x: binarize(x, threshold=threshold))


class Redrawn:
    """Transform that binarises the first tensor of a batch, or ``x``, anew at each call."""

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return _first(kwargs or args, binarize)

    def __repr__(self) -> str:
        return "Redrawn()"


def absolute(spec: Any) -> Any:
    """Return a specification with absolute paths of files, which is valid in any working directory."""
    if isinstance(spec, str) and ".py:" in spec:
        place, _, name = spec.rpartition(":")
        return f"{Path(place).resolve()}:{name}"
    if isinstance(spec, str) and Path(spec).suffix in FILES:
        return str(Path(spec).resolve())
    if isinstance(spec, str) and spec.startswith("idx:"):
        return f"idx:{Path(spec.removeprefix('idx:')).resolve()}"
    if isinstance(spec, Mapping):
        return {key: absolute(value) for key, value in spec.items()}
    return [absolute(value) for value in spec] if isinstance(spec, (list, tuple)) else spec


def _arrays(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _read(path: str, reader: Callable[[str], Any]) -> Any:
    """Read a data file, with one kind of error for all that is wrong with its content."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path!r} to read data from.")
    try:
        return reader(path)
    except ImportError as error:
        extra = ": pip install 'pyro-hvae[parquet]'" if path.endswith(".parquet") else ""
        raise ImportError(f"reading {path} needs another package{extra} ({error}).") from error
    except Exception as error:  # each reader raises errors of its own
        raise ValueError(
            f"{path} is damaged, or no {Path(path).suffix} file of arrays ({type(error).__name__}: {error})."
        ) from error


def _frame(path: str) -> Any:
    import pandas

    return pandas.read_csv(path) if path.endswith(".csv") else pandas.read_parquet(path)


def _table(path: str) -> np.ndarray:
    """Read a table of numbers, (N, columns); True and False are 1 and 0."""
    frame = _frame(path)
    words = [str(name) for name in frame.columns if frame[name].dtype.kind not in "fiub"]
    if words:
        raise ValueError(
            f"the columns {words} hold no numbers: code them as numbers first, or train --pair table_vae, which "
            "takes them as they are"
        )
    if frame.isna().to_numpy().any():
        missing = [str(name) for name in frame.columns if frame[name].isna().any()]
        raise ValueError(
            f"entries of the columns {missing} are missing: fill them, drop their rows, or train --pair table_vae"
        )
    return frame.to_numpy(dtype=np.float64)


_READERS: dict[str, Callable[[str], Any]] = {
    ".npy": partial(np.load, allow_pickle=False),
    ".npz": _arrays,
    ".pt": partial(torch.load, weights_only=True, map_location="cpu"),
    ".csv": _table,
    ".parquet": _table,
}


def _module_of(file: Path) -> Any:
    """Import a Python file, once per process, and add its folder to the import path."""
    file = file.resolve()
    name = f"_pyro_hvae_{file.stem}_{abs(hash(file)):x}"
    if name in sys.modules:
        return sys.modules[name]
    if not file.exists():
        raise FileNotFoundError(f"no file {str(file)!r}.")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ImportError(f"{place_of(error, file)} stopped with {type(error).__name__}: {error}") from error
    except BaseException:
        del sys.modules[name]
        raise
    return module


def place_of(error: BaseException, default: Any = "") -> str:
    """Return file and line of an error: the last line outside of this library and of installed packages."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    place, trace = str(default), error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not any(part in file for part in _INSTALLED) and not file.startswith("<"):
            place = f"{file}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return place


_INSTALLED = (str(Path(__file__).parent.parent), "site-packages", "dist-packages", str(Path(inspect.__file__).parent))


def _program(spec: Spec, made: Mapping[str, Any]) -> Any:
    program = load_object(spec) if isinstance(spec, str) else make(spec, made)
    if isinstance(program, type):
        program = program()
    if not callable(program):
        raise ValueError(f"a program must be callable; {spec!r} is {type(program).__name__}.")
    return program


def _tensors(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _tensors(value) for name, value in data.items()}
    if isinstance(data, (tuple, list)):
        return tuple(_tensors(value) for value in data)
    if isinstance(data, (np.ndarray, Tensor)):
        tensor = torch.as_tensor(data)
        return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor
    raise ValueError(f"data must be arrays or tensors, alone, in a tuple or in a dict; got {type(data).__name__}.")


def _first(data: Any, change: Any) -> Any:
    if isinstance(data, Mapping):
        name = "x" if "x" in data else next(iter(data))
        return {**data, name: change(data[name])}
    if isinstance(data, tuple):
        return (change(data[0]), *data[1:])
    return change(data)
