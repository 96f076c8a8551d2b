"""Draws the README's pictures from a run: python docs/pictures.py RUN

RUN is the run directory that `make tutorial` prints at its end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from gan_lib.data.image_set import evenly_spread
from gan_lib.data.images import prepare_images
from gan_lib.results import plots
from gan_lib.results.run import open_run

HERE = Path(__file__).parent
FRAMES = 24


def main(url: str) -> None:
    run = open_run(url)
    p = run.parameters
    real = prepare_images(p.source, p.image_size, p.channels, p.crop, p.max_images).pixels
    some = real[np.random.default_rng(0).choice(len(real), 64, replace=False)]
    side_by_side = plots.plot_real_and_generated(some, run.generate(64))
    side_by_side.savefig(HERE / "real_and_generated.png", dpi=70)
    records = run.records()
    plots.plot_losses(records, smooth=25).savefig(HERE / "losses.png", dpi=70)
    epochs = run.epochs("samples")
    chosen = [epochs[i] for i in evenly_spread(FRAMES, len(epochs))]
    # The upper left quarter of the grid: 4 x 4 of its 8 x 8 images.
    corner = 4 * p.image_size
    frames = [picture[:corner, :corner] for picture in run.samples(chosen).values()]
    (HERE / "epochs.gif").write_bytes(plots.gif_bytes(frames, width=128))


if __name__ == "__main__":
    main(sys.argv[1])
