"""Opening a graph of block drivers from file names and options, as QEMU does.

A file name may be a path, begin with a protocol's prefix (``nbd://…``, ``blkdebug:rules:image``),
or be ``json:`` and options. Options are dotted (``file.driver=blkdebug,file.image.filename=…``);
those that no driver has taken in the end are errors.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import BackendError, ImageError, PyvirtioError, UnsupportedError, prefixed
from .chain import Overlay
from .disk import Disk
from .file import is_device
from .node import Context, Graph, Node, Role, bottom_file
from .options import parse_json
from .references import FileReference, default_name, protocol_prefix
from .registry import (
    CERTAIN,
    PROBE_SIZE,
    Driver,
    Format,
    find_driver,
    find_protocol,
    formats,
)

__all__ = ["MAX_CHAIN", "Context", "Graph", "open_node", "path_options", "probe"]

MAX_CHAIN = 200
"""Files in one backing chain. QEMU has no such limit, and runs out of stack; Python's recursion
limit may be met before."""

_WARNING = """\
Image format was not specified for '{name}' and probing guessed raw.
Automatically detecting the format is dangerous for raw images, write operations on block 0 will \
be restricted.
Specify the 'raw' format explicitly to remove the restrictions."""

_CODE_ONLY = ("passphrase", "policy", "probed")
"""Arguments of a format's ``open`` that no option may set; nor those with an underscore."""


