"""``convert``: copy images into one of any format."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...backend.concatenated import ConcatenatedDisk
from ...backend.convert import CopyError, convert
from ...errors import PyvirtioError
from ..getopt import Option
from ..messages import Failure, text_of, warn
from ..objects import Objects
from ..optlist import Given, accumulate, wants_help
from ..sizes import cvtnum, parse_number
from .bitmap_copy import check_bitmaps, copy_bitmaps
from .creating import add_backing, create_image
from .formats import check_protocol
from .opening import Source, cache_mode, open_image
from .settings import create_settings, print_create_help
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Meter
from .snapshots import SnapshotChoice, open_snapshot

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    Option(("--target-image-opts",), None, "The target's name is a list of options."),
    Option(("--salvage",), None, "Take what cannot be read for zeroes, and go on."),
    Option(("--target-is-zero",), None, "The target reads as zeroes everywhere."),
    Option(("--bitmaps",), None, "Copy the persistent dirty bitmaps, too."),
    Option(("--skip-broken-bitmaps",), None, "But for those that are inconsistent."),
    Option(("-f",), "fmt", FORMAT.help),
    Option(("-O",), "output_fmt", "The format of the target; raw if not given."),
    Option(("-B",), "backing_file", "The target becomes an overlay over this image."),
    Option(("-F",), "backing_fmt", "The format of the backing file."),
    Option(("-C",), None, "Let the host copy where it can."),
    Option(("-c",), None, "Write compressed clusters."),
    Option(("-o",), "options", "Options of the target's format; -o help lists them."),
    Option(("-l",), "snapshot_param", "Copy a snapshot."),
    Option(("-S",), "sparse_size", "So many bytes of zeroes become a hole; 0: none do."),
    PROGRESS,
    Option(("-t",), "cache", "The cache mode of the target."),
    Option(("-T",), "src_cache", "The cache mode of the sources."),
    QUIET,
    Option(("-n",), None, "The target is there already."),
    Option(("-m",), "num_coroutines", "So many threads copy."),
    Option(("-W",), None, "Write out of order, as data comes."),
    Option(("-r",), "rate_limit", "Write so many bytes per second at most."),
)

_SECTOR = 512
_MAX_SPARSE = 32768 * _SECTOR
_MAX_WORKERS = 16


@dataclass(slots=True)
class _Job:
    """What the command line asks for."""

    found: dict[str, str]
    objects: Objects
    options: str | None = None
    snapshot: SnapshotChoice | None = None
    sparse_size: int = 4096
    workers: int = 8
    rate_limit: int = 0

    def __contains__(self, option: str) -> bool:
        return option in self.found

    @property
    def format(self) -> str | None:
        """The target's."""
        return self.found.get("-O", None if "--target-image-opts" in self else "raw")


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    job = _job(found)
    target = operands[-1] if len(operands) > 1 else None
    if job.options is not None and wants_help(job.options):
        if job.format is None:
            raise Failure("Option help requires a format be specified")
        print_create_help(target, job.format)
        return 0
    if target is None:
        raise Failure("Must specify image file name")
    source_cache = cache_mode(job.found.get("-T", "writeback"))
    if source_cache is None:
        raise Failure(f"Invalid source cache option: {job.found['-T']}")
    with Meter("-p" in job and "-q" not in job) as meter, ExitStack() as stack:
        disks: list[Disk] = []
        for name in operands[:-1]:
            source = Source(name, job.found.get("-f"), "--image-opts" in job, "-U" in job)
            disk = open_image(source, job.objects, cache=source_cache)
            disks.append(stack.enter_context(disk))
        image = disks[0]
        if job.snapshot is not None:
            if len(disks) > 1 and job.snapshot.either is not None:
                raise Failure("No support for concatenating multiple snapshot")
            disks[0] = open_snapshot(image, job.snapshot)
        joined = disks[0] if len(disks) == 1 else ConcatenatedDisk(disks)
        _convert(job, joined, image, len(disks), target, meter)
    return 0


def _job(found: list[tuple[str, str]]) -> _Job:
    job = _Job(dict(found), Objects())
    for option, value in found:
        if option == "--object":
            job.objects.add(value)
        elif option == "-o":
            job.options = accumulate(job.options, value)
        elif option == "-l":
            job.snapshot = SnapshotChoice(value)
        elif option == "-S":
            job.sparse_size = _sparse_size(value)
        elif option == "-m":
            workers = parse_number(value, 1, _MAX_WORKERS)
            if workers is None:
                raise Failure(
                    "Invalid number of coroutines. Allowed number of coroutines is between 1 and "
                    f"{_MAX_WORKERS}"
                )
            job.workers = workers
        elif option == "-r":
            job.rate_limit = cvtnum("rate limit", value)
    for condition, message in (
        (
            "--skip-broken-bitmaps" in job and "--bitmaps" not in job,
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ),
        ("-c" in job and "-C" in job, "Cannot enable copy offloading when -c is used"),
        ("-S" in job and "-C" in job, "Cannot enable copy offloading when -S is used"),
        ("-C" in job and "--salvage" in job, "Cannot use copy offloading in salvaging mode"),
        (
            "--target-image-opts" in job and "-n" not in job,
            "--target-image-opts requires use of -n flag",
        ),
        (
            "-n" in job and job.options is not None,
            "-o has no effect when skipping image creation",
        ),
        ("--target-is-zero" in job and "-n" not in job, "--target-is-zero requires use of -n flag"),
    ):
        if condition:
            raise Failure(message)
    return job


