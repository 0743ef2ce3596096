"""Faults in the NBD server, in TLS and in the map of an image: (file, what, old, new, test, …)."""
# One line each: a table.
# ruff: noqa: E501
# fmt: off

CLIENTS = "tools/test_serve_nbd_clients.py::test_"
PROGRAM = "tools/test_serve_nbd_program.py::test_"
TLS = "tools/test_serve_nbd_tls.py::test_"
MAP = "qcow2/test_host_map.py::test_"
BACK = "qcow2/test_referrers.py::test_"
SESSION, SERVER = "tools/serve/nbd_session.py", "tools/serve/nbd_server.py"
STREAM, HANDSHAKE = "tools/serve/nbd_stream.py", "tools/serve/nbd_handshake.py"

NBD: list[tuple[str, ...]] = [
    # -- requests --
    (SESSION, "one request after the other", "len(self._threads) < MAX_REQUESTS - 1", "False", CLIENTS + "requests_of_one_connection_are_done_side_by_side", CLIENTS + "a_request_is_answered_while_one_before_it_waits"),
    (SESSION, "as many requests as a client likes", "len(self._threads) < MAX_REQUESTS - 1", "len(self._threads) < 99", CLIENTS + "no_more_requests_than_the_bound_are_under_way"),
    (SESSION, "memory as much as a client likes", "self._bytes + request.weight <= _MAX_BYTES", "True", CLIENTS + "memory_for_requests_is_bounded"),
    (SESSION, "memory is never given back", "                    self._bytes -= request.weight\n", "                    pass\n", CLIENTS + "memory_for_requests_is_bounded"),
    (SESSION, "unknown flags go through", "flags & ~int(_FLAGS[nbd.Command(command)])", "flags & ~_FLAGS[nbd.Command(command)]", CLIENTS + "each_request_is_done_or_refused_with_the_right_number"),
    (SESSION, "a fault of ours leaves a request unanswered", "            self._over = True\n            self.cut()\n", "            pass\n", CLIENTS + "a_fault_of_ours_hangs_up_instead_of_leaving_a_request_unanswered"),
    (SESSION, "fast zeroes are written slowly", "fallback=not fast", "fallback=True", CLIENTS + "fast_zeroes_are_refused_where_they_would_have_to_be_written"),
    (SESSION, "a stopping server takes requests", "        self._over = True\n        self._stream.stop_receiving()\n", "        self._stream.stop_receiving()\n", CLIENTS + "requests_that_wait_are_not_taken_any_more_when_the_server_ends"),
    (SESSION, "refused bytes are counted", "            contents = self._do(agreed, request)\n            self._statistics.succeed(request.command, request.length)\n", "            self._statistics.succeed(request.command, request.length)\n            contents = self._do(agreed, request)\n", CLIENTS + "bytes_are_counted_when_they_have_been_read_or_written"),
    # -- connections --
    (SERVER, "a client that chooses nothing stays", "                    session.cut()\n                    client.deadline = math.inf\n", "                    client.deadline = math.inf\n", CLIENTS + "a_client_that_chooses_nothing_is_not_waited_for"),
    (SERVER, "any number of connections", "() if len(self._sessions) >= self._max_connections else self._listeners", "self._listeners", CLIENTS + "more_connections_than_allowed_wait"),
    (SERVER, "clients that do not listen are waited for", "                cut = True\n                for session in self._sessions:\n                    session.cut()\n", "                cut = True\n", CLIENTS + "a_client_that_takes_no_answers_does_not_keep_the_server"),
    (SERVER, "a server ends without descriptors", "                    if error.errno not in _NO_ROOM:\n", "                    if True:\n", CLIENTS + "a_server_without_descriptors_goes_on_when_there_are_some"),
    (HANDSHAKE, "a bad choice of contexts leaves the last", "            self._contexts = (\"\", ())  # what fails leaves nothing chosen\n", "            pass\n", CLIENTS + "contexts_are_chosen_for_one_export_and_forgotten_with_a_bad_choice"),
    # -- TLS --
    (HANDSHAKE, "exports are told in the clear", "        if self._tls is not None and not self._stream.encrypted:\n            raise _Refused", "        if False:\n            raise _Refused", TLS + "nothing_is_told_in_the_clear"),
    (STREAM, "the last answers are lost with TLS", "            if self._stopped >= 0:\n                os.eventfd_write", "            if False:\n                os.eventfd_write", TLS + "the_last_answers_are_encrypted_when_the_server_ends"),
    ("backend/tls.py", "any client will do", "        context.verify_mode = ssl.CERT_REQUIRED if demanding else ssl.CERT_NONE\n", "        context.verify_mode = ssl.CERT_NONE if self.server else ssl.CERT_REQUIRED\n", TLS + "a_stranger_is_refused_where_clients_are_verified"),
    ("backend/tls.py", "a certificate of any name will do", "            context.check_hostname = demanding\n", "            context.check_hostname = False\n", TLS + "a_server_that_is_another_is_refused"),
    # -- looking into an image --
    ("qcow2/host_map.py", "a leak is lost among others", "    if _NUMBERS[\"leaked\"] in counts:\n        return _NUMBERS[\"leaked\"]\n", "", MAP + "too_many_runs_become_fewer_in_larger_units_without_losing_a_leak"),
    ("qcow2/host_map.py", "the last to come is told", "_FILLED = [bytes([number, *range(1, 256)]) for number in range(256)]", "_FILLED = [bytes([number] * 256) for number in range(256)]", MAP + "full_tables_are_told_cluster_by_cluster"),
    ("qcow2/host_map.py", "tables in a row begin one late", "(run[0] & layout.OFFSET_MASK) >> bits, run[1]", "((run[0] & layout.OFFSET_MASK) >> bits) + 1, run[1]", MAP + "full_tables_are_told_cluster_by_cluster"),
    ("qcow2/referrers.py", "compressed data refer to nothing", "                if self._holds(*geometry.compressed_extent(entry)):\n", "                if False:\n", BACK + "as_many_refer_to_a_cluster_as_its_refcount_says"),
]
