"""pyvirtio-serve nbd under clients that ask for much at once, for nonsense, or never listen."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio import BackendError, MemoryDisk
from pyvirtio.backend import nbd_protocol as nbd
from pyvirtio.backend.nbd import NbdDisk
from pyvirtio.tools.serve import nbd_session
from pyvirtio.tools.serve.nbd_export import Export
from pyvirtio.tools.serve.nbd_server import Server
from support.nbd import Client, Running

SIZE = 64 << 20
Command, Flag = nbd.Command, nbd.Flag


class SlowDisk(MemoryDisk):
    """Reads of what lies at 1 MiB and beyond wait until they may go on."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.go_on = threading.Event()
        self.reading = 0
        self.most = 0
        self.flushed = b""
        self._count = threading.Lock()

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        with self._count:
            self.reading += 1
            self.most = max(self.most, self.reading)
        if offset >= 1 << 20:
            assert self.go_on.wait(30)
        super()._readv(offset, views, length)
        with self._count:
            self.reading -= 1

    def _flush(self) -> None:
        self.flushed = bytes(self.read(0, 8))

    def wait_for(self, reading: int) -> None:
        deadline = time.monotonic() + 30
        while self.reading < reading:
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def disk() -> SlowDisk:
    return SlowDisk()


@pytest.fixture
def running(tmp_path: Path, disk: SlowDisk) -> Iterator[Running]:
    export = Export("", disk, read_only=False, bitmaps={"b": [(512, 1024)]})
    server = Running(tmp_path / "s", export, max_connections=3)
    yield server
    disk.go_on.set()
    server.stop()


def reads(client: Client, count: int, length: int = 512, offset: int = 1 << 20) -> bytes:
    return b"".join(client.request(Command.READ, offset, length, cookie) for cookie in range(count))


# -- many at once ----------------------------------------------------------------------------------


def test_requests_of_one_connection_are_done_side_by_side(running: Running, disk: SlowDisk) -> None:
    with Client(running.path) as client:
        client.socket.sendall(reads(client, 5, 1 << 20))
        disk.wait_for(5)
        disk.go_on.set()
        assert {client.receive().cookie for _ in range(5)} == set(range(5))


def test_a_request_is_answered_while_one_before_it_waits(running: Running, disk: SlowDisk) -> None:
    with Client(running.path) as client:
        client.socket.sendall(reads(client, 1) + client.request(Command.READ, 0, 512, 99))
        assert client.receive().cookie == 99
        disk.go_on.set()
        assert client.receive().cookie == 0


def test_no_more_requests_than_the_bound_are_under_way(running: Running, disk: SlowDisk) -> None:
    with Client(running.path) as client:
        client.socket.sendall(reads(client, 40, 1 << 17))
        disk.wait_for(nbd_session.MAX_REQUESTS)
        time.sleep(0.2)  # no more come
        disk.go_on.set()
        assert {client.receive().cookie for _ in range(40)} == set(range(40))
        assert disk.most == nbd_session.MAX_REQUESTS == running.server.statistics.at_once


def test_memory_for_requests_is_bounded(running: Running, disk: SlowDisk) -> None:
    with Client(running.path) as client:
        client.socket.sendall(reads(client, 4, nbd.MAX_REQUEST))
        disk.wait_for(1)
        time.sleep(0.2)  # no more come
        disk.go_on.set()
        for _ in range(4):
            client.receive()
    assert disk.most == 1


def test_a_burst_of_small_requests_is_answered_whole(running: Running, disk: SlowDisk) -> None:
    with Client(running.path) as client:
        client.socket.sendall(reads(client, 500, offset=0))
        assert {client.receive().cookie for _ in range(500)} == set(range(500))


def test_a_flush_covers_what_was_written_on_another_connection(
    running: Running, disk: SlowDisk
) -> None:
    with NbdDisk(running.path) as one, NbdDisk(running.path) as other:
        one.write(0, b"written!")
        other.flush()
        assert disk.flushed == b"written!"


