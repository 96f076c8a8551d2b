"""How long the optimisers' steps are: learning rates as a function of where the run is."""

from __future__ import annotations

from gan_lib.parameters import TrainingParameters


def rate_factor(p: TrainingParameters, seen: int) -> float:
    """What `lr_g` and `lr_d` are multiplied by in the step that follows `seen` images.

    1 for the first `lr_hold` images, and from then on a half for each `lr_half_life` images. It
    does not depend on `epochs`: a run that is resumed with more of them is the same run.
    """
    return 0.5 ** (max(0, seen - p.lr_hold) / p.lr_half_life) if p.lr_half_life else 1.0
