"""An S3 bucket through obstore: at a tenth of the cost of s3fs, which says where it is.

A request through s3fs costs nearly 3 ms of Python. But s3fs (with botocore below it)
knows endpoints, regions and every place that keys may come from. So those are asked of
it, and the requests are obstore's; where obstore fails, s3fs is the second opinion.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import NoCredentialsError
from fsspec.asyn import sync
from obstore.store import S3Store

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import S3Credential

# A response that stops flowing for so many seconds is given up.
SECONDS_OF_SILENCE = 10
# Folders listed at the same time: a store lists 1,000 objects per request.
LIST_AT_ONCE = 16


def is_s3(fs: Any) -> bool:
    """Whether a file system is s3fs."""
    return "s3" in fs.protocol


def has_keys(fs: Any) -> bool:
    """Whether s3fs finds keys to sign with; what else may be wrong, a request will say."""
    try:
        _frozen_keys(fs)
    except NoCredentialsError:
        return False
    except Exception:
        return True
    return True


def open_bucket(fs: Any, bucket: str) -> S3Store | None:
    """A bucket as obstore opens it, once per file system; None where only s3fs can read it."""
    stores = _stores(fs)
    if bucket not in stores:
        try:
            stores[bucket] = _open(fs, bucket)
        # No keys, or another way of signing: s3fs itself knows, or says what is missing.
        except Exception:
            return None
    return stores[bucket]


def leave_to_s3fs(fs: Any, bucket: str) -> None:
    """Remember that s3fs reads what obstore cannot: with a certificate of one's own, say."""
    _stores(fs)[bucket] = None


def list_objects(store: S3Store, prefix: str) -> Iterator[ObjectMeta]:
    """All objects below a prefix, without those that only mark a folder.

    Raises:
        obstore.exceptions.BaseError: if the store cannot be listed, or has keys that
            obstore does not take for paths.
    """
    below = f"{prefix}/" if prefix else None
    top = store.list_with_delimiter(below)
    folders = {str(folder).rstrip("/") for folder in top["common_prefixes"]}
    with ThreadPoolExecutor(LIST_AT_ONCE) as pool:
        found = [top["objects"], *pool.map(lambda folder: _list(store, folder), sorted(folders))]
    # An object whose name ends with a slash marks a folder; obstore drops the slash.
    for objects in found:
        folders.update(info["path"].rpartition("/")[0] for info in objects)
    for objects in found:
        for info in objects:
            if info["size"] or info["path"] not in folders:
                yield info


def _list(store: S3Store, folder: str) -> list[ObjectMeta]:
    return [info for page in store.list(f"{folder}/", chunk_size=1000) for info in page]


def _stores(fs: Any) -> dict[str, S3Store | None]:
    # Kept on the file system itself: another one of equal options may lead to another server,
    # because it was opened in another environment.
    stores: dict[str, S3Store | None] = vars(fs).setdefault("_gan_lib_stores", {})
    return stores


def _open(fs: Any, bucket: str) -> S3Store:
    client = fs.connect()
    endpoint = fs.url(f"{bucket}/key").partition("?")[0].removesuffix("/key")
    in_path = endpoint.endswith(f"/{bucket}")

    def credentials() -> S3Credential:
        found = _frozen_keys(fs)
        # Those of a role expire; s3fs renews them when it is asked again. obstore asks when
        # less than 5 minutes are left, and lets all requests wait meanwhile.
        soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=10)
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": soon,
        }

    if not fs.anon:
        credentials()  # raises if there are none
    return S3Store(
        bucket,
        endpoint=endpoint.removesuffix(f"/{bucket}") if in_path else endpoint,
        virtual_hosted_style_request=not in_path,
        region=client.meta.region_name or "us-east-1",
        skip_signature=bool(fs.anon),
        credential_provider=None if fs.anon else credentials,
        client_options={
            "allow_http": endpoint.startswith("http:"),
            "connect_timeout": "5s",
            "read_timeout": f"{SECONDS_OF_SILENCE}s",
            "timeout": "1h",
        },
        # Tried again by whoever asked, where the length of what came is seen too.
        retry_config={"max_retries": 0},
    )


def _frozen_keys(fs: Any) -> ReadOnlyCredentials:
    fs.connect()
    # As options they come before all that a session finds.
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    given = {**dict(zip(names, (fs.key, fs.secret, fs.token), strict=True)), **fs.client_kwargs}
    if given[names[0]]:
        return ReadOnlyCredentials(*(given[name] for name in names))
    keys = sync(fs.loop, fs.session.get_credentials)
    if keys is None:
        raise NoCredentialsError
    frozen: ReadOnlyCredentials = sync(fs.loop, keys.get_frozen_credentials)
    return frozen
