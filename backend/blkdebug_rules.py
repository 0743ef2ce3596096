"""The rules of ``blkdebug``: which events inject errors, change the state, or suspend a request.

They come from options (``inject-error.0.event=…``) or from a file of QEMU's configuration format.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import BackendError
from .options import Options

__all__ = ["EVENTS", "IO_TYPES", "Rule", "Rules", "read_config", "rules_from_options"]

EVENTS = frozenset(
    """l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update
    l2_update_compressed l2_alloc_cow_read l2_alloc_write read_aio read_backing_aio read_compressed
    write_aio write_compressed vmstate_load vmstate_save cow_read cow_write reftable_load
    reftable_grow reftable_update refblock_load refblock_update refblock_update_part refblock_alloc
    refblock_alloc_hookup refblock_alloc_write refblock_alloc_write_blocks
    refblock_alloc_write_table refblock_alloc_switch_table cluster_alloc cluster_alloc_bytes
    cluster_free flush_to_os flush_to_disk pwritev_rmw_head pwritev_rmw_after_head pwritev_rmw_tail
    pwritev_rmw_after_tail pwritev pwritev_zero pwritev_done empty_image_prepare
    l1_shrink_write_table l1_shrink_free_l2_clusters cor_write cluster_alloc_space none""".split()  # noqa: SIM905 -- a list of fifty lines else
)
"""QEMU's ``BlkdebugEvent``."""

IO_TYPES = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
_DEFAULT_IO_TYPES = frozenset(IO_TYPES) - {"block-status"}
_SECTOR = 512

_GROUP = re.compile(r'\[(\S+) "([^"]+)"\]|\[([^\]]+)\]?')
_VALUE = re.compile(r'\s*(\S+)\s+=\s*(?:"([^"]*)"|())')


@dataclass(eq=False, slots=True)
class Rule:
    """What happens at an event."""

    event: str
    state: int = 0
    """Only in this state; 0: in any."""
    new_state: int | None = None
    """It becomes this one,"""
    tag: str | None = None
    """or the request is suspended under this name,"""
    error: int = 0
    """or requests fail with this number from then on:"""
    sector: int = -1
    """those that touch this sector (-1: all)"""
    io_types: frozenset[str] = _DEFAULT_IO_TYPES
    """and are of these kinds;"""
    once: bool = False
    """only the first of them."""