def _sparse_size(text: str) -> int:
    size = cvtnum("buffer size for sparse output", text)
    if size % _SECTOR or size > _MAX_SPARSE:
        raise Failure(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of "
            f"{_SECTOR} up to {_MAX_SPARSE}. Select 0 to disable sparse detection (fully "
            "allocates output)."
        )
    return size


def _convert(
    job: _Job, source: Disk, image: Disk, count: int, target_name: str, meter: Meter
) -> None:
    given = None if "-n" in job else _creation(job, target_name, source.size)
    base = job.found.get("-B") if given is None else given.text("backing_file")
    if "--target-is-zero" in job and base is not None:
        raise Failure("Cannot use --target-is-zero when the destination image has a backing file")
    if count > 1 and base is not None:
        raise Failure(
            "Having a backing file for the target makes no sense when concatenating multiple "
            "input images"
        )
    if given is not None:
        _check_creation(job, given)
    if "--bitmaps" in job:
        if count > 1:
            raise Failure("Copying bitmaps only possible with single source")
        check_bitmaps(image, skip_broken="--skip-broken-bitmaps" in job)
    secrets: dict[str, str] = {}
    if given is not None:
        secrets = {name: text for name, text in given.texts.items() if name.endswith("key-secret")}
        _create(job, given, target_name)
    cache = cache_mode(job.found.get("-t", "unsafe"))
    if cache is None:
        raise Failure(f"Invalid cache option: {job.found['-t']}")
    target_source = Source(target_name, job.format, "--target-image-opts" in job)
    with open_image(
        target_source,
        job.objects,
        writable=True,
        cache=cache,
        unmap=job.sparse_size > 0,
        secrets=secrets,
    ) as target:
        _check_target(job, source, target)
        quiet = "-q" in job
        salvage = (lambda message: None) if quiet else warn
        try:
            convert(
                source,
                target,
                target_is_new=given is not None,
                target_is_zero="--target-is-zero" in job,
                overlay=base is not None,
                compressed="-c" in job,
                sparse_size=job.sparse_size,
                parallel=job.workers,
                out_of_order="-W" in job,
                salvage=salvage if "--salvage" in job else None,
                rate_limit=job.rate_limit,
                progress=meter.beyond_zero,
            )
        except CopyError as error:
            raise Failure(error.brief) from error
        except (PyvirtioError, ValueError, OSError) as error:
            raise Failure(text_of(error)) from error
        if "--bitmaps" in job:
            copy_bitmaps(image, target, skip_broken="--skip-broken-bitmaps" in job)


def _creation(job: _Job, target: str, size: int) -> Given:
    """The options for making the target."""
    format = job.format or "raw"
    settings = create_settings(format)
    check_protocol(target)
    given = Given(settings)
    if job.options is not None:
        given.parse(job.options)
    given.put("size", str(size))
    add_backing(given, format, job.found.get("-B"), job.found.get("-F"))
    return given


def _check_creation(job: _Job, given: Given) -> None:
    if given.text("backing_file") is not None and given.text("backing_fmt") is None:
        raise Failure("Use of backing file requires explicit backing format")
    if "-c" not in job:
        return
    if job.format not in ("qcow2",):
        raise Failure("Compression not supported for this file format")
    if given.flag("encryption") or given.text("encrypt.format") is not None:
        raise Failure("Compression and encryption not supported at the same time")
    if given.text("preallocation") not in (None, "off"):
        raise Failure("Compression and preallocation not supported at the same time")


def _create(job: _Job, given: Given, target: str) -> None:
    prefix = f"{target}: error while converting {job.format}: "
    try:
        create_image(target, job.format or "raw", given, job.objects)
    except Failure as failure:
        raise Failure(prefix + failure.message) from failure
    except (PyvirtioError, ValueError, OSError) as error:
        raise Failure(prefix + text_of(error)) from error


def _check_target(job: _Job, source: Disk, target: Disk) -> None:
    if "--bitmaps" in job and getattr(target, "bitmaps", None) is None:
        raise Failure(f"Format driver '{target.format_name}' does not support bitmaps")
    if "-c" in job and target.format_name not in ("qcow2", "compress"):
        raise Failure("Compression not supported for this file format")
    if target.size < source.size:
        raise Failure("output file is smaller than input file")