# -- what requests may say -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "code"),
    [
        (Command.READ, SIZE - 1, 2, 0, errno.EINVAL),
        (Command.READ, 2**64 - 1, 2**32 - 1, 0, errno.EINVAL),
        (Command.READ, 0, nbd.MAX_REQUEST + 1, 0, errno.EINVAL),
        (Command.READ, 0, nbd.MAX_REQUEST + 1, Flag.DF, errno.EOVERFLOW),
        (Command.READ, 0, 1, Flag.REQ_ONE, errno.EINVAL),
        (Command.READ, 0, 0, 0, 0),
        (Command.WRITE, SIZE, 1, 0, errno.ENOSPC),
        (Command.WRITE, 0, 1, Flag.NO_HOLE, errno.EINVAL),
        (Command.TRIM, 0, 4096, Flag.FUA, 0),
        (Command.TRIM, SIZE, 4096, 0, errno.ENOSPC),
        (Command.WRITE_ZEROES, 0, 4096, Flag.FUA | Flag.NO_HOLE, 0),
        (Command.WRITE_ZEROES, 0, 4096, Flag.DF, errno.EINVAL),
        (Command.FLUSH, 0, 0, 0, 0),
        (Command.CACHE, 0, 65536, 0, 0),
        (Command.CACHE, SIZE, 1, 0, errno.EINVAL),
        (Command.BLOCK_STATUS, 0, 0, 0, errno.EINVAL),
        (Command.BLOCK_STATUS, 0, 4096, 1 << 7, errno.EINVAL),
        (99, 0, 0, 0, errno.EINVAL),
    ],
)
def test_each_request_is_done_or_refused_with_the_right_number(
    running: Running, command: int, offset: int, length: int, flags: int, code: int
) -> None:
    with Client(running.path, "", "base:allocation") as client:
        data = b"x" * length if command == Command.WRITE else b""
        assert client.ask(command, offset, length, flags, data).error == code
        assert client.ask(Command.READ, 0, 1).error == 0


def test_fast_zeroes_are_refused_where_they_would_have_to_be_written(tmp_path: Path) -> None:
    with pyvirtio.create_disk(tmp_path / "a.qcow2", SIZE) as image:
        exports = [Export(n, d, False) for n, d in (("fast", image), ("slow", MemoryDisk(SIZE)))]
        server = Running(tmp_path / "s", *exports)
        try:
            for name, code in (("fast", 0), ("slow", errno.EOPNOTSUPP)):
                with Client(server.path, name) as client:
                    assert client.ask(Command.WRITE_ZEROES, 0, 65536, Flag.FAST_ZERO).error == code
                    assert client.ask(Command.WRITE_ZEROES, 0, 65536).error == 0
        finally:
            server.stop()


def test_status_is_told_for_every_context_and_one_run_if_one_is_wanted(running: Running) -> None:
    with Client(running.path, "", "base:allocation", "qemu:dirty-bitmap:b") as client:
        client.socket.sendall(client.request(Command.BLOCK_STATUS, 0, 4096, 1))
        base, dirty = client.receive(), client.receive()
        assert struct.unpack(">III", base.data) == (0, 4096, 0)
        assert struct.unpack(">7I", dirty.data) == (1, 512, 0, 512, 1, 3072, 0)
        assert dirty.last
        client.socket.sendall(client.request(Command.BLOCK_STATUS, 0, 4096, 1, Flag.REQ_ONE))
        client.receive()
        assert struct.unpack(">III", client.receive().data) == (1, 512, 0)


def test_contexts_are_chosen_for_one_export_and_forgotten_with_a_bad_choice(
    running: Running,
) -> None:
    with Client(running.path) as client:
        assert client.ask(Command.BLOCK_STATUS, 0, 512).error == errno.EINVAL
    with socket.socket(socket.AF_UNIX) as raw:
        client = Client.__new__(Client)
        client.socket = raw
        raw.connect(running.path)
        nbd.receive(raw, 18)
        raw.sendall(struct.pack(">I", 3))
        client.option(nbd.Option.STRUCTURED_REPLY)
        query = struct.pack(">III", 0, 1, 15) + b"base:allocation"
        assert len(client.option(nbd.Option.SET_META_CONTEXT, query)) == 2
        (refused,) = client.option(nbd.Option.SET_META_CONTEXT, query[:-1])
        assert refused[0] == nbd.Reply.INVALID
        client.option(nbd.Option.GO, bytes(6))
        assert client.ask(Command.BLOCK_STATUS, 0, 512).error == errno.EINVAL


