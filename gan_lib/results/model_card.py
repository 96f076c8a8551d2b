"""The model card of an exported generator: what it is, what it may be used for, how good it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gan_lib.gan.models import Generator, count_parameters
from gan_lib.parameters import TrainingParameters
from gan_lib.sources import manifest

if TYPE_CHECKING:
    from gan_lib.results.run import Run

UNKNOWN = "unknown: ask the owner of the images"


def model_card(run: Run, checkpoint: dict[str, Any], generator: Generator) -> str:
    """Its text, in Markdown.

    Args:
        run: that made the generator.
        checkpoint: of which it was taken.
        generator: itself.
    """
    p, epoch = run.parameters, checkpoint["epoch"]
    size = f"{p.image_size} x {p.image_size}"
    colours = "grey" if p.channels == 1 else "colour"
    source, about = about_source(p)
    return "\n".join(
        [
            "---",
            "pipeline_tag: unconditional-image-generation",
            "tags: [gan, dcgan, onnx]",
            "---",
            "",
            f"# A generator of {size} images, trained on {source}",
            "",
            "![images of seeds 0 to 63](samples.png)",
            "",
            f"A DCGAN generator (Radford et al. 2016, arXiv:1511.06434) of "
            f"{count_parameters(generator):,} weights makes {colours} images of {size} pixels from "
            f"{p.nz} normal random numbers"
            + (f" and one of {len(generator.classes)} classes. " if generator.classes else ". ")
            + f"It is that of epoch {epoch}, after {checkpoint['iteration']:,} steps of "
            f"{p.batch_size} images"
            + (", as a moving average of its weights." if "average" in checkpoint else "."),
            "",
            "## Draw",
            "",
            "```",
            "python generate.py 0 1 2          # needs torch",
            "python generate_onnx.py 0 1 2     # needs onnxruntime and numpy",
            "```",
            "",
            "Each number is a seed, and always gives the same image. `demo.html` draws the "
            "same ones in a browser, also from disk. "
            + ("`--of CLASS` takes one of the classes in config.json. " if p.conditional else "")
            + "`generator.onnx` takes any number of latent vectors at once.",
            "",
            "## The images that it learnt from",
            "",
            *(f"- {line}" for line in about),
            "",
            "What it draws may resemble some of them: look before you publish.",
            "",
            "## How good it is",
            "",
            *_quality(run, epoch),
            "",
            "## How it was trained",
            "",
            *_recipe(run, source),
            "",
        ]
    )


def about_source(p: TrainingParameters) -> tuple[str, list[str]]:
    """What the images are called that a run has learnt from, and what their owners allow."""
    entry = manifest.sources().get(p.source)
    if entry is None:
        # Where somebody's own images lie is nobody else's business.
        name = p.source.rstrip("/").rpartition("/")[2]
        return name, [f"licence: {UNKNOWN}", f"allows: {UNKNOWN}"]
    told = ("title", "homepage", "licence", "allows", "citation")
    return entry["title"], [f"{name}: {entry[name]}" for name in told if name in entry]


def _quality(run: Run, epoch: int) -> list[str]:
    lines = [line for line in run.quality() if line["epoch"] == epoch]
    if not lines:
        return ["It was not measured."]
    (line,) = lines
    table = ["| | generated | as many other real images |", "|---|---|---|"]
    for name, title, digits in (
        ("kid", "KID (less is better)", 4),
        ("fd", "Frechet distance (less is better)", 1),
        ("precision", "precision", 3),
        ("recall", "recall", 3),
    ):
        table.append(f"| {title} | {line[name]:.{digits}f} | {line[f'{name}_floor']:.{digits}f} |")
    return [
        *table,
        "",
        f"Of {line['images']:,} images, by features of {line['network']}: they cannot be compared "
        f"with those of another network. KID's spread is {line['kid_spread']:.4f}.",
    ]


def _recipe(run: Run, source: str) -> list[str]:
    info = run.info()
    told = info["parameters"] | {"source": source}
    about = {
        "ranks": info.get("world_size"),
        "device": info.get("device_name"),
        **info.get("versions", {}),
    }
    on = ", ".join(f"{name} {value}" for name, value in about.items() if value)
    rows = [f"| {name} | {value} |" for name, value in told.items()]
    return [f"On {on}.", "", "| parameter | value |", "|---|---|", *rows]
