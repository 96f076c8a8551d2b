"""Addresses of folders, here or elsewhere; no credential is in them, or in what is said of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec

from gan_lib.base.errors import ParameterError

# Where prepared images go unless the caller says otherwise: a path, or the URL of a `Folder`.
CACHE_VARIABLE = "GAN_LIB_CACHE"
# Stores that show an object only once it is complete. Others write in place, where a reader
# would see half a file.
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
# What the query of an address may hold without being asked. Any other may be a credential, and
# those have too many names to list: key, sig, code, jwt, ...
_HARMLESS_IN_QUERY = ("dir", "folder", "path", "prefix", "page", "format", "ref", "region",
                      "version", "versionid")  # fmt: skip
# Options of file systems that may be shown; the other texts among them may give access.
_HARMLESS_OPTIONS = ("endpoint_url", "region", "region_name", "account_name", "account_host",
                     "container_name", "project", "profile", "host", "protocol", "target_protocol",
                     "signature_version", "addressing_style")  # fmt: skip
# Variables of the environment from which file systems take what gives access.
_SECRET_VARIABLE = re.compile(r"^(AWS|AZURE)_.*(KEY|SECRET|TOKEN|PASSWORD|CONNECTION)")


def is_remote(url: str) -> bool:
    """Whether this is a URL, not a path on this machine."""
    return "://" in url or "::" in url


def absolute(url: str) -> str:
    """The place as another process can name it: a path on this machine in full."""
    return url if is_remote(url) else str(Path(url).expanduser().resolve())


def local_cache() -> str:
    """The folder on this machine for what can be made or fetched again."""
    named = os.environ.get(CACHE_VARIABLE, "")
    if named and not is_remote(named):
        return absolute(named)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return absolute(os.path.join(base, "gan_lib"))


def cache_home() -> str:
    """The folder, here or elsewhere, for what many machines may share.

    Raises:
        ParameterError: if GAN_LIB_CACHE holds a credential.
    """
    home = os.environ.get(CACHE_VARIABLE) or local_cache()
    refuse_credentials(CACHE_VARIABLE, home)
    return absolute(home)


def prepared_cache() -> str:
    """The folder, here or elsewhere, for prepared images; raises as `cache_home`."""
    return f"{cache_home()}/prepared"


def refuse_credentials(name: str, url: str) -> None:
    """An address is written to logs and parameters.json, so it must not hold a password or a key.

    Raises:
        ParameterError: that does not repeat it.
    """
    if is_remote(url) and any(map(_may_hold_credential, url.split("::"))):
        raise ParameterError(
            f"{name} is an address that holds a credential (a password, or something behind ? or "
            "# that may be one), and addresses are written to logs and files: give it through the "
            "environment (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), fsspec's "
            "configuration, or storage_options"
        )


def _may_hold_credential(part: str) -> bool:
    """Whether one part of a chain of addresses does."""
    *before, rest = part.split("://", 1)
    protocol = "".join(before).lower()
    place, _, fragment = rest.partition("#")
    place, _, query = place.partition("?")
    # A secret may hold any character, a slash, say: what comes before the last @ counts. But
    # `host:8080/a@b` is a port and a path, and in `github://owner:repository@branch` is no secret.
    user, at, _ = rest.rpartition("@")
    with_port = protocol not in OBJECT_STORES and re.match(r"[^/@]*:\d{1,5}(/|$)", rest)
    password = bool(at) and ":" in user.partition("/")[0] and not with_port
    # A name alone is a token for a web server, and elsewhere no more than a name: Azure's
    # `abfss://container@account`, say.
    name_alone = protocol in ("http", "https", "") and "@" in place.partition("/")[0]
    told = re.split("[&;]", f"{query}&{fragment}" if "=" in fragment else query)
    unknown = any(x and x.partition("=")[0].lower() not in _HARMLESS_IN_QUERY for x in told)
    return (password and protocol != "github") or name_alone or unknown


def without_secrets(text: str, options: Mapping[str, Any] | None = None) -> str:
    """`text` without any value of `options`, fsspec's configuration or the environment that may
    give access."""
    secrets = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    secrets.update(_texts([options or {}, fsspec.config.conf]))
    # Errors show a part of a connection string, a token without "Bearer", or either in an address.
    for secret in tuple(secrets):
        parts = re.split(r"[\s;&]+", secret)
        secrets.update(parts, (part.partition("=")[2] for part in parts))
    secrets.update([quote(secret, safe="") for secret in secrets])
    for secret in sorted(secrets, key=len, reverse=True):
        # Anything shorter is no secret, and may be a part of every other word.
        if len(secret) >= 6:
            text = text.replace(secret, "***")
    return text


def _texts(value: Any) -> Iterator[str]:
    """All texts in options of a file system, however deep, but for known harmless ones."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _HARMLESS_OPTIONS:
                yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)
