"""Moving pieces of data from a reader to a writer with several threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from threading import Condition, Thread
from typing import Generic, TypeVar

__all__ = ["pump"]

Piece = TypeVar("Piece")
Data = TypeVar("Data")


def pump(
    pieces: Iterator[Piece],
    read: Callable[[Piece], Data],
    write: Callable[[Piece, Data], None],
    done: Callable[[Piece], None],
    *,
    workers: int,
    in_order: bool,
) -> None:
    """``write(piece, read(piece))`` for every piece, by ``workers`` threads.

    Reads overlap; ``in_order`` has one write at a time, in the order of the pieces. ``done`` is
    called in the caller's thread. The first exception of any of them, or one that hits the
    caller while it waits (KeyboardInterrupt), stops all; requests under way end first.
    """
    if workers <= 1:
        for piece in pieces:
            write(piece, read(piece))
            done(piece)
        return
    state = _Pump(pieces, read, write, in_order, workers)
    threads = [Thread(target=state.work, daemon=True) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        while True:
            finished = state.wait()
            if finished is None:
                break
            for piece in finished:
                done(piece)
    finally:
        state.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if state.error is not None:
        raise state.error


class _Pump(Generic[Piece, Data]):
    def __init__(
        self,
        pieces: Iterator[Piece],
        read: Callable[[Piece], Data],
        write: Callable[[Piece, Data], None],
        in_order: bool,
        workers: int,
    ) -> None:
        self._pieces = pieces
        self._read = read
        self._write = write
        self._in_order = in_order
        self._changed = Condition()
        self._taken = 0
        self._turn = 0
        """The number of the piece that may be written next."""
        self._finished: deque[Piece] = deque()
        self._running = workers
        self._stopped = False
        self.error: BaseException | None = None

    def work(self) -> None:
        """What a thread does."""
        try:
            while (taken := self._take()) is not None:
                self._move(*taken)
        except BaseException as error:
            with self._changed:
                if self.error is None:
                    self.error = error
                self._stopped = True
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _take(self) -> tuple[Piece, int] | None:
        with self._changed:
            if self._stopped:
                return None
            for piece in self._pieces:
                self._taken += 1
                return piece, self._taken - 1
            return None

    def _move(self, piece: Piece, number: int) -> None:
        data = self._read(piece)
        if self._in_order:
            with self._changed:
                self._changed.wait_for(lambda: self._turn == number or self._stopped)
                if self._stopped:
                    return
        self._write(piece, data)
        with self._changed:
            self._turn += 1
            self._finished.append(piece)
            self._changed.notify_all()

    def wait(self) -> list[Piece] | None:
        """Pieces that are done, some at least; None if there are no more."""
        with self._changed:
            while not self._finished:
                if self.error is not None or not self._running:
                    return None
                self._changed.wait()
            finished = list(self._finished)
            self._finished.clear()
            return finished

    def stop(self) -> None:
        """Have the threads end after what they are at."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
