"""python -m gan_lib measure: how good the pictures of a run are, epoch by epoch."""

from __future__ import annotations

import argparse
from typing import Any

from gan_lib.cli.arguments import add_example, read_epoch


def add_measure(parser: argparse.ArgumentParser) -> None:
    """Give `python -m gan_lib measure` its arguments."""
    parser.add_argument(
        "run", nargs="?", default="latest", help="its folder or URL; default: latest"
    )
    parser.add_argument(
        "--epoch", action="append", help="a number, best or last; may be given again; default: all"
    )
    parser.add_argument("--images", type=int, help="to generate for each; default: quality_images")
    parser.add_argument("--source", default="", help="of the real images, if the run is not yours")
    add_example(parser, "measure runs/first --epoch best")
    parser.set_defaults(do=_measure)


def _measure(options: argparse.Namespace) -> int:
    # Only now: whoever asks for help should not wait for torch.
    from gan_lib.results.run import open_run

    run = open_run(options.run)
    epochs = options.epoch and [read_epoch(text) for text in options.epoch]
    run.measure(epochs, options.images, source=options.source)
    lines, best = run.quality(), run.best_epoch()
    print(f"{run.url}, features of {lines[-1]['network']}:")
    print(
        f"{'epoch':>6}{'images seen':>13}{'KID':>9}{'+-':>8}{'FD':>9}{'precision':>11}{'recall':>8}"
    )
    for line in lines:
        seen, spread = f"{line['images_seen']:,}", f"{line['kid_spread']:.4f}"
        mark = " best" if line["epoch"] == best else ""
        print(f"{line['epoch']:6}{seen:>13}{line['kid']:9.4f}{spread:>8}{_others(line, '')}{mark}")
    floor = lines[-1]
    print(f"{'real':>6}{'':13}{floor['kid_floor']:9.4f}{'':8}{_others(floor, '_floor')} floor")
    return 0


def _others(line: dict[str, Any], which: str) -> str:
    fd, precision, recall = (line[f"{name}{which}"] for name in ("fd", "precision", "recall"))
    return f"{fd:9.1f}{precision:11.3f}{recall:8.3f}"