def test_contexts_are_listed_by_their_namespace(running: Running) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        client = Client.__new__(Client)
        client.socket = raw
        raw.connect(running.path)
        nbd.receive(raw, 18)
        raw.sendall(struct.pack(">I", 3))
        client.option(nbd.Option.STRUCTURED_REPLY)

        def listed(*queries: bytes) -> list[bytes]:
            data = b"".join(struct.pack(">I", len(query)) + query for query in queries)
            data = struct.pack(">II", 0, len(queries)) + data
            return [
                found[4:] for _, found in client.option(nbd.Option.LIST_META_CONTEXT, data)[:-1]
            ]

        assert listed() == [b"base:allocation", b"qemu:dirty-bitmap:b"]
        assert listed(b"qemu:") == listed(b"qemu:dirty-bitmap:") == [b"qemu:dirty-bitmap:b"]
        assert listed(b"base:") == [b"base:allocation"]
        assert listed(b"x:", b"base:alloc") == []


# -- clients that are no good ----------------------------------------------------------------------


def test_a_client_that_chooses_nothing_is_not_waited_for(tmp_path: Path, disk: SlowDisk) -> None:
    running = Running(tmp_path / "s", Export("", disk, read_only=False), negotiation=0.3)
    with socket.socket(socket.AF_UNIX) as slow:
        slow.settimeout(30)
        slow.connect(running.path)
        slow.recv(18)
        slow.sendall(struct.pack(">I", 3) + nbd.OPTION.pack(nbd.OPTION_MAGIC, 6, nbd.MAX_OPTION))
        end = time.monotonic() + 30
        with suppress(ConnectionError):
            while time.monotonic() < end:  # a byte now and then
                slow.sendall(b"\0")
                time.sleep(0.05)
        assert time.monotonic() < end
    running.stop()


def test_more_connections_than_allowed_wait(running: Running) -> None:
    first = [Client(running.path) for _ in range(3)]
    with socket.socket(socket.AF_UNIX) as fourth:
        fourth.connect(running.path)
        fourth.settimeout(0.2)
        with pytest.raises(TimeoutError):
            fourth.recv(18)
        first.pop().socket.close()
        fourth.settimeout(30)
        assert fourth.recv(18)
    for client in first:
        client.socket.close()


def test_a_client_that_takes_no_answers_does_not_keep_the_server(
    tmp_path: Path, disk: SlowDisk
) -> None:
    running = Running(tmp_path / "s", Export("", disk, read_only=False), draining=0.3)
    with Client(running.path) as client:
        client.socket.sendall(reads(client, 8, 1 << 20, offset=0))
        client.receive()
        running.stop()


def test_requests_that_wait_are_not_taken_any_more_when_the_server_ends(disk: SlowDisk) -> None:
    listener = socket.create_server(("127.0.0.1", 0))  # TCP receives on after SHUT_RD
    server = Server([listener], [Export("", disk, read_only=False)])
    serving = threading.Thread(target=server.serve)
    serving.start()
    with listener, Client(listener.getsockname()[1]) as client:
        client.socket.sendall(reads(client, 100, 1 << 17))
        disk.wait_for(nbd_session.MAX_REQUESTS)
        server.stop()
        time.sleep(0.1)
        disk.go_on.set()
        answers = 0
        with suppress(BackendError, ConnectionError):
            while client.receive():
                answers += 1
        serving.join(30)
    assert answers == nbd_session.MAX_REQUESTS


def test_what_is_under_way_when_the_server_ends_is_answered(
    running: Running, disk: SlowDisk
) -> None:
    with Client(running.path) as client:
        client.socket.sendall(reads(client, 3))
        disk.wait_for(3)
        stopping = threading.Thread(target=running.stop)
        stopping.start()
        time.sleep(0.05)
        disk.go_on.set()
        assert {client.receive().cookie for _ in range(3)} == {0, 1, 2}
        assert client.hung_up()
        stopping.join(30)


