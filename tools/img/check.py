"""``check``: is the image consistent; repairs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ...errors import PyvirtioError
from ..getopt import Option, UsageError
from ..messages import Failure, errno_text, say_findings
from ..objects import Objects
from ..qjson import pretty
from .opening import Source, cache_mode, open_image
from .shared import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    QUIET,
    is_json,
    one_operand,
)

if TYPE_CHECKING:
    from ...qcow2.result import CheckResult

__all__ = ["OPTIONS", "check_quietly", "run"]

OPTIONS = (
    HELP,
    FORMAT,
    Option(("-r", "--repair"), "what", "Repair: leaks, or all."),
    OUTPUT,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    Option(("-T",), "src_cache", "The cache mode of the image."),
    QUIET,
)

_NO_CHECKS = 63
_FIELDS = (
    "corruptions",
    "leaks",
    "corruptions_fixed",
    "leaks_fixed",
    "image_end_offset",
    "total_clusters",
    "allocated_clusters",
    "fragmented_clusters",
    "compressed_clusters",
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand. 0: good, 1: not checked, 2: corrupt, 3: leaks, 63: cannot be checked."""
    given = dict(found)
    objects = Objects()
    for option, value in found:
        if option == "-r" and value not in ("leaks", "all"):
            raise UsageError(f"Unknown option value for -r (expecting 'leaks' or 'all'): {value}")
        if option == "--object":
            objects.add(value)
    name = one_operand(operands)
    json = is_json(given.get("--output"))
    quiet = "-q" in given
    cache = cache_mode(given.get("-T", "writeback"))
    if cache is None:
        raise Failure(f"Invalid source cache option: {given['-T']}")
    source = Source(name, given.get("-f"), "--image-opts" in given, "-U" in given)
    fix = given.get("-r")
    disk = open_image(source, objects, writable=fix is not None, cache=cache, for_check=True)
    with disk:
        check = getattr(disk, "check", None)
        if check is None:
            raise Failure("This image format does not support checks", _NO_CHECKS)
        try:
            result: CheckResult = check(fix)
        except (PyvirtioError, OSError) as error:
            raise Failure(f"Check failed: {errno_text(error)}") from error
    say_findings(result.messages)
    if not quiet and not json:
        _print_repairs(result)
    if not quiet and result.failure is None:
        if json:
            print(pretty(_facts(result, name, disk.format_name)))
        else:
            _print(result)
    if result.failure is not None:
        raise Failure(f"Check failed: {os.strerror(result.failure)}")
    if result.check_errors:
        raise Failure("Check failed")
    return 2 if result.corruptions else 3 if result.leaks else 0


def _facts(result: CheckResult, name: str, format: str) -> dict[str, Any]:
    """``ImageCheck``."""
    facts: dict[str, Any] = {"filename": name, "format": format}
    facts["check-errors"] = result.check_errors
    for field in _FIELDS:
        value = getattr(result, field)
        if value:
            facts[field.replace("_", "-")] = value
    return facts


def _print_repairs(result: CheckResult) -> None:
    if result.corruptions_fixed or result.leaks_fixed:
        print(
            "The following inconsistencies were found and repaired:\n\n"
            f"    {result.leaks_fixed} leaked clusters\n"
            f"    {result.corruptions_fixed} corruptions\n\n"
            "Double checking the fixed image now..."
        )


def _print(result: CheckResult) -> None:
    if result.clean:
        print("No errors were found on the image.")
    if result.corruptions:
        print(
            f"\n{result.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if result.leaks:
        print(
            f"\n{result.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if result.check_errors:
        print(f"\n{result.check_errors} internal errors have occurred during the check.")
    total, allocated = result.total_clusters, result.allocated_clusters
    if total and allocated:
        print(
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        print(f"Image end offset: {result.image_end_offset}")


def check_quietly(source: Source, objects: Objects) -> list[str]:
    """What a check finds, in a few words; nothing if all is well or there is nothing to check."""
    with open_image(source, objects, backing=False, for_check=True) as disk:
        check = getattr(disk, "check", None)
        if check is None:
            return []
        result: CheckResult = check(None)
    counts = (
        (result.corruptions, "corruptions"),
        (result.leaks, "leaked clusters"),
        (result.check_errors or result.failure, "parts that cannot be checked"),
    )
    return [f"{count} {what}" for count, what in counts if count]
