"""Changing options of an image that exists (``qemu-img amend``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from .create import CreateOptions
from .header_update import change_backing_file, update_header
from .layout import Autoclear, Compatible, Incompatible
from .metadata import Metadata
from .refcount_width import change_refcount_width
from .snapshots import Snapshots
from .zero_expansion import expand_zero_clusters

if TYPE_CHECKING:
    from ..backend.luks1 import Passphrase

__all__ = ["AmendOptions", "amend"]

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_FEATURES = int(Incompatible.DIRTY)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class AmendOptions:
    """What shall change; None: stays. The names are those of ``qemu-img amend -o``."""

    compat: str | None = None
    size: int | None = None
    """Bytes; a smaller size loses data."""
    backing_file: str | None = None
    """The name to be stored; an empty one for none. The file that is open stays in use."""
    backing_fmt: str | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: int | None = None
    data_file: str | None = None
    """The data file's name to be stored; an empty one for none."""
    data_file_raw: bool | None = None
    encrypt_state: str | None = None
    """``active`` or ``inactive``: what happens to key slots; for the rest see
    :meth:`Encryption.amend`."""
    encrypt_keyslot: int | None = None
    encrypt_old_secret: Passphrase | None = field(default=None, repr=False)
    encrypt_new_secret: Passphrase | None = field(default=None, repr=False)
    encrypt_iter_time: int | None = None

    @property
    def encryption(self) -> dict[str, Any]:
        """What concerns the encryption, if anything does: the arguments of Encryption.amend."""
        named = {
            "state": self.encrypt_state,
            "slot": self.encrypt_keyslot,
            "old_secret": self.encrypt_old_secret,
            "new_secret": self.encrypt_new_secret,
            "iter_time": self.encrypt_iter_time,
        }
        return named if any(value is not None for value in named.values()) else {}

    @classmethod
    def of(cls, **options: Any) -> AmendOptions:
        """From keyword arguments. Raises ValueError for names that cannot be changed."""
        known = {option.name for option in fields(cls)}
        for name in options:
            if name not in known:
                text = f"Invalid parameter '{name}'"
                if name in {option.name for option in fields(CreateOptions)}:
                    text += ": This option is only supported for image creation"
                raise ValueError(text)
        return cls(**options)


def amend(
    metadata: Metadata,
    snapshots: Snapshots,
    options: AmendOptions,
    *,
    resize: Callable[[int], None],
    progress: Progress,
    force: bool = False,
) -> None:
    """Change what ``options`` name, in QEMU's order; ``resize(size)`` changes the disk's size, and
    ``force`` allows to change the encryption so that nothing can be read any more.

    ``progress(done, total)`` is called for each long step, from 0 to its total. Raises ValueError,
    UnsupportedError or ImageError with QEMU's texts before anything changes, but where a refcount
    does not fit, or the host has no room, or version 2 cannot hold the image: what is asked for
    besides has been done then, as by QEMU, for it may be what makes room for that (another size,
    another refcount width).
    """
    metadata.check_writable()
    header = metadata.header
    version = header.version if options.compat is None else _version(options.compat)
    _check(metadata, snapshots, options, version)
    if options.encryption and metadata.encryption is not None:
        metadata.encryption.amend(**options.encryption, force=force)
    bits = options.refcount_bits or 1 << header.refcount_order
    steps = _Steps((version != header.version) + (bits != 1 << header.refcount_order), progress)
    with metadata.exclusive():
        if version > header.version:
            _upgrade(metadata, snapshots, steps.next())
        if bits != 1 << header.refcount_order:
            change_refcount_width(metadata, bits, steps.next())
        if options.data_file_raw is False and header.autoclear_features & Autoclear.RAW_DATA:
            kept = header.autoclear_features & ~Autoclear.RAW_DATA
            update_header(metadata, autoclear_features=kept)
        if options.data_file is not None:
            update_header(metadata, data_file=options.data_file or None)
        if options.backing_file is not None or options.backing_fmt is not None:
            _change_backing_file(metadata, options)
        if options.lazy_refcounts is not None and header.version >= 3:
            _set_lazy_refcounts(metadata, options.lazy_refcounts)
    if options.size is not None and options.size != header.size:
        resize(options.size)
    if version < header.version:
        _check_downgrade(metadata, snapshots)
        with metadata.exclusive():
            _downgrade(metadata, snapshots, steps.next())


def _version(compat: str) -> int:
    version = _VERSIONS.get(compat)
    if version is None:
        raise ValueError(f"Unknown compatibility level {compat}")
    return version


