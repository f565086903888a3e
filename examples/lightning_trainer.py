"""A hierarchical VAE trained by Lightning's Trainer, with its callbacks and logger.

    python examples/lightning_trainer.py [--short] [--out DIR]

Writes lightning_trainer.png, the losses that the logger recorded. Needs the extra 'distributed' (lightning).
"""

import argparse
import warnings
from pathlib import Path

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import pandas
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import pyro_hvae as ph
from pyro_hvae.data import Batches, binarize, digits
from pyro_hvae.training import PairModule


def build():
    return ph.hvae(64, (12, 4), hidden=(128,))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")

    pl.seed_everything(0)
    data = digits()
    train = Batches(data.train, batch_size=100, transform=binarize, drop_last=True)
    held_out = Batches(binarize(data.test, threshold=0.5), batch_size=90, shuffle=False)
    best = ModelCheckpoint(dirpath=options.out / "checkpoints", monitor="validation_loss")
    trainer = pl.Trainer(
        max_epochs=3 if options.short else 60,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=100.0,
        callbacks=[best, EarlyStopping("validation_loss", patience=10)],
        logger=CSVLogger(options.out),
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = PairModule(*build(), ph.IWELBO(num_particles=5))
    trainer.fit(module, train, held_out)

    # The best weights, in programs that are built anew.
    model, guide = build()
    PairModule.load_from_checkpoint(
        best.best_model_path, model=model, guide=guide, objective=ph.IWELBO(5), example=data.test[:1]
    )
    torch.manual_seed(1)
    score = ph.IWELBO(200).per_datum(model, guide, binarize(data.test, threshold=0.5)).mean().item()
    print("epochs   steps   held-out nats an image, K=200")
    print(f"{trainer.current_epoch:6d} {trainer.global_step:7d} {score:31.2f}")

    records = pandas.read_csv(Path(trainer.logger.log_dir) / "metrics.csv")
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for name in ("loss", "validation_loss"):
        shown = records[["step", name]].dropna()
        axis.plot(shown["step"], shown[name], label=name.replace("_", " "))
    axis.set(xlabel="step", ylabel="nats an image")
    axis.legend(frameon=False)
    figure.savefig(options.out / "lightning_trainer.png", dpi=150)
