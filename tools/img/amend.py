"""``amend``: change options of an image."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from ...errors import ImageError, PyvirtioError
from ..getopt import Option, UsageError
from ..messages import Failure, report, text_of
from ..objects import Objects
from ..optlist import Given, accumulate, wants_help
from .opening import Source, cache_mode, open_image
from .settings import amend_settings, create_settings, print_amend_help
from .shared import FORMAT, HELP, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Meter

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    OBJECT,
    IMAGE_OPTS,
    Option(("--force",), None, "Do it even if it may lose the last key of an encrypted image."),
    Option(("-o",), "options", "What to change; -o help lists it."),
    Option(("-f",), "fmt", FORMAT.help),
    Option(("-t",), "cache", "The cache mode."),
    PROGRESS,
    QUIET,
)

_PLAIN = (
    "compat",
    "size",
    "backing_file",
    "backing_fmt",
    "lazy_refcounts",
    "refcount_bits",
    "data_file_raw",
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    objects = Objects()
    options: str | None = None
    for option, value in found:
        if option == "--object":
            objects.add(value)
        elif option == "-o":
            options = accumulate(options, value)
    chosen = dict(found)
    if options is None:
        raise UsageError("Must specify options (-o)")
    format = chosen.get("-f")
    with Meter("-p" in chosen and "-q" not in chosen, begin=False) as meter:
        if format is not None and wants_help(options):
            print_amend_help(format)
            return 0
        if len(operands) != 1:
            raise Failure("Expecting one image file name")
        cache = cache_mode(chosen.get("-t", "writeback"))
        if cache is None:
            raise Failure(f"Invalid cache option: {chosen['-t']}")
        source = Source(operands[0], format, "--image-opts" in chosen)
        with open_image(source, objects, writable=True, cache=cache) as disk:
            if wants_help(options):
                print_amend_help(disk.format_name)
                return 0
            given = _given(disk.format_name, options)
            meter.percent(0)
            try:
                _amend(disk, given, objects, meter, force="--force" in chosen)
            except (PyvirtioError, ValueError, OSError) as error:
                meter.percent(100)
                raise Failure(text_of(error)) from error
            meter.percent(100)
    return 0


def _given(format: str, options: str) -> Given:
    settings = amend_settings(format)
    given = Given(settings)
    try:
        given.parse(options)
    except Failure as failure:
        names = {setting.name for setting in settings}
        others = tuple(s for s in create_settings(format, protocol=False) if s.name not in names)
        try:
            Given((*settings, *others)).parse(options)
        except Failure:
            raise failure from None
        hint = "This option is only supported for image creation\n"
        raise Failure(failure.message, hint=hint) from failure
    return given


def _amend(disk: Disk, given: Given, objects: Objects, meter: Meter, *, force: bool) -> None:
    amend: Any = getattr(disk, "amend", None)
    changes = {name: given.values[name] for name in _PLAIN if name in given.values}
    keys = {
        name.rpartition(".")[2]: value
        for name, value in given.values.items()
        if name not in _PLAIN and name != "data_file"
    }
    _check_files(disk, given)
    if "data_file" in given.values:
        changes["data_file"] = given.values["data_file"]
    if keys:
        _amend_keys(disk, keys, objects, force=force)
    if changes:
        try:
            amend(progress=meter, **changes)
        except ImageError as error:
            if "L1 table" not in str(error):
                raise
            report(text_of(error))
            number = errno.EFBIG if "too large" in str(error) else errno.EINVAL
            text = f"Failed to turn zero into data clusters: {os.strerror(number)}"
            raise Failure(text) from error


def _check_files(disk: Disk, given: Given) -> None:
    """What QEMU does not change here."""
    info = disk.info()
    backing, kind = given.text("backing_file"), given.text("backing_fmt")
    given_any = backing is not None or kind is not None
    if given_any and (backing, kind) != (info.backing_filename, info.backing_format):
        hint = "You can use 'qemu-img rebase' instead.\n"
        raise Failure("Cannot amend the backing file", hint=hint)
    if "data_file" in given.values and "data-file" not in disk.children:
        raise Failure("data-file can only be set for images that use an external data file")


def _amend_keys(disk: Disk, keys: dict[str, Any], objects: Objects, *, force: bool) -> None:
    encryption: Any = getattr(disk, "encryption", None)
    if encryption is None:
        raise ValueError(
            "Can't amend encryption options - encryption not present"
            if disk.format_name == "qcow2"
            else f"Format '{disk.format_name}' is not encrypted"
        )
    state = keys.get("state")
    if state is None:
        raise ValueError("Parameter 'state' is missing")
    old = keys.get("old-secret")
    secret = None if old is None else objects.secret(old)
    if state == "active":
        if "new-secret" not in keys:
            raise ValueError("'new-secret' is required to activate a keyslot")
        if old is not None:
            raise ValueError("'old-secret' must not be given when activating keyslots")
        encryption.add_key(
            objects.secret(keys["new-secret"]),
            slot=keys.get("keyslot"),
            iter_time=keys.get("iter-time", 2000),
            force=force,
        )
    elif state == "inactive":
        if "new-secret" in keys:
            raise ValueError("'new-secret' must not be given when erasing keyslots")
        if "iter-time" in keys:
            raise ValueError("'iter-time' must not be given when erasing keyslots")
        encryption.erase_key(slot=keys.get("keyslot"), passphrase=secret, force=force)
    else:
        raise ValueError(f"Parameter 'state' does not accept value '{state}'")
