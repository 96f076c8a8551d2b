"""Draws the README's pictures from runs.

    python docs/pictures.py RUN                    # silhouettes: the run of `make tutorial`
    python docs/pictures.py --dogs RUN ARTICLE     # photographs: runs of benchmarks/recipes.py

RUN is the run directory that `make tutorial` prints at its end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from gan_lib.data.image_set import evenly_spread
from gan_lib.data.images import prepare_images
from gan_lib.results import plots
from gan_lib.results.pictures import gif_bytes, image_grid, png_bytes
from gan_lib.results.quality import best_epoch
from gan_lib.results.quality_plots import plot_quality
from gan_lib.results.run import open_run

HERE = Path(__file__).parent
FRAMES = 24
ROWS, COLUMNS = 6, 16


def silhouettes(url: str) -> None:
    """Real and generated ones, and how the pictures came about."""
    run = open_run(url)
    p = run.parameters
    real = prepare_images(p.source, p.image_size, p.channels, p.crop, p.max_images).pixels
    some = real[np.random.default_rng(0).choice(len(real), 64, replace=False)]
    side_by_side = plots.plot_real_and_generated(some, run.generate(64, "best"))
    side_by_side.savefig(HERE / "real_and_generated.png", dpi=70)
    epochs = run.epochs("samples")
    chosen = [epochs[i] for i in evenly_spread(FRAMES, len(epochs))]
    # The upper left quarter of the grid: 4 x 4 of its 8 x 8 images.
    corner = 4 * p.image_size
    frames = [picture[:corner, :corner] for picture in run.samples(chosen).values()]
    names = [f"epoch {epoch}" for epoch in chosen]
    (HERE / "epochs.gif").write_bytes(gif_bytes(frames, 128, names))


def dogs(url: str, article: str) -> None:
    """A wall of generated photographs; some beside the article's, of equally many images; KID."""
    run, other = open_run(url), open_run(article)
    wall = run.generate(ROWS * COLUMNS, "best", seed=2)
    kept = set(run.checkpoints()) & set(other.checkpoints())
    equal = best_epoch(run.quality(), kept) or max(kept)
    both = [one.generate(3 * COLUMNS, equal, seed=3) for one in (run, other)]
    for name, images in (("dogs", wall), ("dogs_and_article", np.concatenate(both))):
        grid = image_grid(images, COLUMNS, gap=1)
        (HERE / f"{name}.png").write_bytes(png_bytes(grid.repeat(2, axis=0).repeat(2, axis=1)))
    plot_quality(run).savefig(HERE / "quality.png", dpi=70)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--dogs", nargs=2)
    told = parser.parse_args()
    if told.run:
        silhouettes(told.run)
    if told.dogs:
        dogs(*told.dogs)
