"""Where are images, and how do their bytes come here?

Folders, buckets, archives, packages, and the
manifest that knows some of them. Told by notebook 01.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.sources.fetching import fetch_files as fetch_files
    from gan_lib.sources.listing import list_files as list_files
    from gan_lib.sources.manifest import sources as sources
    from gan_lib.sources.source import find_source as find_source

__getattr__, __dir__, __all__ = lazily(__name__)
