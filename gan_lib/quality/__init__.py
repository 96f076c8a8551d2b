"""How good are the pictures, and are they new?

Features of images, distances between sets of them, each beside that of real images from
real ones. Arrays in, numbers out: it knows of no run. Told by notebook 05.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.quality.features import EfficientNetLite0 as EfficientNetLite0
    from gan_lib.quality.features import real_features as real_features
    from gan_lib.quality.novelty import nearest_training_images as nearest_training_images
    from gan_lib.quality.scores import Reference as Reference

__getattr__, __dir__, __all__ = lazily(__name__)