def test_a_fault_of_ours_hangs_up_instead_of_leaving_a_request_unanswered(
    running: Running, disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    monkeypatch.setattr(disk, "readv", lambda offset, views: 1 // 0)
    with Client(running.path) as client:
        client.socket.sendall(reads(client, 1))
        assert client.hung_up()
    running.stop()
    assert told


def test_a_server_without_descriptors_goes_on_when_there_are_some(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.socket.accept
    failures = iter([OSError(errno.EMFILE, "Too many open files"), ConnectionAbortedError()])

    def accept(listener: socket.socket) -> tuple[socket.socket, object]:
        for failure in failures:
            raise failure
        return real(listener)

    monkeypatch.setattr(socket.socket, "accept", accept)
    with Client(running.path) as client:
        assert client.ask(Command.READ, 0, 1).error == 0


def random_session(source: random.Random) -> bytes:
    """What a client might say, here and there wrong: options, then requests."""
    said = [struct.pack(">I", source.choice([3] * 20 + [1, 1, 2, 0, 0xFFFFFFFF]))]
    name = struct.pack(">I", source.choice([0, 0, 0, 1, 5000, 0xFFFFFFFF]))
    for _ in range(source.randrange(5)):
        option = source.choice([*nbd.Option, 99, 0])
        data = source.choice(
            [
                b"",
                name,
                name + bytes(2),
                name + struct.pack(">HHH", 2, source.randrange(5), 3),
                name + struct.pack(">II", 1, 15) + b"base:allocation",
                name + struct.pack(">II", source.randrange(9), source.randrange(20)),
                source.randbytes(source.randrange(60)),
            ]
        )
        length = source.choice([len(data)] * 40 + [0, len(data) + 1, 1 << 16, 1 << 31])
        said.append(nbd.OPTION.pack(nbd.OPTION_MAGIC, option, length) + data)
    option = source.choice([nbd.Option.GO, nbd.Option.EXPORT_NAME])
    data = bytes(6) if option == nbd.Option.GO else b""
    said.append(nbd.OPTION.pack(nbd.OPTION_MAGIC, option, len(data)) + data)
    for _ in range(source.randrange(12)):
        command = source.choice([*Command, 50])
        offset = source.choice(
            [0, 512, SIZE - 1, SIZE, 2**63, 2**64 - 1, source.randrange(1 << 20)]
        )
        length = source.choice([0, 1, 512, 4096, 65536, SIZE, 2**32 - 1, source.randrange(9999)])
        magic = source.choice([nbd.REQUEST_MAGIC] * 20 + [source.getrandbits(32)])
        flags = source.choice([0, 0, 0, source.getrandbits(5), source.getrandbits(16)])
        said.append(nbd.REQUEST.pack(magic, flags, command, source.getrandbits(64), offset, length))
        if command == Command.WRITE:
            said.append(bytes(min(length, source.choice([length, 10]), 1 << 20)))
    whole = bytearray(b"".join(said))
    for _ in range(source.choice([0, 0, 0, 1, 3])):
        whole[source.randrange(len(whole))] = source.randrange(256)
    return bytes(whole[: source.choice([len(whole)] * 3 + [source.randrange(len(whole))])])


def test_bytes_are_counted_when_they_have_been_read_or_written(running: Running) -> None:
    with Client(running.path) as client:
        client.ask(Command.READ, 0, 512)
        client.ask(Command.READ, SIZE, 512)
        client.ask(Command.WRITE, 0, 100, data=bytes(100))
        client.ask(Command.WRITE, SIZE, 100, data=bytes(100))
    found = running.server.statistics
    assert (found.requests, found.read, found.written) == (4, 512, 100)


def test_random_clients_neither_end_the_server_nor_leave_anything_behind(
    running: Running, disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = []
    monkeypatch.setattr(threading, "excepthook", faults.append)
    disk.go_on.set()
    source = random.Random(int(os.environ.get("PYVIRTIO_NBD_SEED", "1")))
    for _ in range(int(os.environ.get("PYVIRTIO_NBD_CLIENTS", "300"))):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(running.path)
            with suppress(ConnectionError):
                client.sendall(random_session(source))
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 20):
                    pass
    with Client(running.path) as good:
        assert good.ask(Command.READ, 0, 1).error == 0
    running.stop()
    assert not faults
    assert running.server.statistics.requests > 100
    assert running.server.statistics.under_way == 0
