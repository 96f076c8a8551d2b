"""What comes back from a training, and how does it look?

The run directory, written and read, watched
and drawn; it never asks a cluster. Told by notebook 05.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.results.checkpoints import Checkpoints as Checkpoints
    from gan_lib.results.run import Run as Run
    from gan_lib.results.run import open_run as open_run
    from gan_lib.results.writing import RunWriter as RunWriter

__getattr__, __dir__, __all__ = lazily(__name__)
