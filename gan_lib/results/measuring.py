"""Measuring the pictures of a run afterwards, from its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from gan_lib.base.errors import RunError
from gan_lib.base.progress import ProgressBar
from gan_lib.base.storage import Folder
from gan_lib.data.image_set import ImageSet
from gan_lib.gan.drawing import generate_images
from gan_lib.quality.features import (
    MOST_IMAGES,
    EfficientNetLite0,
    FeatureNetwork,
    features_of,
    network_name,
    real_features,
)
from gan_lib.quality.scores import Reference
from gan_lib.results.quality import Line, keep_quality, quality_line, quality_seed
from gan_lib.results.run import Run


def measure_run(
    run: Run,
    images: ImageSet,
    epochs: Sequence[int] | None = None,
    n: int | None = None,
    network: FeatureNetwork | None = None,
    progress: bool = True,
) -> list[Line]:
    """What `Run.measure` does, with the images in hand."""
    kept = run.epochs("checkpoints")
    chosen = kept if epochs is None else epochs
    if not chosen:
        raise RunError(f"{run.url} has no checkpoint yet: there is nothing to measure")
    network = network or EfficientNetLite0()
    p = run.parameters
    features = real_features(images.limited(MOST_IMAGES), network, progress)
    real = Reference(features, p.quality_images if n is None else n)
    lines = []
    with ProgressBar(len(chosen) * real.n, "measuring", "image", show=progress) as bar:
        for epoch in chosen:
            state = run.checkpoint(epoch)
            pixels = generate_images(run.generator_in(state), real.n, quality_seed(p.seed))
            found = features_of(pixels, network, bar)
            name = network_name(network)
            line = quality_line(epoch, state["iteration"], len(images), found, real, name)
            bar.update(0, f"epoch {epoch}, KID {line['kid']:.4f}")
            # At once: what was measured is kept, if this is interrupted.
            keep_quality(Folder(run.url), [line])
            lines.append(line)
    return lines