def read_config(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The groups of a configuration file: name and options. Raises BackendError, ValueError."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.readlines()
    except OSError as error:
        raise BackendError.wrap(error, "Could not read blkdebug config file", path) from error
    group: dict[str, Any] | None = None
    name = ""
    for number, line in enumerate(lines, 1):
        if line[:1] in ("\n", "#"):
            continue
        if line.startswith("["):
            if group is not None:
                yield name, group
            match = _GROUP.match(line)
            name = (match[1] or match[3]) if match else line
            if name not in _KEYS:
                raise ValueError(f"There is no option group '{name}'")
            group = {}
            continue
        value = _VALUE.match(line)
        if group is None:
            raise ValueError("no group defined")
        if value is None:
            word = line.split()
            if not word:
                raise ValueError(f"{path}:{number}: parse error")
            raise ValueError(f"Invalid parameter '{word[0]}'")
        if value[1] not in _KEYS[name]:
            raise ValueError(f"Invalid parameter '{value[1]}'")
        group[value[1]] = value[2] or ""
    if group is not None:
        yield name, group


_KEYS = {
    "inject-error": ("event", "state", "iotype", "errno", "sector", "once", "immediately"),
    "set-state": ("event", "state", "new_state"),
}


def rules_from_options(options: Options) -> Iterator[Rule]:
    """The rules among a node's options; they are taken."""
    for name in _KEYS:
        given = options.group(f"{name}.")
        index = 0
        while True:
            prefix = f"{index}."
            group = {key: given.pop(key) for key in list(given) if key.startswith(prefix)}
            if not group:
                break
            yield make_rule(name, {key[len(prefix) :]: value for key, value in group.items()})
            index += 1
        if index == 0 and given and not any(key.split(".")[0].isdigit() for key in given):
            yield make_rule(name, {key: given.pop(key) for key in list(given)})
        for key in given:
            raise ValueError(f"Unused option '{key}' for [{name}]")


def make_rule(kind: str, given: dict[str, Any]) -> Rule:
    """The rule in one group of options. Raises ValueError."""
    for key in given:
        if key not in _KEYS[kind]:
            raise ValueError(f"[{kind}] section doesn't support the option '{key}'")
    options = Options(given)
    event = options.text("event")
    if event is None:
        raise ValueError("Missing event name for rule")
    if event not in EVENTS:
        raise ValueError(f"invalid parameter value: {event}")
    rule = Rule(event, state=options.number("state"))
    if kind == "set-state":
        rule.new_state = options.number("new_state")
        return rule
    rule.error = options.number("errno", errno.EIO)
    rule.sector = options.number("sector", -1)
    rule.once = options.boolean("once", False)
    options.boolean("immediately", False)
    io_type = options.text("iotype")
    if io_type is not None:
        if io_type not in IO_TYPES:
            raise ValueError(f"invalid parameter value: {io_type}")
        rule.io_types = frozenset({io_type})
    return rule


class Rules:
    """The rules in force, the state, and the requests that are suspended."""

    def __init__(self, rules: list[Rule]) -> None:
        self._rules = rules
        self._active: list[Rule] = []
        self.state = 1
        self._changed = threading.Condition()
        self._suspended: dict[str, int] = {}
        self._released: dict[str, int] = {}
        self.report: Callable[[str], None] = lambda message: None
        """Hears of every request that is suspended or resumed."""
        self._events = frozenset(rule.event for rule in rules)
        self.happen("none")

    def happen(self, event: str) -> None:
        """An event; returns only once the request is no more suspended."""
        if event not in self._events:
            return
        with self._changed:
            new_state, injected = self.state, False
            tags = []
            for rule in list(self._rules):
                if rule.event != event or rule.state not in (0, self.state):
                    continue
                if rule.new_state is not None:
                    new_state = rule.new_state
                elif rule.tag is not None:
                    self._rules.remove(rule)
                    tags.append(rule.tag)
                else:
                    if not injected:
                        self._active.clear()
                        injected = True
                    self._active.insert(0, rule)
            self.state = new_state
            for tag in tags:
                self._suspend(tag)

    def _suspend(self, tag: str) -> None:
        self._suspended[tag] = self._suspended.get(tag, 0) + 1
        self.report(f"blkdebug: Suspended request '{tag}'")
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._released.get(tag, 0) > 0)
        self._released[tag] -= 1

    def check(self, offset: int, length: int, io_type: str) -> None:
        """Raise BackendError if the request is to fail."""
        if not self._active:
            return
        with self._changed:
            for rule in self._active:
                at = rule.sector * _SECTOR
                hit = rule.sector < 0 or (length and offset <= at < offset + length)
                if hit and io_type in rule.io_types:
                    break
            else:
                return
            if rule.once:
                self._active.remove(rule)
                if rule in self._rules:
                    self._rules.remove(rule)
        if rule.error:
            raise BackendError(rule.error, os.strerror(rule.error))

    # -- breakpoints -----------------------------------------------------------------------------

    def add_breakpoint(self, event: str, tag: str) -> None:
        """Suspend the next request that meets ``event``, under the name ``tag``.

        Raises KeyError if there is no such event.
        """
        if event not in EVENTS:
            raise KeyError(event)
        with self._changed:
            self._rules.append(Rule(event, tag=tag))
            self._events |= {event}

    def resume(self, tag: str) -> None:
        """Let a suspended request go on. Raises KeyError if there is none of that name."""
        with self._changed:
            if not self._suspended.get(tag):
                raise KeyError(tag)
            self._release(tag)

    def remove_breakpoint(self, tag: str) -> None:
        """Forget the breakpoints of a name, and resume its requests. KeyError if there are none."""
        with self._changed:
            found = [rule for rule in self._rules if rule.tag == tag]
            for rule in found:
                self._rules.remove(rule)
            waiting = self._suspended.get(tag, 0)
            for _ in range(waiting):
                self._release(tag)
            if not found and not waiting:
                raise KeyError(tag)

    def resume_all(self) -> None:
        """Let everything go on, and suspend nothing more."""
        with self._changed:
            self._rules = [rule for rule in self._rules if rule.tag is None]
            for tag, count in list(self._suspended.items()):
                for _ in range(count):
                    self._release(tag)

    def _release(self, tag: str) -> None:
        self._suspended[tag] -= 1
        self._released[tag] = self._released.get(tag, 0) + 1
        self.report(f"blkdebug: Resuming request '{tag}'")
        self._changed.notify_all()

    def is_suspended(self, tag: str) -> bool:
        """Whether a request of that name is suspended."""
        return bool(self._suspended.get(tag))

    def wait_suspended(self, tag: str) -> None:
        """Wait until a request of that name is suspended."""
        with self._changed:
            self._changed.wait_for(lambda: self._suspended.get(tag))
