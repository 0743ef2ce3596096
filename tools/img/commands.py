"""The subcommands: where they are and how they are called. Help, manual and completion use it."""

from __future__ import annotations

__all__ = ["OURS", "QEMU"]

QEMU: dict[str, str] = {
    "amend": "[--object objectdef] [--image-opts] [-p] [-q] [-f fmt] [-t cache] [--force] "
    "-o options filename",
    "bench": "[-c count] [-d depth] [-f fmt] [--flush-interval=flush_interval] [-i aio] [-n] "
    "[--no-drain] [-o offset] [--pattern=pattern] [-q] [-s buffer_size] [-S step_size] [-t cache] "
    "[-w] [-U] filename",
    "bitmap": "(--merge SOURCE | --add | --remove | --clear | --enable | --disable)... "
    "[-b source_file [-F source_fmt]] [-g granularity] [--object objectdef] "
    "[--image-opts | -f fmt] filename bitmap",
    "check": "[--object objectdef] [--image-opts] [-q] [-f fmt] [--output=ofmt] "
    "[-r [leaks | all]] [-T src_cache] [-U] filename",
    "commit": "[--object objectdef] [--image-opts] [-q] [-f fmt] [-t cache] [-b base] "
    "[-r rate_limit] [-d] [-p] filename",
    "compare": "[--object objectdef] [--image-opts] [-f fmt] [-F fmt] [-T src_cache] [-p] [-q] "
    "[-s] [-U] filename1 filename2",
    "convert": "[--object objectdef] [--image-opts] [--target-image-opts] [--target-is-zero] "
    "[--bitmaps] [-U] [-C] [-c] [-p] [-q] [-n] [-f fmt] [-t cache] [-T src_cache] "
    "[-O output_fmt] [-B backing_file [-F backing_fmt]] [-o options] [-l snapshot_param] "
    "[-S sparse_size] [-r rate_limit] [-m num_coroutines] [-W] [--salvage] "
    "filename [filename2 [...]] output_filename",
    "create": "[--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] "
    "[-o options] filename [size]",
    "dd": "[--image-opts] [-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] "
    "[skip=blocks] if=input of=output",
    "info": "[--object objectdef] [--image-opts] [-f fmt] [--output=ofmt] [--backing-chain] "
    "[-U] filename",
    "map": "[--object objectdef] [--image-opts] [-f fmt] [--start-offset=offset] "
    "[--max-length=len] [--output=ofmt] [-U] filename",
    "measure": "[--output=ofmt] [-O output_fmt] [-o options] [--size N | [--object objectdef] "
    "[--image-opts] [-f fmt] [-l snapshot_param] filename]",
    "snapshot": "[--object objectdef] [--image-opts] [-U] [-q] "
    "[-l | -a snapshot | -c snapshot | -d snapshot] filename",
    "rebase": "[--object objectdef] [--image-opts] [-U] [-q] [-f fmt] [-t cache] [-T src_cache] "
    "[-p] [-u] -b backing_file [-F backing_fmt] filename",
    "resize": "[--object objectdef] [--image-opts] [-f fmt] [--preallocation=prealloc] [-q] "
    "[--shrink] filename [+ | -]size",
}
"""qemu-img's, in the order of its help text."""

OURS: dict[str, str] = {
    "completion": "bash | zsh | fish",
    "diff": "[--image-opts] [-f fmt] [-F fmt] [-l snapshot] [-L snapshot] [-g granularity] "
    "[--output=ofmt] [-p] [-U] filename1 [filename2]",
    "dump": "[--image-opts] [-f fmt] [--json] [-U] filename",
    "explain": "[--image-opts] [-f fmt] [--host] [--output=ofmt] [-U] filename offset",
    "man": "[command]",
    "show": "[--image-opts] [-f fmt] [--html=page] [--width=columns] [-U] filename",
    "verify-chain": "[--image-opts] [-f fmt] [--fast] [-U] filename",
}
"""What qemu-img lacks."""
