"""The picture of the package: two towers that meet at the top, and an import that changes nothing outside.

Programs know nothing of estimators and estimators nothing of programs; both are checked by reading the source, so that
an import inside a function counts too.
"""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pyro_hvae"

# Each tower from the ground up: a part may import those before it and itself.  Both stand on files that import nothing
# of the package.
GROUND = ["arguments", "devices", "modules", "notebook"]
PROGRAMS = [*GROUND, "conjugate", "distributions", "tables", "nn", "kernels", "chains", "diffusion", "models"]
ESTIMATORS = [*GROUND, "weights", "problem", "bounds", "factorized", "amortized", "evidence", "diagnostics"]
# What trains, draws and runs may import both towers, and is imported by neither.
ABOVE = ["data", "plots", "training", "demo", "cli", "__main__", "_version"]

OPTIONAL = [
    "sklearn",
    "matplotlib",
    "pandas",
    "arviz",
    "arviz_base",
    "arviz_stats",
    "arviz_plots",
    "lightning_fabric",
    "lightning",
    "torchdiffeq",
    "tensorboard",
    "jsonargparse",
    "zuko",
]


def part_of(path):
    """The first name below the package: ``bounds/elbo.py`` is part of ``bounds``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path):
    """The parts of the package that a file imports, wherever in the file it does."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                here = ["pyro_hvae", *path.relative_to(PACKAGE).parts[:-1]]
                module = ".".join([*here[: len(here) - node.level + 1], *filter(None, [module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, *rest = name.split(".")
            if head == "pyro_hvae":
                parts.add(rest[0] if rest else "__init__")
    return parts


def files():
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_towers_meet_only_at_the_top(path):
    part = part_of(path)
    for tower in (PROGRAMS, ESTIMATORS):
        if part in tower:
            allowed = set(tower[: tower.index(part) + 1])
            break
    else:
        assert part in ABOVE, f"{part} has no place in the picture: add it to one of the lists of this file"
        allowed = {*PROGRAMS, *ESTIMATORS, *ABOVE, "__init__", "__version__"}
    assert imported_parts(path) <= allowed, f"{part} may import {sorted(allowed)} only"


@pytest.mark.parametrize("part", GROUND)
def test_the_ground_imports_nothing_of_the_package(part):
    assert imported_parts(PACKAGE / f"{part}.py") == set()


def test_top_imports_go_one_way():
    """The command line may use all; nothing below uses the command line, and data knows of tables alone."""
    for path in files():
        parts = imported_parts(path)
        if part_of(path) not in ("cli", "__main__"):
            assert "cli" not in parts, path
        if part_of(path) == "data":
            assert parts <= {"arguments", "data", "tables"}, path


PROBE = """
import sys, warnings
import torch, pyro
from pyro.distributions import Distribution
def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "validation of distributions": torch.distributions.Distribution._Distribution__validate_args
            if hasattr(torch.distributions.Distribution, "_Distribution__validate_args")
            else torch.distributions.Distribution._validate_args,
        "validation of pyro": pyro.poutine.util.is_validation_enabled(),
        "validation of inference": pyro.infer.util.is_validation_enabled(),
        "pyro settings": sorted(pyro.settings.get().items()),
        "param store": sorted(pyro.get_param_store().keys()),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": repr(__import__("numpy").random.get_state()),
        "python generator": __import__("random").getstate(),
        "warning filters": list(warnings.filters),
        "recursion limit": sys.getrecursionlimit(),
    }
before = state()
modules = set(sys.modules)
import pyro_hvae
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, f"import pyro_hvae changed: {changed}"
taken = sorted({name.split(".")[0] for name in set(sys.modules) - modules} & set(%r))
assert not taken, f"import pyro_hvae took along: {taken}"
print("clean", pyro_hvae.__version__)
"""


def test_import_changes_nothing_and_takes_no_optional_dependency():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE % OPTIONAL], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("clean 0.")


def test_dir_shows_the_public_names_alone():
    import pyro_hvae

    assert dir(pyro_hvae) == sorted(pyro_hvae.__all__)
    assert len(set(pyro_hvae.__all__)) == len(pyro_hvae.__all__)
    internal = [name for name in pyro_hvae.__all__ if name.startswith("_") and name != "__version__"]
    assert not internal


def test_version_is_that_of_its_file():
    import pyro_hvae

    source = (PACKAGE / "_version.py").read_text()
    assert f'__version__ = "{pyro_hvae.__version__}"' in source
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    assert settings["tool"]["hatch"]["version"]["path"] == "pyro_hvae/_version.py"
    citation = (PACKAGE.parent / "CITATION.cff").read_text().splitlines()
    assert [line for line in citation if line.startswith("version:")] == [f"version: {pyro_hvae.__version__}"]


def test_every_public_name_exists_and_every_module_lists_its_own():
    import importlib

    import pyro_hvae

    missing = [name for name in pyro_hvae.__all__ if not hasattr(pyro_hvae, name)]
    assert not missing
    for path in files():
        dotted = ".".join(["pyro_hvae", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        if dotted.endswith("__main__"):
            continue
        module = importlib.import_module(dotted)
        assert module.__doc__, f"{dotted} has no docstring"
        for name in getattr(module, "__all__", []):
            assert hasattr(module, name), f"{dotted}.__all__ lists {name}, which is not there"
