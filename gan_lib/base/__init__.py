"""What does everything stand on?

Errors that a user can mend, checks of values, folders whose files
are written whole, progress, seeds, interrupts.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.base.errors import UserError as UserError
    from gan_lib.base.interrupts import interruptible as interruptible
    from gan_lib.base.progress import ProgressBar as ProgressBar
    from gan_lib.base.seeds import stream_seed as stream_seed
    from gan_lib.base.storage import Folder as Folder

__getattr__, __dir__, __all__ = lazily(__name__)
