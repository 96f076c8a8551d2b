"""What can all of this be tried on without a network?

Drawn photographs, an S3 server and hosts on this machine. Told by notebook 01.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.practice.photographs import make_photographs as make_photographs
    from gan_lib.practice.s3_server import serve_s3 as serve_s3

__getattr__, __dir__, __all__ = lazily(__name__)