def _check(metadata: Metadata, snapshots: Snapshots, options: AmendOptions, version: int) -> None:
    header = metadata.header
    if options.data_file_raw and not header.autoclear_features & Autoclear.RAW_DATA:
        raise ValueError("data-file-raw cannot be set on existing images")
    if options.data_file is not None and not header.incompatible_features & Incompatible.DATA_FILE:
        raise ValueError("data-file can only be set for images that use an external data file")
    if options.encryption and metadata.encryption is None:
        raise ValueError("Can't amend encryption options - encryption not present")
    bits = options.refcount_bits
    if bits is not None:
        if not 1 <= bits <= 64 or bits & (bits - 1):
            raise ValueError("Refcount width must be a power of two and may not exceed 64 bits")
        if bits != 16 and version < 3:
            raise ValueError(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above "
                "(use compat=1.1 or greater)"
            )
    was_lazy = bool(header.compatible_features & Compatible.LAZY_REFCOUNTS)
    if options.lazy_refcounts and not was_lazy and version < 3:
        raise ValueError(
            "Lazy refcounts only supported with compatibility level 1.1 and above "
            "(use compat=1.1 or greater)"
        )


def _check_downgrade(metadata: Metadata, snapshots: Snapshots) -> None:
    if metadata.header.refcount_order != 4:
        raise UnsupportedError("compat=0.10 requires refcount_bits=16", feature="downgrade")
    features = metadata.header.incompatible_features
    if features & Incompatible.DATA_FILE:
        raise UnsupportedError("Cannot downgrade an image with a data file", feature="downgrade")
    if features & ~_FEATURES:
        raise UnsupportedError(
            f"Cannot downgrade an image with incompatible features {features & ~_FEATURES:#x} set",
            feature="downgrade",
        )
    if metadata.header.bitmaps is not None:
        raise UnsupportedError("Cannot downgrade an image with bitmaps", feature="downgrade")
    for snapshot in snapshots:
        # Version 2 has no place for what stands in the extra data.
        if snapshot.vm_state_size >= 1 << 32 or snapshot.disk_size != metadata.header.size:
            raise UnsupportedError(
                "Internal snapshots prevent downgrade of image", feature="downgrade"
            )
    snapshots.refuse_views()


class _Steps:
    """The progress of several steps as that of one, in QEMU's way: those to come are taken to be
    as long as the ones before them on the average."""

    def __init__(self, number: int, progress: Progress) -> None:
        self._left = number
        self._begun = self._before = self._length = 0
        self._progress = progress

    def next(self) -> Progress:
        """Begin another step; its progress."""
        self._before += self._length
        self._length = 0
        self._begun += 1
        self._left -= 1

        def tell(done: int, total: int) -> None:
            self._length = total
            known = self._before + total
            self._progress(self._before + done, known + known * self._left // self._begun)

        return tell


def _upgrade(metadata: Metadata, snapshots: Snapshots, progress: Progress) -> None:
    """To version 3, whose snapshots must say how large the disk was."""
    progress(0, 2)
    if len(snapshots):
        snapshots.write_table()
    progress(1, 2)
    update_header(
        metadata,
        adopt=metadata.adopt_geometry,
        version=3,
        incompatible_features=0,
        compatible_features=0,
        autoclear_features=0,
        refcount_order=4,
    )
    progress(2, 2)


def _downgrade(metadata: Metadata, snapshots: Snapshots, progress: Progress) -> None:
    header = metadata.header
    metadata.make_accurate()  # version 2 has no bit that says that refcounts may be wrong
    metadata.lazy = False
    update_header(metadata, compatible_features=0, autoclear_features=0)
    l1_tables = [metadata.tables.l1, *(snapshots.l1_table(snapshot) for snapshot in snapshots)]
    backed = header.backing_file is not None
    expand_zero_clusters(metadata, l1_tables, backed=backed, progress=progress)
    update_header(
        metadata,
        adopt=metadata.adopt_geometry,
        version=2,
        incompatible_features=0,
        unknown_fields=b"",
    )


def _change_backing_file(metadata: Metadata, options: AmendOptions) -> None:
    name, kind = metadata.header.backing_file, metadata.header.backing_format
    if options.backing_file is not None:
        name = options.backing_file or None
    if options.backing_fmt is not None:
        kind = options.backing_fmt or None
    change_backing_file(metadata, name, kind if name else None)


def _set_lazy_refcounts(metadata: Metadata, lazy: bool) -> None:
    metadata.make_accurate()
    metadata.lazy = lazy
    features = metadata.header.compatible_features & ~Compatible.LAZY_REFCOUNTS
    if lazy:
        features |= Compatible.LAZY_REFCOUNTS
    if features != metadata.header.compatible_features:
        update_header(metadata, compatible_features=features)
