"""python -m gan_lib generate and export: images of a run's generator, and the generator itself."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from gan_lib.base.errors import ParameterError
from gan_lib.base.progress import ProgressBar
from gan_lib.base.storage import whole_folder
from gan_lib.cli.arguments import add_example, add_run, read_epoch

if TYPE_CHECKING:
    from gan_lib.results.run import Run

# Of the animation; how many images the grid shows at most, and are drawn in one call.
WIDTH, MOST_IN_GRID, MOST_SEEDS = 256, 400, 1_000_000


def add_generator(commands: Any) -> None:
    """Add the commands to `python -m gan_lib`."""
    one = commands.add_parser("generate", help="new images of a run's generator, by seed")
    _add_run_and_epoch(one)
    one.add_argument("--seeds", default="0-99", help="such as 0-99 or 3,7,10-12; default: 0-99")
    one.add_argument("--of", metavar="CLASS", help="only this class, by its name or a part of it")
    one.add_argument(
        "--walk", type=int, metavar="N", help="also an animation, N images from seed to seed"
    )
    one.add_argument("--out", required=True, help="a new folder for them")
    add_example(one, "generate runs/first --seeds 0-15 --walk 12 --out dogs")
    one.set_defaults(do=_generate)

    one = commands.add_parser("export", help="a run's generator, for those without gan_lib")
    _add_run_and_epoch(one)
    one.add_argument("--out", required=True, help="a new folder for it")
    add_example(one, "export runs/first --epoch best --out dog-generator")
    one.set_defaults(do=_export)


def _add_run_and_epoch(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--epoch", help="a number, best or last; default: the best measured one, or else the last"
    )


def parse_seeds(text: str) -> list[int]:
    """The seeds that a text such as "0-99" or "3,7,10-12" names, each once.

    Raises:
        ParameterError: if it is no such text.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ParameterError(f"seeds is {text!r}: write it as 0-99, or 3,7,10-12")
        named = range(int(match[1]), int(match[2] or match[1]) + 1)
        if len(seeds) + len(named) > MOST_SEEDS:
            raise ParameterError(f"seeds is {text!r}: that is more than {MOST_SEEDS:,} images")
        seeds += named
    return list(dict.fromkeys(seeds))


def _epoch(run: Run, told: str | None) -> int | str:
    from gan_lib.results.quality import best_epoch

    if told is None:
        return best_epoch(run.quality(), run.epochs("checkpoints")) or "latest"
    return read_epoch(told)


def _generate(options: argparse.Namespace) -> int:
    seeds = parse_seeds(options.seeds)
    if options.walk is not None and (options.walk < 1 or len(seeds) < 2):
        raise ParameterError(
            f"walk is {options.walk} and there are {len(seeds)} seeds: a walk has at least 1 image "
            "on the way from one seed to the next"
        )
    with whole_folder(options.out) as folder:
        # Only now: a mistake should not have to wait for torch to be imported.
        import numpy as np
        import torch

        from gan_lib.gan.drawing import class_called, draw_seeds, latent_of_seed, render, walk
        from gan_lib.results.pictures import gif_bytes, image_grid, png_bytes
        from gan_lib.results.run import open_run

        run = open_run(options.run)
        state = run.checkpoint(_epoch(run, options.epoch))
        epoch, generator = state["epoch"], run.generator_in(state)
        label = None if options.of is None else class_called(generator, options.of)
        shown: list[np.ndarray] = []
        with ProgressBar(len(seeds), "drawing", "image") as bar:
            for seed, image in zip(seeds, draw_seeds(generator, seeds, label), strict=True):
                (folder / f"seed_{seed:04d}.png").write_bytes(png_bytes(image))
                shown += [image] if len(shown) < MOST_IN_GRID else []
                bar.update(1)
        (folder / "grid.png").write_bytes(png_bytes(image_grid(np.stack(shown))))
        if options.walk:
            # And back to the first, so that it goes on for ever.
            stops = [latent_of_seed(generator, seed, label) for seed in [*seeds, seeds[0]]]
            parts = np.arange(options.walk) / options.walk
            way, labels = walk(torch.cat([z for z, _ in stops]), parts), stops[0][1]
            frames = render(generator, way, None if labels is None else labels.expand(len(way)))
            (folder / "walk.gif").write_bytes(gif_bytes(frames, WIDTH))
    print(f"{len(seeds)} images of {run.url}, epoch {epoch}: {options.out}")
    return 0


def _export(options: argparse.Namespace) -> int:
    with whole_folder(options.out) as folder:
        # Only now: a mistake should not have to wait for torch to be imported.
        from gan_lib.results.exporting import export_generator
        from gan_lib.results.run import open_run

        run = open_run(options.run)
        epoch = export_generator(run, _epoch(run, options.epoch), folder)
    print(f"the generator of {run.url}, epoch {epoch}: {options.out} (begin with its README.md)")
    return 0
