"""Sequences of different lengths: a deep Markov model of made-up tunes, its bounds, and how the tunes go on.

    python examples/sequences.py [--short] [--out DIR]

Tunes go through the chords of a cadence, each held for one to three steps, some of whose notes are left out or wrong.
Trained on 200 tunes of 16 to 32 steps, judged on 50 others: the ELBO, importance weights and particles, in nats a step,
beside a model that knows only how frequent each note is. Then four held-out tunes are cut, and forecast. Writes
sequences.png.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch

import pyro_hvae as ph

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
pyro.set_rng_seed(0)

KEYS, LONGEST, CUT = 12, 32, 16
CADENCE = torch.zeros(4, KEYS)
for number, notes in enumerate([(0, 4, 7), (5, 9, 0), (7, 11, 2), (9, 0, 4)]):
    CADENCE[number, list(notes)] = 1.0


def tunes(count):
    """Notes (count, 32, 12), and the numbers of steps of each tune."""
    held = torch.randint(1, 4, (count, LONGEST))
    when = held.cumsum(1)
    step = torch.arange(LONGEST).expand(count, LONGEST).contiguous()
    chord = (torch.searchsorted(when, step, right=True) + torch.randint(4, (count, 1))) % 4
    return torch.bernoulli(0.02 + 0.88 * CADENCE[chord]), torch.randint(16, LONGEST + 1, (count,))


(x, lengths), (new, ends) = tunes(200), tunes(50)
model, guide = ph.deep_markov(KEYS, 6, hidden=32, gate=32, features=48)
ph.fit(
    model,
    guide,
    {"x": x, "lengths": lengths},
    bound=ph.TraceELBO(),
    steps=5 if options.short else 1200,
    batch_size=50,
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=4e-3),
    progress=False,
)

counted = (torch.arange(LONGEST) < lengths[:, None]).unsqueeze(-1)
often = (x * counted).sum((0, 1)) / counted.sum()
seen = (torch.arange(LONGEST) < ends[:, None]).unsqueeze(-1)
alone = torch.distributions.Bernoulli(often.clamp(1e-3, 1 - 1e-3)).log_prob(new)
print(f"{'50 new tunes':24s} nats a step")
print(f"{'frequencies of notes':24s} {float((alone * seen).sum() / ends.sum()):8.3f}")
for name, bound in {"ELBO": ph.TraceELBO(20), "100 weights": ph.IWELBO(100), "100 particles": ph.SMCBound(100)}.items():
    value = bound.per_datum(model, guide, new, lengths=ends).sum() / ends.sum()
    print(f"{'deep Markov, ' + name:24s} {float(value):8.3f}")

ahead = ph.forecast(model, guide, new[:4, :CUT], steps=LONGEST - CUT, num_draws=200).mean(0)
figure, axes = plt.subplots(2, 4, figsize=(11, 4), sharex=True, sharey=True, layout="constrained")
for n in range(4):
    axes[0, n].imshow(new[n].T, origin="lower", aspect="auto", cmap="Greys", vmin=0, vmax=1)
    going_on = torch.cat([new[n, :CUT], ahead[n]])
    axes[1, n].imshow(going_on.T, origin="lower", aspect="auto", cmap="Greys", vmin=0, vmax=1)
    axes[1, n].axvline(CUT - 0.5, color="tab:red", lw=1)
    axes[0, n].set(title=f"tune {n + 1}")
    axes[1, n].set(xlabel="step")
axes[0, 0].set(ylabel="key, true", yticks=range(0, KEYS, 2))
axes[1, 0].set(ylabel="key, forecast after the line")
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "sequences.png", dpi=150)