def open_node(
    context: Context,
    filename: str | None,
    options: Mapping[str, Any],
    reference: str | Disk | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Disk:
    """Open a node and all below it.

    ``filename`` and the flat ``options`` are QEMU's; ``reference`` is, instead of both, the name of
    a node that is open, or a Disk, which the result then is. ``arguments`` are for a format's
    ``open``, beyond what options can say (``for_check``).

    Raises what the drivers raise, and ValueError for names and options that are wrong.
    """
    if reference is not None:
        return _referenced(context.graph, reference, filename, options)
    options = dict(options)
    if filename is not None and filename.startswith("json:"):
        options = parse_json(filename[len("json:") :]) | options
        filename = None
    driver, filename = _driver_of(context, filename, options)
    context = replace(context, protocol=isinstance(driver, Driver) and driver.protocol)
    if options.get("backing", ...) in (None, ""):
        if options.pop("backing") == "":
            _warn(
                context.graph,
                'Use of "backing": "" is deprecated; use "backing": null instead',
            )
        context = replace(context, no_backing=True)
    context, name = context.absorb(options)
    node = Node(
        context,
        "" if driver is None else driver.name,
        filename,
        options,
        open_node,
        is_format=not isinstance(driver, Driver),
    )
    try:
        if isinstance(driver, Driver):
            disk = driver.open(node)
        else:
            disk = _open_format(driver, node, dict(arguments or {}))
        try:
            _refuse_unknown(driver, node, disk)
            if name in context.graph.nodes:
                raise ValueError(f"Duplicate nodes with node-name='{name}'")
        except BaseException:
            disk.close()
            raise
    except BaseException:
        node.abandon()
        raise
    disk.discards = context.discard == "unmap"
    disk.detect_zeroes = context.detect_zeroes
    if name is not None:
        context.graph.nodes[name] = disk
    return disk


def _referenced(
    graph: Graph, reference: str | Disk, filename: str | None, options: Mapping[str, Any]
) -> Disk:
    if filename is not None or options:
        raise ValueError(
            "Cannot reference an existing block device with additional options or a new filename"
        )
    if isinstance(reference, Disk):
        return reference
    try:
        return graph.nodes[reference]
    except (KeyError, TypeError):
        raise ValueError(f"Cannot find device='{reference}' nor node-name='{reference}'") from None


def _driver_of(
    context: Context, filename: str | None, options: dict[str, Any]
) -> tuple[Driver | Format | None, str | None]:
    """The driver that a node's name or options say, None if its format has to be probed; and the
    file name that is left for what lies below. The options get what the name says."""
    name = options.pop("driver", None)
    driver = None if name is None else find_driver(str(name))
    protocol = context.protocol
    if driver is not None:
        protocol = isinstance(driver, Driver) and driver.protocol
    if not protocol:
        return driver, filename
    parse = filename is not None
    if parse:
        if "filename" in options:
            raise ValueError("Can't specify 'file' and 'filename' options at the same time")
        options["filename"] = filename
    path = options.get("filename")
    if driver is None:
        if path is None:
            raise ValueError("Must specify either driver or file")
        driver = _protocol_of(str(path), prefixed=parse)
    if isinstance(driver, Driver):
        if driver.parse_filename is not None and filename is not None:
            driver.parse_filename(filename, options)
            if not driver.needs_filename:
                options.pop("filename", None)
        if driver.needs_filename and not options.get("filename"):
            raise ValueError(f"The '{driver.name}' block driver requires a file name")
    return driver, filename


def _protocol_of(name: str, *, prefixed: bool) -> Driver | Format:
    """The driver that a file name belongs to."""
    try:
        if is_device(os.stat(name).st_mode):
            return find_driver("host_device")
    except (OSError, ValueError):
        pass
    prefix = protocol_prefix(name) if prefixed else None
    if prefix is None:
        return find_driver("file")
    driver = find_protocol(prefix)
    if driver is None:
        raise UnsupportedError(f"Unknown protocol '{prefix}'", feature=prefix)
    return find_driver(driver)


def _refuse_unknown(driver: Driver | Format | None, node: Node, disk: Disk) -> None:
    left = node.options.left
    if not left:
        return
    name = next(iter(left))
    if name.split(".")[0] == "backing" and not isinstance(disk, Overlay):
        raise ValueError("Driver doesn't support backing files")
    if isinstance(driver, Driver) and driver.protocol:
        raise ValueError(f"Block protocol '{driver.name}' doesn't support the option '{name}'")
    raise ValueError(f"Block format '{disk.format_name}' does not support the option '{name}'")


# -- formats ---------------------------------------------------------------------------------------


def _open_format(kind: Format | None, node: Node, arguments: dict[str, Any]) -> Disk:
    """Open an image: what it is in, what it names, and the image itself."""
    file = node.child("file", filename=node.filename)
    if file is None:
        raise ValueError(
            "Must specify either driver or file"
            if kind is None
            else 'A block device must be specified for "file"'
        )
    context = node.context
    read_only = context.read_only or file.read_only
    if kind is None:
        kind = probe(file)
        if kind.name == "raw":
            arguments["probed"] = True
            if not read_only:
                _warn(context.graph, _WARNING.format(name=file.filename))
    bottom = bottom_file(file)
    node.context = context = replace(
        context,
        parent=None if bottom is None else bottom.filename,
        chain=(*context.chain, (-2, id(file)) if bottom is None else bottom.identity),
        depth=context.depth + 1,
        read_only=read_only,
    )
    given = node.options.left
    strong = {name: given[name] for name in given if name.startswith(kind.strong_options)}
    _take_secrets(kind, node, arguments)
    data_file = node.child("data-file")
    if data_file is not None:
        arguments["data_file"] = data_file
    backing = {
        option: node.options.take(option)
        for option in list(node.options.left)
        if option.split(".")[0] == "backing"
    }
    options = node.options.left
    for option in options:
        if "_" in option or option in _CODE_ONLY:
            raise ValueError(f"Block format '{kind.name}' does not support the option '{option}'")
    opened = _Named(node, backing)
    disk = kind.open(file, read_only=read_only, policy=opened, **options, **arguments)
    disk.strong_options = strong
    node.options.left = {}
    if context.graph.tell_repairs is not None:
        context.graph.tell_repairs(getattr(disk, "repairs", ()))
    try:
        _settle_backing(disk, context, opened)
    except BaseException:
        disk.close()
        raise
    return disk


def _take_secrets(kind: Format, node: Node, arguments: dict[str, Any]) -> None:
    for option, argument in kind.secret_options.items():
        secret = node.options.text(option)
        if secret is not None and not arguments.get("no_io"):  # else nobody looks at it
            arguments[argument] = node.context.graph.secret(secret)
    for option, argument in kind.renamed_options.items():
        value = node.options.take(option)
        if value is not None:
            arguments[argument] = value


def _settle_backing(disk: Disk, context: Context, opened: _Named) -> None:
    """What options say of a backing file that the image does not name."""
    if context.no_backing and isinstance(disk, Overlay):
        disk.ignore_backing()
    elif opened.options:
        if not isinstance(disk, Overlay):
            raise ValueError("Driver doesn't support backing files")
        disk.replace_backing(opened.open_backing(None))


class _Named:
    """Opens what an image names: the policy that its format is given."""

    def __init__(self, node: Node, options: dict[str, Any]) -> None:
        self._node = node
        self.options = options
        """What options say of the backing file, while it is not opened."""

    def __call__(self, reference: FileReference) -> Disk | None:
        """Open the file, if the graph's policy wants it; None if it does not."""
        context = self._node.context
        reference = replace(reference, parent=context.parent, depth=context.depth)
        if len(context.chain) >= MAX_CHAIN:
            raise ImageError(
                f"The backing chain is longer than {MAX_CHAIN} files",
                field="backing file",
                value=reference.name,
                limit=MAX_CHAIN,
            )
        try:
            if reference.role == "data-file":
                return self._open_data_file(reference)
            return None if context.no_backing else self.open_backing(reference)
        except RecursionError:
            if context.depth > 1:
                raise  # told where the stack is short again
            raise ImageError(
                "The backing chain is too long for Python's recursion limit",
                field="backing file",
                value=reference.name,
                limit=sys.getrecursionlimit(),
            ) from None

    def open_backing(self, reference: FileReference | None) -> Disk | None:
        """Open the backing file; ``reference`` is what the image says of it."""
        node, options = self._node, self.options
        self.options = {}
        reference_name = options.pop("backing", None)
        given = {name[len("backing.") :]: value for name, value in options.items()}
        filename = None
        policy = node.context.graph.policy
        try:
            if reference is not None and not reference_name and "file.filename" not in given:
                if policy is not None:
                    decision = policy(reference)
                    if decision is None or isinstance(decision, Disk):
                        return decision
                    given |= path_options(decision)
                else:
                    filename = default_name(reference)
            if reference is not None and reference.format and not reference_name:
                if "driver" not in given:
                    _must_be_known(reference.format)
                given.setdefault("driver", reference.format)
            return node.open(node.inherited(Role.BACKING), filename, given, reference_name)
        except PyvirtioError as error:
            raise prefixed("Could not open backing file: ", error) from error
        except ValueError as error:
            raise ValueError(f"Could not open backing file: {error}") from error

    def _open_data_file(self, reference: FileReference) -> Disk | None:
        policy = self._node.context.graph.policy
        options: dict[str, Any] = {}
        filename = None
        if policy is None:
            filename = default_name(reference)
        else:
            decision = policy(reference)
            if decision is None or isinstance(decision, Disk):
                return decision
            options = {"driver": "file", "filename": os.fsdecode(decision)}
        return self._node.open(self._node.inherited(Role.FILE), filename, options)


def _must_be_known(format: str) -> None:
    try:
        find_driver(format)
    except ValueError as error:
        raise UnsupportedError(str(error), feature=format) from None


def path_options(path: Any) -> dict[str, Any]:
    """Options for an image at a path that is none of QEMU's file names."""
    name = os.fsdecode(path)
    try:
        driver = "host_device" if is_device(os.stat(name).st_mode) else "file"
    except (OSError, ValueError):
        driver = "file"
    return {"file.driver": driver, "file.filename": name}


def probe(file: Disk) -> Format:
    """The format of the image in ``file``: the one that is surest of its first bytes."""
    try:
        start = file.read(0, min(PROBE_SIZE, file.size))
    except BackendError as error:
        raise BackendError(
            error.errno,
            f"Could not read image for determining its format: {os.strerror(error.errno or 5)}",
            file.filename,
        ) from error
    best, sure = None, -1
    for kind in formats():
        certainty = kind.probe(start)
        if certainty > sure:
            best, sure = kind, certainty
        if sure >= CERTAIN:
            break  # others are not even looked for
    if best is None:
        raise UnsupportedError("No image format is registered")
    return best


def _warn(graph: Graph, message: str) -> None:
    if graph.warn is not None:
        graph.warn(message)
    else:
        warnings.warn(message, UserWarning, stacklevel=2)
