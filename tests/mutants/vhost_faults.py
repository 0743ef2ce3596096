"""Faults in vhost-user, and in how an image is handed over: (file, what, old, new, test, …)."""
# One line each: a table.
# ruff: noqa: E501
# fmt: off

MAIN = "virtio/test_vhost_user.py::test_"
FINE = "virtio/test_vhost_user_protocol.py::test_"
RINGS = "virtio/test_vhost_user_rings.py::test_"
MESSAGES = "virtio/test_vhost_user_messages.py::test_"
NOTES = "virtio/test_vhost_user_inflight.py::test_"
SERVE = "tools/test_serve.py::test_"
SESSION, VRINGS = "virtio/vhost_user/session.py", "virtio/vhost_user/vrings.py"
CHANNEL, MEMORY = "virtio/vhost_user/channel.py", "virtio/vhost_user/memory.py"
MIGRATION, SERVER = "virtio/vhost_user/migration.py", "virtio/vhost_user/server.py"
SPLIT, PACKED = "virtio/vhost_user/inflight.py", "virtio/vhost_user/inflight_packed.py"

VHOST: list[tuple[str, ...]] = [
    # -- channel --
    (CHANNEL, "messages of any version", "                if flags & FLAG_VERSION != VERSION:\n", "                if False:\n", MESSAGES + "a_message_that_breaks_a_rule_ends_the_connection_and_no_more"),
    (CHANNEL, "messages of any length", "                if size > _LONGEST:\n", "                if False:\n", MESSAGES + "a_message_that_breaks_a_rule_ends_the_connection_and_no_more"),
    (CHANNEL, "half a message keeps its descriptors", "        self._socket.close()\n        while self._fds:\n            os.close(self._fds.pop())\n", "        self._socket.close()\n", MESSAGES + "half_a_message_with_descriptors_leaves_none_behind"),
    # -- one message --
    (SESSION, "descriptors that nobody took stay open", "            finally:\n                message.close()\n", "            finally:\n                pass\n", RINGS + "descriptors_that_nobody_asked_for_are_closed"),
    (SESSION, "an acknowledgement stands for a reply", "        if rule is not None and rule.answers:\n", "        if False:\n", FINE + "a_message_with_a_reply_of_its_own_is_never_acknowledged"),
    (SESSION, "acknowledged without being asked", "acknowledge = message.need_reply and self.negotiated(_F.REPLY_ACK)", "acknowledge = self.negotiated(_F.REPLY_ACK)", FINE + "no_acknowledgement_is_sent_where_none_was_asked_for_or_negotiated"),
    (SESSION, "acknowledged without being negotiated", "acknowledge = message.need_reply and self.negotiated(_F.REPLY_ACK)", "acknowledge = message.need_reply", FINE + "no_acknowledgement_is_sent_where_none_was_asked_for_or_negotiated"),
    (SESSION, "a refusal is acknowledged as success", "            reply = _number(1)\n", "            reply = _number(0)\n", MESSAGES + "a_refusal_is_acknowledged_where_that_was_negotiated"),
    (SESSION, "what was not negotiated is done", "if rule.needs is not None and not self.negotiated(rule.needs):", "if False:", MESSAGES + "a_message_that_breaks_a_rule_ends_the_connection_and_no_more"),
    (SESSION, "a payload of any length", "if rule.payload is not None and len(message.payload) != rule.payload.size:", "if False:", MESSAGES + "a_message_that_breaks_a_rule_ends_the_connection_and_no_more"),
    # -- features, status, reset --
    (SESSION, "features that were not offered", "        if wanted & ~self._device.offered_features:\n            raise", "        if False:\n            raise", MESSAGES + "a_message_that_breaks_a_rule_ends_the_connection_and_no_more"),
    (SESSION, "rings are never enabled by features", "                vring.enabled = True\n", "                pass\n", RINGS + "rings_are_enabled_by_features_alone_where_there_are_no_protocol_features"),
    (SESSION, "writethrough is forgotten at a stop", "            if self._writeback is not None and self._device", "            if False and self._device", MAIN + "writethrough_outlives_a_stop_of_the_machine_and_not_a_reset"),
    (SESSION, "writethrough outlives a reset", "        self._stop_driver()\n        self._writeback = None\n", "        self._stop_driver()\n", MAIN + "writethrough_outlives_a_stop_of_the_machine_and_not_a_reset"),
    (SESSION, "FEATURES_OK whatever was accepted", "        if not self._device.status & at.STATUS_FEATURES_OK:\n", "        if False:\n", MAIN + "features_that_were_not_offered_are_refused"),
    (SESSION, "NEEDS_RESET is not shown", "return _number(status | self._device.status & at.STATUS_NEEDS_RESET)", "return _number(status)", MAIN + "a_broken_ring_is_told_of_and_a_new_driver_starts_over"),
    (SESSION, "a broken device stays so", "            self._recover()\n", "            pass\n", MAIN + "a_broken_device_is_mended_by_a_mere_restart_of_its_rings"),
    (SESSION, "a reset keeps the notes", "        self._vrings.forget_inflight()\n", "        pass\n", RINGS + "a_reset_forgets_requests_rings_and_their_places"),
    (SESSION, "a reset keeps rings enabled", "            vring.enabled = not self._features_given >> vu.VHOST_USER_F_PROTOCOL_FEATURES & 1\n", "            pass\n", RINGS + "a_reset_forgets_requests_rings_and_their_places"),
    (SESSION, "a reset keeps rings started", "        for vring in self._vrings.all:\n            vring.started = False\n            vring.enabled = not", "        for vring in self._vrings.all:\n            vring.enabled = not", RINGS + "a_reset_forgets_requests_rings_and_their_places"),
    # -- memory and the log --
    (SESSION, "a region taken out stays", "        self._apply_memory(region.close)\n", "        pass\n", MAIN + "a_ring_whose_memory_goes_is_told_of_and_comes_back_with_it"),
    (MEMORY, "regions may overlap", "        elif any(region.overlaps(other) for other in self.regions):\n", "        elif False:\n", MESSAGES + "regions_that_overlap_are_refused"),
    (MEMORY, "the offset in the file is one of a page", "            self._view = self.buffer = memoryview(self._map)[offset - start :]\n", "            pass\n", MAIN + "memory_in_the_middle_of_a_file_is_found"),
    (SESSION, "the log is not used", "        on_write = self._log.mark if self._logs", "        on_write = self._log.mark if False", MAIN + "every_page_that_the_device_writes_is_logged"),
    (SESSION, "the log is used unasked", "        return bool(self._features_given >> vu.VHOST_F_LOG_ALL & 1) and self._log is not None\n", "        return self._log is not None\n", MAIN + "every_page_that_the_device_writes_is_logged"),
    ("virtio/vhost_user/log.py", "the last page is not marked", "(guest + max(length, 1) - 1) // _BYTE", "guest // _BYTE", FINE + "a_write_across_the_bytes_of_the_log_marks_both"),
    ("virtio/vhost_user/log.py", "a log is left", "range(first, min(last + 1, self._size))", "range(first, last + 1)", FINE + "a_log_that_is_smaller_than_memory_is_not_left"),
    (SESSION, "who waits for the log is not told", "        if self._log is not None and self._log_fd >= 0:\n", "        if False:\n", FINE + "who_waits_for_the_log_is_told"),
    # -- rings --
    (SESSION, "a stopped ring is still started", "        vring.started = False\n        self._vrings.stop(vring)\n        if", "        self._vrings.stop(vring)\n        if", RINGS + "a_stopped_ring_is_not_served_when_memory_changes"),
    (SESSION, "a stopped ring keeps its kicks", "            vring.tracker.forget()  # nothing is under way: what comes next says where it begins\n        self._replace(vring, \"kick\", -1)\n", "            vring.tracker.forget()\n", RINGS + "a_stop_gives_back_kick_and_call"),
    (SESSION, "a stopped ring keeps its notes", "        if vring.tracker is not None and not vring.held:\n            vring.tracker.forget()", "        if False:\n            pass", MAIN + "a_queue_that_was_reset_begins_anew_whatever_was_noted"),
    (SESSION, "a ring is enabled by any number", "        if enable > 1:\n", "        if False:\n", RINGS + "a_ring_is_enabled_or_not"),
    (SESSION, "a new call descriptor is not signalled", "            vring.signal(\"call\")  # the old one may have been left unread\n", "            pass\n", RINGS + "a_new_call_descriptor_is_signalled"),
    (SESSION, "a descriptor is needed or not", "        if bool(value & vu.VRING_NO_FD) == bool(message.fds):\n", "        if False:\n", MESSAGES + "a_message_that_breaks_a_rule_ends_the_connection_and_no_more", RINGS + "a_descriptor_comes_where_it_is_announced"),
    (VRINGS, "a disabled ring is served", "if vring.started and vring.enabled and self._device", "if vring.started and self._device", MAIN + "a_disabled_ring_is_not_served"),
    (VRINGS, "a ring is looked at when it is kicked", "            device.guest_error(error)\n            return\n        device.kick(vring.index)\n", "            device.guest_error(error)\n            return\n", RINGS + "a_ring_that_starts_needs_no_kick"),
    (VRINGS, "a packed ring forgets its wrap counters", "vring.base = state.next_avail\n        if self._packed:\n", "vring.base = state.next_avail\n        if False:\n", MAIN + "a_stopped_ring_goes_on_where_it_was"),
    (VRINGS, "a ring that cannot be served is not told of", "                vring.signal(\"error\")\n", "                pass\n", MAIN + "a_ring_whose_memory_goes_is_told_of_and_comes_back_with_it"),
    (VRINGS, "what was done stays in the process", "            device.disk.flush()\n", "            pass\n", MAIN + "what_cannot_be_kept_is_not_said_to_be_done", SERVE + "nothing_that_was_done_is_lost_with_a_server_that_is_killed"),
    (VRINGS, "the disk is used before it may be", "            try:\n                self._on_start()\n", "            try:\n                pass\n", SERVE + "an_image_that_may_move_is_held_while_its_queues_run"),
    (VRINGS, "the disk is never let go", "            self._in_use = False\n            self._on_stop()\n", "            pass\n", SERVE + "an_image_that_may_move_is_held_while_its_queues_run"),
    # -- notes of requests --
    (SPLIT, "what the driver saw is done again", "        for _ in range(min(used - words[_USED_IDX] & 0xFFFF, size)):\n", "        for _ in range(0):\n", NOTES + "a_crash_at_any_store_neither_loses_nor_repeats_a_request"),
    (SPLIT, "requests are done again in any order", "        heads.sort()\n", "        heads.sort(reverse=True)\n", NOTES + "a_crash_at_any_store_neither_loses_nor_repeats_a_request"),
    (PACKED, "a batch that was shown is not committed", "                self._commit()  # the driver was shown it\n", "                pass\n", NOTES + "a_crash_at_any_store_neither_loses_nor_repeats_a_request"),
    # -- configuration and state --
    (SESSION, "any configuration can be written", "        if not whole and (flags or (offset, len(data)) != (where, 1)):\n", "        if False:\n", MAIN + "only_writeback_can_be_written"),
    (SESSION, "configuration out of bounds is no empty reply", "            return _Reply(b\"\")\n", "            raise\n", MAIN + "configuration_out_of_bounds_has_an_empty_reply"),
    (SESSION, "a suspended device speaks", "if generation != self._known and any(vring.started for vring in self._vrings.all):", "if generation != self._known:", FINE + "a_resize_while_all_rings_are_stopped_is_told_when_they_go_on"),
    (SESSION, "another server's configuration is believed", "        self._known: int | None = None\n", "        self._known: int | None = device.config_generation\n", FINE + "a_front_end_that_comes_to_another_server_is_told_to_look"),
    (SESSION, "what was not told is forgotten", "        self._vrings.refresh(vring)\n        self._tell_configuration()\n", "        self._vrings.refresh(vring)\n", FINE + "a_resize_before_there_is_a_driver_is_told_when_its_rings_start"),
    (SESSION, "state is transferred under live rings", "        if phase or any(vring.live for vring in self._vrings.all):\n", "        if phase:\n", FINE + "a_state_transfer_that_is_refused_says_so_in_its_reply"),
    (MIGRATION, "state is read at the end only", "                self._watch(fd, self._receive)\n", "                pass\n", FINE + "state_that_is_longer_than_a_pipe_is_refused_and_not_waited_for"),
    (MIGRATION, "state without an end is taken", "failed = self._failed or (self._loading and not self._complete)", "failed = self._failed", FINE + "state_that_is_longer_than_a_pipe_is_refused_and_not_waited_for"),
    (MIGRATION, "another device's state is taken", "        if stream.u32() != self._device.device_id:\n", "        if stream.u32() < 0:\n", FINE + "another_devices_state_is_refused"),
    # -- the server --
    (SERVER, "a front-end that has gone blocks the next", "        self._end()\n        self._accept_next()\n", "        self._end()\n", MAIN + "the_next_front_end_finds_a_fresh_device"),
    ("backend/listener.py", "a file makes room for a socket", "    if not stat.S_ISSOCK(os.stat(path).st_mode):\n        return False\n", "", MAIN + "a_socket_of_a_dead_server_is_replaced_and_a_live_one_is_not", SERVE + "a_monitor_takes_no_files_place"),
    ("backend/listener.py", "a live server's socket is replaced", "        except OSError:\n            return False\n    return False\n", "        except OSError:\n            return False\n    return True\n", MAIN + "a_socket_of_a_dead_server_is_replaced_and_a_live_one_is_not"),
    ("backend/listener.py", "somebody else's socket is taken away", "            if identity is not None and _identity(self.path) == identity:\n", "            if identity is not None:\n", MAIN + "a_socket_of_somebody_else_is_left_alone"),
    ("tools/serve/handover.py", "an image is open as it was before", "        disk = self._open(self.read_only, True)\n", "        disk, self.below = self.below, self._open(True, False)\n", SERVE + "an_image_that_may_move_is_held_while_its_queues_run"),
    ("tools/serve/handover.py", "an image is held without locks", "        disk = self._open(self.read_only, True)\n", "        disk = self._open(self.read_only, False)\n", SERVE + "queues_are_not_started_while_another_server_holds_the_image"),
    ("tools/serve/handover.py", "another size is not noticed", "        self.held = True\n        self._follow()\n", "        self.held = True\n", SERVE + "an_image_that_may_move_is_held_while_its_queues_run"),
]
