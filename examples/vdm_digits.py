"""A variational diffusion model on handwritten digits: held-out bits, digits on demand, and the schedule it learns.

    python examples/vdm_digits.py [--short]

Writes runs/vdm_digits.png.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pyro.poutine as poutine
import torch
import torch.nn.functional as F

import pyro_hvae as ph
from pyro_hvae.data import digits
from pyro_hvae.diffusion import BinnedGaussian, guided
from pyro_hvae.models import vdm
from pyro_hvae.nn import UNet
from pyro_hvae.schedules import LearnedSchedule

SHORT = "--short" in sys.argv
torch.manual_seed(0)

data = digits(flat=False)
train, test = 2 * data.train - 1, 2 * data.test - 1  # 17 grey levels from -1 to 1
labels, test_labels = (F.one_hot(y, 10).float() for y in (data.train_labels, data.test_labels))


def forget_some(x, context):
    """One label in ten is left out, so that the network learns the digits without labels too."""
    return {"x": x, "context": context * (torch.rand(len(x), 1) > 0.1)}


schedule = LearnedSchedule(-8.0, 6.0)
parts = {
    "event_shape": (1, 8, 8),
    "schedule": schedule,
    "likelihood": BinnedGaussian(schedule, event_dim=3, levels=17),
}
network = UNet(1, channels=(8,) if SHORT else (32, 64), context_features=10)
model, guide = vdm(network, num_layers=None, **parts)  # trained in continuous time
result = ph.fit(
    model,
    guide,
    {"x": train, "context": labels},
    bound=ph.DiffusionELBO(),
    steps=20 if SHORT else 2000,
    batch_size=128,
    transform=forget_some,
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
    schedule=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, 20 if SHORT else 2000),
    ema=0.99,
    log_every=10 if SHORT else 200,
    progress=False,
)
for record in result.history:
    print(f"step {record['step']:5d}   {record['loss'] / (64 * math.log(2)):.3f} bits a pixel")

with result.averages.applied():
    terms = ph.DiffusionELBO(10 if SHORT else 100).terms(model, guide, test, context=test_labels)
    print("\nheld-out images, bits a pixel")
    for name, value in terms.items():
        print(f"{name:20s} {float(value.mean()) / (64 * math.log(2)):7.3f}")
    # Any number of layers will do to sample: this is the program whose sites are z200, ..., z1, x.
    sampler, _ = vdm(guided(network, torch.zeros(10), weight=1.0), num_layers=20 if SHORT else 200, **parts)
    with torch.no_grad():
        trace = poutine.trace(sampler).get_trace(context=torch.eye(10).repeat(2, 1))
        gamma = schedule(torch.linspace(0, 1, 200))

count = sampler.num_layers
sites = {f"t = {t:g}": f"z{max(1, round(t * count))}" for t in (1, 0.8, 0.6, 0.4, 0.2)} | {"x": "x"}
figure = plt.figure(figsize=(10, 3.8), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(2.4, 1))
for name, axis in zip(sites, left.subplots(2, 3).flat):
    images = trace.nodes[sites[name]]["value"].reshape(2, 10, 8, 8)
    axis.imshow(images.transpose(1, 2).reshape(16, 80), cmap="gray_r", vmin=-1, vmax=1)
    axis.set(xticks=[], yticks=[], title=name)
axis = right.subplots()
axis.plot(torch.linspace(0, 1, 200), gamma, label="learned")
axis.plot([0, 1], gamma[[0, -1]], ":", color="0.5", label="linear")
axis.set(xlabel="time t", ylabel="gamma = -log SNR")
axis.legend(frameon=False)
Path("runs").mkdir(exist_ok=True)
figure.savefig("runs/vdm_digits.png", dpi=150)
