"""A KeyboardInterrupt at a chosen moment, where CPython itself looks for signals.

That is after a call, at the start of a function and at the end of a loop's turn. There a trace
function raises, as the signal's handler would, unless an exception would be handled by somebody
else one instruction later, where the trace function comes.
"""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType
from typing import Any

__all__ = ["interrupted", "moments"]

_LOOKS = frozenset({"CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME"})


def moments(folder: str, work: Callable[[], object]) -> int:
    """How many such moments there are while ``work`` runs code of the modules in ``folder``."""
    tracer = _Tracer(folder, None, KeyboardInterrupt)
    tracer.run(work)
    return tracer.count


def interrupted(
    folder: str, work: Callable[[], object], moment: int, error: type[BaseException]
) -> bool:
    """Run ``work`` and raise ``error`` at a moment (from 1); whether it came to that."""
    try:
        _Tracer(folder, moment, error).run(work)
    except error:
        return True
    return False


class _Tracer:
    def __init__(self, folder: str, moment: int | None, error: type[BaseException]) -> None:
        self.count = 0
        self._folder = folder
        self._moment = moment
        self._error = error
        self._last: dict[int, int] = {}
        """By frame: where its last instruction is."""

    def run(self, work: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            work()
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        if os.path.dirname(frame.f_code.co_filename) != self._folder:
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "return":
            self._last.pop(id(frame), None)
        elif event == "opcode":
            last, now = self._last.get(id(frame)), frame.f_lasti
            self._last[id(frame)] = now
            if last is not None and _may_interrupt(frame.f_code, last, now):
                self.count += 1
                if self.count == self._moment:
                    sys.settrace(None)
                    raise self._error
        return self._step


@cache
def _may_interrupt(code: CodeType, last: int, now: int) -> bool:
    if dis.opname[code.co_code[last]] not in _LOOKS:
        return False
    return _handler(code, last) == _handler(code, now)


def _handler(code: CodeType, at: int) -> int | None:
    entries: Any = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]
    return next((entry.target for entry in entries if entry.start <= at < entry.end), None)
