"""What does one rank do, from the first epoch or from a checkpoint to the end?

It asks torch.distributed which rank it is, and knows nothing of Dask. Told by notebook 04.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.training.rank import train_gan as train_gan
    from gan_lib.training.ranks import Ranks as Ranks
    from gan_lib.training.ranks import distribute as distribute
    from gan_lib.training.result import TrainingResult as TrainingResult

__getattr__, __dir__, __all__ = lazily(__name__)
