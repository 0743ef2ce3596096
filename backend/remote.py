"""The drivers ``http``, ``https``, ``s3`` and the like: a file that fsspec can reach, read-only.

fsspec is an extra (``pip install pyvirtio[remote]``), and so are its file systems.
"""

from __future__ import annotations

import errno
from functools import partial
from importlib import import_module
from typing import Any

from ..errors import BackendError, UnsupportedError
from .buffers import copy_in
from .disk import Disk
from .node import Node
from .registry import Driver

__all__ = ["FTP", "HTTP", "HTTPS", "S3", "RemoteDisk"]


class RemoteDisk(Disk):
    """The file at ``url``. ``options`` are those of its file system in fsspec (credentials, …).

    Raises UnsupportedError without fsspec, BackendError where the file cannot be reached.
    """

    growable = False

    def __init__(self, url: str, **options: Any) -> None:
        try:
            core: Any = import_module("fsspec.core")
            self._files, self._path = core.url_to_fs(url, **options)
        except ImportError as error:
            raise UnsupportedError(
                f"'{url}' needs a package that is not installed: {error}", feature="fsspec"
            ) from error
        self._url = url
        self.format_name = url.partition(":")[0]
        size = self._ask(lambda: self._files.info(self._path)["size"], "open")
        if not isinstance(size, int):
            raise BackendError(errno.EIO, f"The server does not tell the size of '{url}'", url)
        super().__init__(size, read_only=True)

    def _ask(self, work: Any, doing: str) -> Any:
        """What the file system says; its errors are of any kind, most of them OSErrors."""
        try:
            return work()
        except OSError as error:
            raise BackendError.wrap(error, f"Could not {doing} '{self._url}'", self._url) from error
        except (ValueError, KeyError, RuntimeError, ImportError) as error:
            raise BackendError(
                errno.EIO, f"Could not {doing} '{self._url}': {error}", self._url
            ) from error

    @property
    def filename(self) -> str:
        """The URL."""
        return self._url

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        data = self._ask(
            lambda: self._files.cat_file(self._path, start=offset, end=offset + length), "read"
        )
        if len(data) != length:
            raise BackendError(errno.EIO, f"'{self._url}' has become shorter", self._url)
        copy_in(views, data)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        raise BackendError(errno.EPERM, "the disk is read-only", self._url)


def _parse_filename(name: str, options: dict[str, Any]) -> None:
    if "url" in options:
        raise ValueError("Can't specify 'file' and 'url' options at the same time")
    options["url"] = name


def _open(scheme: str, node: Node) -> Disk:
    url = node.options.text("url")
    if not url:
        raise ValueError(f"{scheme} block driver requires an 'url' option")
    if not url.startswith(f"{scheme}://"):
        raise ValueError(f"{scheme} driver cannot handle the URL '{url}'")
    if not node.context.read_only and not node.context.auto_read_only:
        raise BackendError(errno.EACCES, f"{scheme} driver does not support writes", url)
    return RemoteDisk(url)


def _driver(scheme: str) -> Driver:
    return Driver(scheme, partial(_open, scheme), protocol=True, parse_filename=_parse_filename)


HTTP = _driver("http")
HTTPS = _driver("https")
FTP = _driver("ftp")
S3 = _driver("s3")
