"""A variational diffusion model on handwritten digits: held-out bits, digits on demand, and the schedule it learns.

    python examples/vdm_digits.py [--short] [--out DIR]

Writes vdm_digits.png.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pyro.poutine as poutine
import torch
import torch.nn.functional as F

import pyro_hvae as ph
from pyro_hvae.data import digits
from pyro_hvae.diffusion import BinnedGaussian, LearnedSchedule, guided
from pyro_hvae.nn import UNet

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
steps = 20 if options.short else 1500
torch.manual_seed(0)

data = digits(flat=False)
train, test = 2 * data.train - 1, 2 * data.test - 1  # 17 grey levels from -1 to 1
labels, test_labels = (F.one_hot(y, 10).float() for y in (data.train_labels, data.test_labels))


def forget_some(x, context):
    """One label in ten is left out, so that the network learns the digits without labels too."""
    return {"x": x, "context": context * (torch.rand(len(x), 1) > 0.1)}


schedule = LearnedSchedule(-8.0, 6.0)
likelihood = BinnedGaussian(schedule, event_dim=3, levels=17)
parts = {"event_shape": (1, 8, 8), "schedule": schedule, "likelihood": likelihood}
network = UNet(1, channels=(8,) if options.short else (32, 64), context_features=10)
pair = ph.vdm(network, num_layers=None, **parts)  # trained in continuous time
keywords = {"steps": steps, "batch_size": 128, "ema": 0.99, "log_every": steps // 10, "progress": False}
result = ph.fit(
    *pair,
    {"x": train, "context": labels},
    bound=ph.DiffusionELBO(),
    transform=forget_some,
    schedule=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps),
    **keywords,
)
for record in result.history:
    print(f"step {record['step']:5d}   {record['loss'] / (64 * math.log(2)):.3f} bits a pixel")

with result.averages.applied(), torch.no_grad():
    print("\nheld-out images, bits a pixel")
    for name, term in ph.DiffusionELBO(1 if options.short else 100).terms(*pair, test, context=test_labels).items():
        print(f"{name:20s} {float(term.mean()) / (64 * math.log(2)):7.3f}")
    # Any number of layers will do to sample: this is the program whose sites are z200, ..., z1, x.
    layers = 20 if options.short else 200
    sampler, _ = ph.vdm(guided(network, torch.zeros(10), weight=1.0), num_layers=layers, **parts)
    trace = poutine.trace(sampler).get_trace(context=torch.eye(10).repeat(2, 1))
    gamma = schedule(torch.linspace(0, 1, 200))

sites = {f"t = {t}": f"z{round(t * layers)}" for t in (1, 0.85, 0.7, 0.55, 0.4)} | {"x": "x"}
left, right = plt.figure(figsize=(8, 5.4), layout="constrained").subfigures(1, 2, width_ratios=(1.3, 1))
for (name, site), axis in zip(sites.items(), left.subplots(6, 1)):
    images = trace.nodes[site]["value"].reshape(2, 10, 8, 8)
    axis.imshow(images.transpose(1, 2).reshape(16, 80), cmap="gray_r", vmin=-1, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.set_ylabel(name, rotation=0, ha="right", va="center")
axis = right.subplots()
axis.plot(torch.linspace(0, 1, 200), gamma)
axis.plot([0, 1], gamma[[0, -1]], ":", color="0.5")
axis.set(xlabel="time t", ylabel="gamma = -log SNR", title="learned; dotted: linear")
options.out.mkdir(parents=True, exist_ok=True)
plt.savefig(options.out / "vdm_digits.png", dpi=150)
