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


import matplotlib.pyplot as plt
import numpy as np
import torch

from gan_lib.data.image_set import ImageSet
from gan_lib.data.images import prepare_images
from gan_lib.parameters import CROPS, TrainingParameters
from gan_lib.results.run import Run, open_run
from gan_lib.training.rank import train_gan

# What each is, beside the article's: plain DCGAN with real_label 0.5.
ALL: dict[str, Any] = {
    "ema_images": 100_000,
    "real_label": 0.9,
    "lr_g": 4e-4,
    "lr_d": 4e-4,
    "batch_size": 32,
    "d_bias": True,
    "augment": "translation",
    "augment_after": 300_000,
    "augment_late": "cutout,color",
    "augment_late_after": 1_200_000,
    "blocks": 1,
    "lr_hold": 1_000_000,
    "lr_half_life": 1_000_000,
}
RECIPES: dict[str, dict[str, Any]] = {
    "article": {},
    "moving average": {"ema_images": 20_000},
    "real_label 0.9": {"real_label": 0.9},
    "lr_d 4e-4": {"lr_d": 4e-4},
    "both rates 4e-4": {"lr_g": 4e-4, "lr_d": 4e-4},
    "batches of 32": {"batch_size": 32},
    "offset": {"d_bias": True},
    "blocks": {"blocks": 1},
    "classes": {"conditional": True},
    "augmentation": {"augment": "translation,cutout,color"},
    "relativistic": {"loss": "relativistic"},
    "hinge, spectral": {"loss": "hinge", "d_norm": "spectral", "lr_d": 1e-3},
    "relativistic, r1": {"loss": "relativistic", "d_norm": "none", "r1": 0.05, "lr_d": 4e-4},
    "all but the offset": {**ALL, "d_bias": False},
    "all, rates that stay": {**ALL, "lr_hold": 0, "lr_half_life": 0},
    "all but blocks, rates that stay": {**ALL, "lr_hold": 0, "lr_half_life": 0, "blocks": 0},
    "all, shifted from the beginning": {**ALL, "augment_after": 0},
    "all, never shifted": {**ALL, "augment": "", "augment_late": "", "augment_late_after": 0},
    "all, shifts alone": {**ALL, "augment_late": "", "augment_late_after": 0},
    "all, batches of 64": {**ALL, "batch_size": 64},
    "all, batches of 64, lr_g 2e-4": {**ALL, "batch_size": 64, "lr_g": 2e-4},
    "all": ALL,
}
# Measured this often in the course of a training, so that the best epoch can be found.
CHECKPOINTS = 5
# Generated images of each measurement.
MEASURED = 5_000


def train(recipe: str, seed: int, images: ImageSet, told: argparse.Namespace) -> Run:
    """Train one run, or go on with it, until it has seen as many images as asked for."""
    place = f"{told.out}/{recipe.replace(', ', '-').replace(' ', '-')}-{seed}"
    epochs = max(1, told.images // len(images))
    parameters = TrainingParameters(
        source=told.source,
        image_size=told.size,
        crop=told.crop,
        ngf=told.width,
        ndf=told.width,
        batch_size=64,
        seed=seed,
        precision="auto",
        epochs=epochs,
        record_every=20,
        sample_every=10,
        checkpoint_every=max(1, epochs // CHECKPOINTS),
        keep_checkpoints=0,
    ).replace(**RECIPES[recipe])
    there = Path(place, "parameters.json").exists()
    if not there or max(open_run(place).checkpoints(), default=0) < epochs:
        print(f"{recipe}, seed {seed}: {epochs} epochs", flush=True)
        train_gan(parameters, run=place, images=images, resume=there)
    run = open_run(place)
    measured = {line["epoch"] for line in run.quality()}
    missing = [epoch for epoch in run.checkpoints() if epoch not in measured]
    if missing:
        run.measure(missing, n=MEASURED, images=images)
    return run


def rate(run: Run) -> float:
    """Images per second in the middle of its records."""
    return float(run.records()["images_per_second"].median())


def row(recipe: str, run: Run, article: Run) -> list[str]:
    """A line of the table: at equal images, at equal seconds, and at its best."""
    lines = run.quality()
    last, best = lines[-1], min(lines, key=lambda line: line["kid"])
    last_article = article.quality()[-1]
    in_time = rate(run) / rate(article) * last_article["images_seen"]
    then = max(
        (line for line in lines if line["images_seen"] <= in_time),
        key=lambda line: line["images_seen"],
        default=lines[0],
    )
    return [
        recipe,
        str(run.parameters.seed),
        f"{last['images_seen']:,}",
        f"{last['kid']:.3f} ± {last['kid_spread']:.3f}",
        f"{last['kid'] / last_article['kid']:.2f}",
        f"{then['kid'] / last_article['kid']:.2f}",
        f"{best['kid']:.3f} ({best['images_seen']:,})",
        f"{last['precision']:.2f}",
        f"{last['recall']:.2f}",
        f"{rate(run):.0f}",
    ]


def draw(runs: dict[str, Run], out: str) -> str:
    """A row of images of each recipe, of the same latent vectors, in one picture."""
    figure, panels = plt.subplots(len(runs), figsize=(10, 1.0 * len(runs)), squeeze=False)
    for axes, (recipe, run) in zip(panels[:, 0], runs.items(), strict=True):
        axes.imshow(np.concatenate(list(run.generate(16, seed=1)), axis=1), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(recipe, rotation=0, ha="right", va="center")
    path = f"{out}/recipes.png"
    figure.savefig(path, bbox_inches="tight", dpi=120)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="a folder of images")
    parser.add_argument("--out", required=True, help="a folder for the runs and the picture")
    parser.add_argument("--images", type=int, default=600_000, help="seen by each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    parser.add_argument("--crop", default="squash", choices=CROPS)
    parser.add_argument("--width", type=int, default=32, help="ngf and ndf")
    told = parser.parse_args()
    images = prepare_images(told.source, told.size, 3, told.crop)
    recipes = ["article", *(recipe for recipe in told.recipes if recipe != "article")]
    table, shown = [], {}
    for seed in told.seeds:
        article = train("article", seed, images, told)
        for recipe in recipes:
            run = article if recipe == "article" else train(recipe, seed, images, told)
            table.append(row(recipe, run, article))
            shown.setdefault(recipe, run)
    floor = article.quality()[-1]["kid_floor"]
    print(f"\nKID with features of {article.quality()[-1]['network']}; real images: {floor:.3f}")
    print(f"computed in {torch.backends.cpu.get_cpu_capability()}, {article.info()['device']}")
    titles = ["recipe", "seed", "images seen", "KID", "of the article's", "at equal seconds"]
    print(table_text([[*titles, "best (at)", "precision", "recall", "images/s"], *table]))
    print(draw(shown, told.out))


def table_text(rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    first, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([first, "|" + "---|" * len(rows[0]), *others])


if __name__ == "__main__":
    main()
