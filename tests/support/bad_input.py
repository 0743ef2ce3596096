"""Our programs with words that are no good, each run in a fork of one process: hundreds in seconds.

    python bad_input.py FOLDER < cases > answers

Both are JSON: a list of cases ``{"program": "img", "words": [...], "stdout": "pipe"}``, and one of
answers ``{"status": 1, "errors": "..."}``. What is not done after a time is ended by SIGALRM.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pkgutil
import resource
import signal
import struct
import sys
from typing import Any

_TIME = 20
_LARGEST_FILE = 64 << 20


def _be_nobody_special() -> None:
    """Root without its powers: permissions of files count."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = struct.pack("=Ii", 0x20080522, 0)
    if libc.capset(version, bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


def _child(case: dict[str, Any], stderr: int) -> None:
    os.setpgid(0, 0)
    signal.alarm(_TIME)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(stderr, 2)
    output = case.get("stdout", "null")
    if output == "null":
        os.dup2(null, 1)
    elif output == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif output == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    else:
        os.close(1)
    for stream, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        try:
            errors = "backslashreplace" if number == 2 else "strict"
            mode = "w" if number else "r"
            made = open(number, mode, errors=errors, closefd=False)  # noqa: SIM115
        except OSError:
            made = None  # as Python does
        setattr(sys, stream, made)
        setattr(sys, f"__{stream}__", made)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
    _be_nobody_special()
    sys.argv = [
        f"pyvirtio-{case['program']}",
        *(os.fsdecode(w.encode("latin-1")) for w in case["words"]),
    ]
    main = importlib.import_module(f"pyvirtio.tools.{case['program']}").main
    sys.exit(main())


def _run(case: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        os.close(reader)
        _child(case, writer)
    os.close(writer)
    with open(reader, "rb") as stream:
        errors = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return {"status": status, "errors": errors.decode(errors="replace")}


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    for package in ("tools", "tools.img", "tools.io", "tools.serve", "qcow2", "backend"):
        folder = importlib.import_module(f"pyvirtio.{package}")
        for module in pkgutil.iter_modules(folder.__path__):
            if module.name != "__main__":
                importlib.import_module(f"pyvirtio.{package}.{module.name}")
    print(json.dumps([_run(case) for case in json.load(sys.stdin)]))
