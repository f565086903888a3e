"""A guide made from a model on the command line, and read back from its run directory."""

import pytest
import torch

from pyro_hvae.cli import main
from pyro_hvae.cli.specs import make_pair
from pyro_hvae.training import load

PROGRAMS = """
import pyro
import pyro.distributions as dist
import torch


def data():
    return torch.linspace(-2.0, 3.0, 12)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
"""


def test_fit_and_load(tmp_path):
    file = tmp_path / "local_model.py"
    file.write_text(PROGRAMS)
    words = ["--model", f"{file}:model", "--guide", "amortize", "--steps", "3", "--progress", "false"]
    assert not main(["fit", str(tmp_path / "run"), f"{file}:data", *words])
    _, guide = load(tmp_path / "run", trust=True)
    _, other = load(tmp_path / "run", trust=True)
    assert guide.inverse.inputs == {"z": ("x",)}
    torch.manual_seed(0)
    first = guide(torch.zeros(4))["z"]
    torch.manual_seed(0)
    torch.testing.assert_close(first, other(torch.zeros(4))["z"])
    assert (guide.input("x").center - 0.5).abs() < 1e-6
    with pytest.raises(ValueError, match="name the data"):
        make_pair(model=f"{file}:model", guide="amortize")
