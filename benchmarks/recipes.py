r"""What does each part of the recipe gain: in pictures, at equal images and at equal seconds?

    python benchmarks/recipes.py --source FOLDER --out runs/recipes
    python benchmarks/recipes.py --source FOLDER --out runs/recipes --images 3000000 \
        --recipes article all

Trains the article's recipe, each part added to it alone, and all together, with each seed; then
prints their kernel distance (KID) from the real images, and draws a row of images for each.

It runs for hours. Stop it when you like: the same command goes on where it was. Give a larger
--images and what is there is trained further.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ["GAN_LIB_HEADLESS"] = "1"


from gan_lib.data.image_set import ImageSet
from gan_lib.data.images import prepare_images
from gan_lib.parameters import TrainingParameters
from gan_lib.results.run import Run, open_run
from gan_lib.training.rank import train_gan

# What each is, beside the article's: plain DCGAN with real_label 0.5.
ALL: dict[str, Any] = {
    "ema_images": 20_000,
    "real_label": 0.9,
    "conditional": True,
    "batch_size": 32,
    "lr_d": 4e-4,
}
RECIPES: dict[str, dict[str, Any]] = {
    "article": {},
    "moving average": {"ema_images": 20_000},
    "real_label 0.9": {"real_label": 0.9},
    "classes": {"conditional": True},
    "augmentation": {"augment": "translation,cutout,color"},
    "relativistic": {"loss": "relativistic"},
    "hinge, spectral": {"loss": "hinge", "d_norm": "spectral", "lr_d": 1e-3},
    "relativistic, r1": {"loss": "relativistic", "d_norm": "none", "r1": 0.05, "lr_d": 4e-4},
    "all": ALL,
}
# Measured this often in the course of a training, so that the best epoch can be found.
CHECKPOINTS = 10


def train(recipe: str, seed: int, images: ImageSet, told: argparse.Namespace) -> Run:
    """Train one run, or go on with it, until it has seen as many images as asked for."""
    place = f"{told.out}/{recipe.replace(', ', '-').replace(' ', '-')}-{seed}"
    epochs = max(1, told.images // len(images))
    parameters = TrainingParameters(
        source=told.source,
        image_size=told.size,
        crop="squash",
        ngf=told.width,
        ndf=told.width,
        batch_size=64,
        seed=seed,
        precision="auto",
        epochs=epochs,
        record_every=100,
        sample_every=10,
        checkpoint_every=max(1, epochs // CHECKPOINTS),
        keep_checkpoints=0,
    ).replace(**RECIPES[recipe])
    there = Path(place, "parameters.json").exists()
    if not there or max(open_run(place).checkpoints(), default=0) < epochs:
        print(f"{recipe}, seed {seed}: {epochs} epochs", flush=True)
        train_gan(parameters, run=place, images=images, resume=there)
    return open_run(place)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--images", type=int, default=600_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    told = parser.parse_args()
    images = prepare_images(told.source, told.size, 3, "squash")
    for recipe in told.recipes:
        for seed in told.seeds:
            train(recipe, seed, images, told)
