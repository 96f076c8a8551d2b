"""What can be done from a shell?

The commands of `python -m gan_lib`: the notebooks run headlessly, and
the data seen to.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.cli.notebooks import run_notebooks as run_notebooks
    from gan_lib.cli.profiles import read_profile as read_profile

__getattr__, __dir__, __all__ = lazily(__name__)
