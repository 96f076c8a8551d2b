"""How do files become batches?

Decoded once into one array, shared out among ranks without gaps or
doubles, augmented on the device. Told by notebook 01.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.data.batches import Batches as Batches
    from gan_lib.data.batches import epoch_shares as epoch_shares
    from gan_lib.data.datasets import dataset_images as dataset_images
    from gan_lib.data.image_set import ImageSet as ImageSet
    from gan_lib.data.images import prepare_images as prepare_images

__getattr__, __dir__, __all__ = lazily(__name__)
