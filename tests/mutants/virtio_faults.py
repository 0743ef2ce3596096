"""Faults in the virtio device: (file, what goes wrong, old, new, test, …)."""
# One line each: a table.
# ruff: noqa: E501
# fmt: off

DEVICE = "virtio/test_device.py::test_"
SPLIT = "virtio/test_split.py::test_"
PACKED = "virtio/test_packed.py::test_"
REQUEST = "virtio/test_requests.py::test_"
MMIO = "virtio/test_mmio.py::test_"
RESET = "virtio/test_queue_reset.py::test_"
SAVING = "virtio/test_saving.py::test_"
ORDER = "virtio/test_in_order.py::test_"
IOMMU = "virtio/test_iommu.py::test_"
PAUSE = "virtio/test_pause.py::test_"
POLICY = "virtio/test_error_policy.py::test_"
THREADS = "virtio/test_io_threads.py::test_"
BLOCK = "virtio/test_block_features.py::test_"
ZONES = "virtio/test_zone_requests.py::test_"
ZONED = "backend/test_zoned.py::test_"
OBSERVE = "virtio/test_observing.py::test_"
RECORD = "virtio/test_recording.py::test_"
PCI = "virtio/test_pci.py::test_"
SUSPEND = "virtio/test_suspend.py::test_"
MESSAGES = "virtio/test_vhost_user_messages.py::test_"
EXPRESS = "virtio/test_express.py::test_"

VIRTIO: list[tuple[str, ...]] = [
    # -- status and features --
    ("virtio/device.py", "status bits can be cleared (BF-02)", "new = value & _DRIVER_BITS & ~state.status", "state.status &= value; new = value & _DRIVER_BITS & ~state.status", DEVICE + "bits_are_not_cleared_one_by_one_bf_02"),
    ("virtio/device.py", "features not offered are accepted (BF-19)", "return not self.state.driver_features & ~self.offered_features", "return True", DEVICE + "features_not_offered_are_refused_bf_09_bf_13_bf_19"),
    ("virtio/device.py", "features change after FEATURES_OK (BF-48)", "        if state.status & (STATUS_FEATURES_OK | STATUS_DRIVER_OK | STATUS_SUSPEND):\n            return\n", "", DEVICE + "features_hold_still_after_features_ok_bf_48"),
    ("virtio/device.py", "queues are served before DRIVER_OK (BF-05)", "return self.legacy or bool(state.status & STATUS_DRIVER_OK)", "return True", DEVICE + "nothing_is_done_before_driver_ok_bf_05_bf_06_bf_51"),
    ("virtio/device.py", "kicks before DRIVER_OK are lost (BF-51)", "            self.service.look()  # what was kicked too early (BF-51) is not lost\n", "            pass\n", DEVICE + "nothing_is_done_before_driver_ok_bf_05_bf_06_bf_51"),
    ("virtio/device.py", "a failed driver's queues are served", "state.broken or state.status & STATUS_FAILED or", "state.broken or", DEVICE + "failed_makes_it_inert_until_a_reset_bf_03_bf_49"),
    ("virtio/device.py", "NEEDS_RESET is not told (BF-08)", "                self.config_due()  # BF-08\n", "                pass\n", DEVICE + "needs_reset_is_told_by_a_config_interrupt_bf_07_bf_08"),
    ("virtio/device.py", "VERSION_1 is not offered (BF-88)", "return features | 1 << VIRTIO_F_VERSION_1", "return features", DEVICE + "version_1_is_offered_and_may_be_left_out_bf_88_bf_89"),
    ("virtio/device.py", "ANY_LAYOUT is not offered (BF-101)", "_LEGACY_FEATURES = 1 << VIRTIO_F_ANY_LAYOUT | ", "_LEGACY_FEATURES = ", MMIO + "legacy_features_bf_101"),
    ("virtio/device.py", "the IOMMU can be gone around (BF-91)", "        if self._iommu is not None and not self.accepted(VIRTIO_F_ACCESS_PLATFORM):\n            return False\n", "", IOMMU + "a_driver_that_would_go_around_it_is_refused_bf_91"),
    ("virtio/device.py", "a reset leaves the queues (BF-29)", "        for queue in self.queues:\n            self._forget(queue)\n        state.queues = [queue.state for queue in self.queues]\n", "", MMIO + "reset_drops_interrupt_and_queues_mmio_05_mmio_06"),
    ("virtio/device.py", "a reset does not wait for threads", "        self.service.drain()  # before the status reads 0\n", "", THREADS + "a_reset_waits_and_nothing_is_written_after"),
    ("virtio/device.py", "a queue is reset unasked (BF-38)", "        if self.accepted(VIRTIO_F_RING_RESET):\n", "        if True:\n", RESET + "without_the_feature_nothing_is_reset"),
    ("virtio/device.py", "a queue reset is over too early (MMIO-12)", "return queue.serving and not queue.state.ready", "return False", RESET + "a_reset_under_a_request_goes_on_to_its_end_mmio_12_bf_39"),
    ("virtio/device.py", "a disabled queue keeps its place (MMIO-08)", "        self.queues[index].state.rewind()\n", "", PACKED + "a_disabled_queue_begins_at_the_beginning"),
    ("virtio/device.py", "a stopped queue forgets what is under way", "        queue.park()\n        self.service.drain(queue)\n", "", THREADS + "a_stopped_queue_has_used_what_it_had_taken"),
    ("virtio/device.py", "the generation stays (MMIO-07)", "(self.state.config_generation + 1) & 0xFFFF_FFFF", "self.state.config_generation", MMIO + "resize_changes_generation_and_interrupts_mmio_07_blk_65"),
    ("virtio/device.py", "a resize is not told (BLK-65)", "                self.config_due()\n        self.announce()\n", "                pass\n", MMIO + "resize_changes_generation_and_interrupts_mmio_07_blk_65"),
    # -- service --
    ("virtio/service.py", "what is pushed after a reset is shown", "        if queue.ring is ring or queue.parked is ring:  # not reset from inside\n            if written", "        if True:\n            if written", DEVICE + "a_reset_from_inside_a_request_ends_it_bf_29[callbacks]"),
    ("virtio/service.py", "a kick while serving is lost at the end of the budget", "        queue.pending = budget <= 0\n", "        queue.pending = False\n", SPLIT + "a_device_made_to_feed_itself_stops"),
    ("virtio/service.py", "kicks stay suppressed after a pause", "queue.ring.suppressed = True  # whatever the driver was told: to kick again", "pass", PAUSE + "kicks_that_were_suppressed_are_asked_for_again"),
    ("virtio/service.py", "resume waits for a kick", "        self.look()\n", "", PAUSE + "a_kick_that_was_never_sent_is_not_needed"),
    ("virtio/service.py", "what was stopped is done last", "            if queue.held:\n                self._do_held(queue, ring)\n", "", POLICY + "stop_keeps_the_request_and_tries_it_again"),
    ("virtio/service.py", "a stopped request is answered", "            if written == HELD:\n                queue.held.append(chain)\n            else:\n                ring.push(chain, written)\n", "            ring.push(chain, max(written, 0))\n", POLICY + "stop_keeps_the_request_and_tries_it_again"),
    ("virtio/service.py", "what was done before an error is lost", "        if queue.ring is ring:\n            with suppress(GuestError)", "        if False:\n            with suppress(GuestError)", SPLIT + "other_rounds_are_published_before_the_failure", PACKED + "what_was_done_before_a_broken_list_is_the_drivers_to_see"),
    ("virtio/queue.py", "a pause forgets the request it is called from", "            if self.serving:\n                self.parked = ring\n", "", PAUSE + "pause_from_inside_a_request_finishes_that_one"),
    ("virtio/express.py", "a pause ends the short way too late", "                        if queue.parked is not ring:\n                            return\n                        count = left = 0\n                    ram[status_byte]", "                        if queue.parked is not ring:\n                            return\n                    ram[status_byte]", PAUSE + "pause_from_inside_a_request_finishes_that_one"),
    ("virtio/express.py", "a stopped request is taken twice", "    ring.state.next_avail = position\n", "", POLICY + "stop_keeps_the_request_and_tries_it_again"),
    ("virtio/express.py", "the jump of an index is not seen", "                if count > size:\n                    raise ring.jumped(count)\n", "", EXPRESS + "a_jump_of_the_available_index_breaks_the_device"),
    ("virtio/express_packed.py", "a table takes as many places as it has entries", "            slots = 1\n", "            slots = 3\n", EXPRESS + "packed_kicks_of_usual_and_other_requests"),
    ("virtio/express_packed.py", "the id is the first descriptor's (PKD-35)", "            ident = last_ident\n", "            pass\n", EXPRESS + "a_packed_lists_id_is_its_last_descriptors_pkd_35"),
    ("virtio/express_packed.py", "tables without the feature (PKD-21)", "size == 48 and indirect:", "size == 48:", EXPRESS + "a_packed_table_has_to_be_negotiated_pkd_21"),
    ("virtio/express_packed.py", "a request past the end of the disk is taken for the host's mistake", "        if sector + length // SECTOR_SIZE > blk.capacity:\n            return None\n", "", DEVICE + "strict_raises_after_the_answer"),
    ("virtio/express_packed.py", "requests outside RAM", "            or data + length > end\n", "", EXPRESS + "data_outside_ram_is_ioerr"),
    # -- threads --
    ("virtio/workers.py", "in order is forgotten (BF-92)", "if ring is None or (ring.in_order and queue.under_way):", "if ring is None:", THREADS + "in_order_keeps_the_order"),
    ("virtio/workers.py", "one request at a time", "        if not ring.in_order:\n            self._note(queue)\n", "", THREADS + "requests_of_one_queue_run_side_by_side_in_any_order"),
    ("virtio/workers.py", "data moves under the lock", "            written = self._device.process(chain, queue)\n        except Exception as error:\n            failure = error\n", "            with self._lock:\n                written = self._device.process(chain, queue)\n        except Exception as error:\n            failure = error\n", THREADS + "requests_of_one_queue_run_side_by_side_in_any_order"),
    ("virtio/workers.py", "a pause does not wait", "                    thread != me and (queue is None or each is queue)", "                    False", THREADS + "a_reset_waits_and_nothing_is_written_after"),
    ("virtio/workers.py", "kicks are not asked for again", "                    ring.publish()\n                    queue.available = ring.ready()\n                    if not queue.available:\n                        return None\n", "                    return None\n", THREADS + "requests_of_one_queue_run_side_by_side_in_any_order"),
    # -- split ring --
    ("virtio/split.py", "no interrupt though flags are 0 (VQ-S-33)", "return not flags & VIRTQ_AVAIL_F_NO_INTERRUPT", "return False", SPLIT + "interrupt_unless_suppressed_vq_s_32_vq_s_33"),
    ("virtio/split.py", "an interrupt though it is not wanted (VQ-S-32)", "return not flags & VIRTQ_AVAIL_F_NO_INTERRUPT", "return True", SPLIT + "interrupt_unless_suppressed_vq_s_32_vq_s_33"),
    ("virtio/split.py", "used_event is off by one (VQ-S-35)", "return bool((new - event - 1) & 0xFFFF", "return bool((new - event) & 0xFFFF", "virtio/test_express.py::test_kicks_of_usual_and_other_requests", ORDER + "interrupts_count_the_whole_batch", SPLIT + "used_event_says_when_vq_s_35_vq_s_36"),
    ("virtio/split.py", "INDIRECT with NEXT is followed (VQ-S-21)", "                if flags & VIRTQ_DESC_F_NEXT:\n                    raise GuestError(\"an indirect descriptor with a next one\")  # VQ-S-21\n", "", SPLIT + "a_wrong_ring_needs_a_reset"),
    ("virtio/split.py", "a loop of descriptors is followed on", "            raise GuestError(\"a chain of more descriptors than the queue has\")", "            pass", SPLIT + "a_wrong_ring_needs_a_reset"),
    ("virtio/split.py", "tables without the feature (VQ-S-18)", "        if not self.indirect:\n            raise GuestError(\"an indirect descriptor, which was not negotiated\")\n        if not length or length % VIRTQ_DESC_SIZE", "        if not length or length % VIRTQ_DESC_SIZE", SPLIT + "indirect_without_the_feature_needs_a_reset_vq_s_18"),
    ("virtio/split.py", "misaligned rings are enabled (VQ-S-01)", "            if address % align:\n", "            if False:\n", MMIO + "impossible_ring_addresses_are_not_enabled_vq_s_01"),
    ("virtio/split.py", "a batch is in the place of its last (VQ-S-56)", "                place = self._batch[0]\n", "                pass\n", ORDER + "one_element_stands_for_a_batch_vq_s_56[split]"),
    ("virtio/split.py", "a short answer is skipped over", "if full else (-1, -1)", "if True else (-1, -1)", ORDER + "a_short_answer_ends_its_batch[split]"),
    ("virtio/split.py", "a batch goes on after it was shown", "if self._batch[1] == index != self.published:", "if self._batch[1] == index:", ORDER + "around_the_ring_with_requests_of_every_kind"),
    # -- packed ring --
    ("virtio/packed.py", "the wrap counter does not flip (PKD-31)", "            state.used_wrap = not state.used_wrap\n", "            pass\n", PACKED + "any_size_goes_around_pkd_31"),
    ("virtio/packed.py", "the flags of used ones are wrong (PKD-32)", "flags = _OWNER if state.used_wrap else 0  # PKD-32", "flags = _OWNER", PACKED + "any_size_goes_around_pkd_31"),
    ("virtio/packed.py", "a list is skipped as one (PKD-33)", "slot += chain.slots  # PKD-33", "slot += 1", PACKED + "a_list_is_used_by_its_first_descriptor_alone_pkd_33"),
    ("virtio/packed.py", "WRITE is never set (PKD-34)", "flags | VIRTQ_DESC_F_WRITE if written else flags", "flags", PACKED + "write_is_set_where_something_was_written_pkd_34"),
    ("virtio/packed.py", "the first of a batch is shown first", "for slot, flags in reversed(staged):", "for slot, flags in staged:", PACKED + "the_first_of_a_batch_is_shown_last"),
    ("virtio/packed.py", "the event is off by one (PKD-39)", "return (wanted - first) % around < (end - first) % around  # PKD-39", "return (wanted - first) % around <= (end - first) % around", PACKED + "the_event_says_when_pkd_39"),
    ("virtio/packed.py", "a short answer is skipped over", "self._joins = written == sum(length for _, length in chain.writable)", "self._joins = True", ORDER + "a_short_answer_ends_its_batch[packed]"),
    ("virtio/packed.py", "a batch is not joined", "            if self._joins:\n", "            if False:\n", ORDER + "one_element_stands_for_a_batch_vq_s_56[packed]"),
    # -- IOMMU --
    ("virtio/iommu.py", "pieces of any length are taken", "if sum(size for _, size in pieces) != length or", "if", IOMMU + "a_translation_of_another_length_is_refused"),
    ("virtio/iommu.py", "writes are asked for as reads", "for address, length in self.pieces(pa, len(raw), True):", "for address, length in self.pieces(pa, len(raw), False):", IOMMU + "a_status_that_may_not_be_written_needs_a_reset"),
    # -- requests --
    ("virtio/blk.py", "a read-only device is written (BLK-67)", "        if self.read_only:\n            raise RefusedError(", "        if False:\n            raise RefusedError(", REQUEST + "a_read_only_device_writes_nothing_blk_66_blk_67"),
    ("virtio/blk.py", "an unknown type is an I/O error (BLK-107)", "status = at.VIRTIO_BLK_S_UNSUPP  # BLK-107", "status = at.VIRTIO_BLK_S_IOERR", REQUEST + "unknown_types_are_unsupported_blk_107"),
    ("virtio/blk.py", "the status is left out of the used length", "        return written + 1\n", "        return written\n", REQUEST + "read_gives_the_sectors"),
    ("virtio/blk.py", "writethrough is not (BLK-76)", "self.disk.writev(offset, views, fua=not self.writeback)", "self.disk.writev(offset, views)", DEVICE + "a_driver_that_cannot_flush_gets_stable_writes_blk_76"),
    ("virtio/blk.py", "writeback is on without FLUSH (BLK-13)", "self.writeback = self.accepted(at.VIRTIO_BLK_F_FLUSH)", "self.writeback = True", DEVICE + "writeback_starts_as_0_without_flush_blk_13"),
    ("virtio/blk.py", "a closed disk is a bug", "        if _closed(self.disk):\n", "        if False:\n", POLICY + "a_disk_that_is_closed_answers_ioerr"),
    ("virtio/blk.py", "only the disk itself can be closed", "return disk.closed or any(", "return disk.closed and any(", POLICY + "a_disk_closed_below_another", POLICY + "a_disk_that_is_closed_answers_ioerr"),
    ("virtio/blk.py", "an ignored read has no length", "                written = _total(incoming)\n", "                pass\n", POLICY + "ignore_answers_that_all_went_well"),
    ("virtio/blk.py", "zones are forgotten at FEATURES_OK (BLK-18)", "return super().features_valid() and (zoned or not self.traits.host_managed)", "return super().features_valid()", ZONES + "host_managed_needs_a_driver_that_knows_zones_blk_18"),
    ("virtio/blk.py", "zones stay in the configuration (BLK-17)", "zoned=not settled or self.accepted(at.VIRTIO_BLK_F_ZONED)", "zoned=True", ZONES + "host_aware_goes_on_without_zones_blk_17_blk_81"),
    ("virtio/error_policy.py", "ENOSPC is as any error", "        if self.no_space is not None and getattr(error, \"errno\", None) == errno.ENOSPC:\n            return self.no_space\n", "", POLICY + "no_space_has_a_policy_of_its_own"),
    ("virtio/error_policy.py", "reads are as writes", "        if reading:\n            return self.reads\n", "", POLICY + "reads_and_writes_have_policies_of_their_own"),
    ("virtio/blk_commands.py", "discard takes unmap (BLK-69)", "or (flags and request.kind != at.VIRTIO_BLK_T_WRITE_ZEROES)", "", REQUEST + "discard_with_unmap_is_unsupported_blk_69"),
    ("virtio/blk_commands.py", "unknown flags are let pass (BLK-68)", "if flags & ~unmap or (", "if (", REQUEST + "unknown_flags_are_unsupported_blk_68"),
    ("virtio/blk_commands.py", "ranges may leave the disk", "if count > sectors or sector + count > blk.capacity:", "if count > sectors:", REQUEST + "ranges_outside_the_disk_fail_whole", BLOCK + "secure_erase_has_limits_blk_45"),
    ("virtio/blk_commands.py", "too many ranges are done (BLK-44)", "if total % struct.size or total > most * struct.size:", "if total % struct.size:", REQUEST + "too_many_ranges_fail_blk_44_blk_46"),
    ("virtio/blk_commands.py", "GET_ID is not padded (BLK-108)", "self._blk.serial.ljust(at.VIRTIO_BLK_ID_BYTES, b\"\\0\")", "self._blk.serial", REQUEST + "get_id_is_padded_with_nul_blk_108"),
    ("virtio/blk_commands.py", "FLUSH_OUT is unknown (BLK-118)", "            at.VIRTIO_BLK_T_FLUSH_OUT: self._flush,  # BLK-118\n", "", REQUEST + "flush_out_is_a_flush_blk_118"),
    ("virtio/blk_commands.py", "an erasure is not flushed", "                self._overwrite(disk, offset, length)\n            disk.flush()\n", "                self._overwrite(disk, offset, length)\n", BLOCK + "secure_erase_overwrites_and_flushes"),
    ("virtio/blk_commands.py", "an erased zone keeps its data below (BLK-105)", "                        self._overwrite(zoned.below, zone.start, zone.length)\n", "", ZONES + "secure_erase_resets_zones_blk_103_to_105"),
    ("virtio/blk_config.py", "reserved lifetimes are sent (BLK-80)", "0 <= self.type_a <= 11", "0 <= self.type_a <= 12", BLOCK + "reserved_lifetimes_cannot_be_said_blk_80"),
    ("virtio/blk_config.py", "host-managed offers discard (BLK-06)", "not self.read_only and not self.host_managed,", "not self.read_only,", ZONES + "host_managed_offers_no_discard_blk_06"),
    ("virtio/blk_config.py", "appends beyond the segments (BLK-27)", "return most if self.size_max is None else min(most, self.seg_max * self.size_max)", "return most", ZONES + "config_of_the_zones_blk_19_to_30"),
    ("virtio/blk_config.py", "discards have no alignment", "max(limits.discard_alignment, block) // SECTOR_SIZE if discards else 0", "block // SECTOR_SIZE if discards else 0", BLOCK + "a_qcow2_images_cluster_is_the_discard_alignment"),
    # -- zones --
    ("virtio/zone_requests.py", "zone requests without the feature (BLK-81)", "        self._commands.needs(at.VIRTIO_BLK_F_ZONED, \"a zone request\")\n", "        return\n", ZONES + "host_aware_goes_on_without_zones_blk_17_blk_81"),
    ("virtio/zone_requests.py", "commands anywhere in a zone (BLK-55)", "            if zone.start != request.sector * SECTOR_SIZE:\n", "            if False:\n", ZONES + "management_blk_82_to_89_blk_113_blk_114"),
    ("virtio/zone_requests.py", "a report counts what did not fit (BLK-110)", "head.pack(len(zones))", "head.pack(len(self._disk.zones) - first)", ZONES + "report_tells_of_as_many_as_fit_blk_110_to_112"),
    ("virtio/zone_requests.py", "no append is an invalid one (BLK-94)", "if most else at.VIRTIO_BLK_S_UNSUPP", "if True else at.VIRTIO_BLK_S_UNSUPP", ZONES + "no_append_at_all_blk_94"),
    ("virtio/zone_requests.py", "an append answers with the zone (BLK-93)", "struct.pack(place // SECTOR_SIZE)", "struct.pack(request.sector)", ZONES + "append_blk_83_blk_91_to_95"),
    ("backend/zones.py", "an empty zone closes to CLOSED (BLK-114)", "ZoneState.CLOSED if zone.written else ZoneState.EMPTY", "ZoneState.CLOSED", ZONED + "the_table_of_states"),
    ("backend/zones.py", "a full zone opens (BLK-84)", "self._check(zone, _WRITABLE, \"open\")", "self._check(zone, (*_WRITABLE, ZoneState.FULL), \"open\")", ZONED + "the_table_of_states"),
    ("backend/zones.py", "open is told before active (BLK-115)", "        if self.max_active and zone.state not in _ACTIVE", "        if self.max_active and self._open < self.max_open and zone.state not in _ACTIVE", ZONED + "limits_on_active_zones_come_first"),
    ("backend/zones.py", "no implicit zone is closed (BLK-98)", "            if not self._implicit:\n                raise", "            if True:\n                raise", ZONED + "limits_on_open_zones_close_implicit_ones_first"),
    ("backend/zones.py", "writes go anywhere (BLK-97)", "or offset != zone.pointer:", "or False:", ZONED + "writes_go_to_the_write_pointer"),
    ("backend/zones.py", "writes go past the capacity (BLK-92)", "        if end > zone.start + zone.capacity:\n", "        if False:\n", ZONED + "writes_end_at_the_capacity_and_the_zone_is_full_then"),
    ("backend/zones.py", "writes cross zones (BLK-96)", "if zone.state in _FAILED or end > zone.start + zone.length:", "if zone.state in _FAILED:", ZONED + "a_request_across_a_boundary_is_refused"),
    ("backend/zoned.py", "old data shows through (BLK-102)", "data = max(0, min(count, zone.start + zone.written - offset))", "pass", ZONED + "what_was_not_written_reads_as_zeroes_whatever_lies_below"),
    ("backend/zoned.py", "a reset is not stable at once", "            # Stable before anything is written there: or old data would come back with new.\n            self._flush()\n", "", ZONED + "the_store_has_what_was_flushed"),
    ("backend/zoned.py", "reset all resets what has failed (BLK-89)", "                ZoneState.READ_ONLY,\n                ZoneState.OFFLINE,\n            ):", "            ):", ZONED + "reset_all_leaves_nothing_but_what_failed"),
    ("backend/zoned.py", "appends overtake one another (BLK-93)", "        with self._writer(zone):\n            place = zone.pointer\n", "        place = zone.pointer\n        with self._writer(zone):\n", ZONED + "an_append_has_its_place_when_the_one_before_is_done"),
    ("backend/zoned.py", "another disk's store is taken", "or self._store.read(0, _HEADER.size) != self._header", "", ZONED + "a_store_of_other_zones_is_refused"),
    ("virtio/split.py", "a queue runs empty without a word (BF-100)", "if self.notify_on_empty and", "if False and", SPLIT + "notify_on_empty_bf_100"),
    ("virtio/pci.py", "vendor data is cut (PCI-84)", "data += bytes(-(at.CAP_VENDOR.size + len(data)) % 4)  # PCI-84", "data = data[: -(at.CAP_VENDOR.size + len(data)) % 4]", PCI + "vendor_data_pci_83_to_85"),
    # -- suspension --
    ("virtio/suspension.py", "SUSPEND shows while a request is under way (BF-73)", "            and device.service.quiet()\n", "", SUSPEND + "worker_threads_finish_first_bf_72_to_bf_74", SUSPEND + "from_inside_a_request_it_waits_for_that_one_bf_73_bf_74"),
    ("virtio/suspension.py", "SUSPEND shows while a request is kept (BF-73)", "            and not any(queue.held for queue in device.queues)\n", "", SUSPEND + "a_request_that_an_error_has_stopped_is_done_first_bf_73"),
    ("virtio/workers.py", "SUSPEND shows before the interrupt is told (BF-74)", "        return not self._busy\n", "        return not self._inside\n", SUSPEND + "it_shows_after_the_last_interrupt_was_told_bf_74"),
    ("virtio/workers.py", "more is taken while it is to be suspended (BF-72)", "            elif is_suspending(self._device.state.status):\n                return None\n", "", SUSPEND + "what_is_kept_alone_is_done_by_threads_bf_72"),
    ("virtio/suspension.py", "it is not asked whether SUSPEND was negotiated", "device.accepted(VIRTIO_F_SUSPEND) and not", "not", SUSPEND + "it_is_ignored_unless_it_was_negotiated"),
    ("virtio/blk.py", "a suspended device is configured (BF-64)", "and allowed and not self.suspended", "and allowed", SUSPEND + "configuration_is_not_written_bf_64"),
    ("virtio/blk.py", "a suspended device tells of a resize (BF-68)", "            if self.suspended:  # BF-67: later\n                return\n", "", SUSPEND + "a_resize_is_told_on_waking_bf_67_to_bf_69"),
    ("virtio/blk.py", "a suspended device has the new disk's size at once (BF-67)", "capacity if self.suspended else self.disk.size // SECTOR_SIZE", "self.disk.size // SECTOR_SIZE", SUSPEND + "a_suspended_device_goes_on_elsewhere_bf_67_to_bf_69"),
    ("virtio/suspension.py", "waking waits for a kick", "    device.service.resume()\n", "", SUSPEND + "nothing_is_done_and_nothing_is_lost_bf_65_bf_66"),
    ("virtio/pci.py", "what suspends is held for bus mastering", "value & ~self.device.status & layout.STATUS_DRIVER_OK", "value & layout.STATUS_DRIVER_OK", SUSPEND + "pci_waits_for_bus_mastering_to_wake"),
    ("virtio/saving.py", "any status may have SUSPEND", " or (status & at.STATUS_SUSPEND and not may_suspend)", "", SUSPEND + "a_status_that_cannot_be_is_refused"),
    # -- what a hostile reader found --
    ("virtio/workers.py", "what threads have used is not told", "            self._device.transport.note_interrupt(queue.index)\n        return interrupt", "            pass\n        return interrupt", THREADS + "several_queues_and_many_requests", THREADS + "requests_of_one_queue_run_side_by_side_in_any_order"),
    ("virtio/workers.py", "the emulator is called under the lock", "        with self._device.quietly():  # :meth:`_tell` tells of it\n            super()._fail(failure, queue, ring)\n", "        super()._fail(failure, queue, ring)\n", THREADS + "the_emulator_is_called_under_no_lock_for_needs_reset"),
    ("virtio/workers.py", "the interrupt is noted when it is told (BF-28)", "                    self._device.transport.deliver()\n", "                    self._device.transport.queue_interrupt(queue.index)\n", THREADS + "no_interrupt_comes_after_a_reset_bf_28"),
    ("virtio/blk.py", "a disk that shrank is a bug", "        if isinstance(error, OutsideError):\n", "        if False:\n", THREADS + "a_disk_that_shrinks_under_a_request_answers_ioerr"),
    ("virtio/blk.py", "zones are looked at piece by piece (BLK-92)", "        if self.traits.zoned is not None:\n            self.traits.zoned.check", "        if False:\n            self.traits.zoned.check", ZONES + "a_long_write_past_the_end_of_a_zone_writes_nothing_blk_92"),
    ("virtio/layout.py", "4 GiB and a status fit into a chain", "DATA_BYTES_MAX: Final = CHAIN_BYTES_MAX - 17", "DATA_BYTES_MAX: Final = CHAIN_BYTES_MAX", SPLIT + "a_chain_longer_than_4_gib_is_ioerr_vq_s_16"),
    ("virtio/iommu.py", "what was mapped is translated again", "views.pieces if isinstance(views, _Views) else self", "self", IOMMU + "a_translation_that_changes_under_a_request_is_as_it_was"),
    ("virtio/mmio.py", "alignments of queues that are not there are kept", "        if self._selected() is not None:\n            self._queue_align", "        if True:\n            self._queue_align", MMIO + "no_register_has_the_device_remember_more_and_more"),
    ("virtio/mmio.py", "bits that mean nothing reset", "        if value and not value & 0xFF:\n            return", "        if False:\n            return", MMIO + "a_status_without_known_bits_is_no_reset"),
    ("virtio/express.py", "a batch is joined once around", "            begin_batch()  # of what", "            pass  # of what", ORDER + "a_batch_is_not_joined_once_around_the_indices"),
    ("virtio/vhost_user/session.py", "a log descriptor ends the server", "            except OSError as error:\n                _log.warning(\"the log's descriptor fails", "            except KeyError as error:\n                _log.warning(\"the log's descriptor fails", MESSAGES + "a_log_descriptor_that_cannot_be_written_does_no_harm"),
    # -- saving, watching, recording --
    ("virtio/saving.py", "what is held is not saved", "        for chain in queue.held:\n            chain.save(stream)\n", "", POLICY + "what_is_kept_goes_along_with_the_device"),
    ("virtio/saving.py", "another number of queues is taken", "    if count != len(device.queues):\n", "    if False:\n", SAVING + "a_device_that_differs_refuses_and_stays_as_it_is"),
    ("virtio/saving.py", "features are not checked", "    if missing:\n", "    if False:\n", SAVING + "a_device_that_differs_refuses_and_stays_as_it_is"),
    ("virtio/mmio.py", "an interrupt stays after its acknowledgement (MMIO-04)", "        self._line.remove(value)\n", "        self._line.remove(0)\n", MMIO + "interrupt_status_until_acknowledged_mmio_03_mmio_04"),
    ("virtio/counters.py", "errors are not counted", "counters.errors += request.status != at.VIRTIO_BLK_S_OK", "pass", OBSERVE + "requests_are_counted_by_type"),
    ("virtio/service.py", "suppressed interrupts are not counted", "            self.observer.suppressed(queue.index)\n", "            pass\n", OBSERVE + "interrupts_that_the_driver_did_not_want_are_counted"),
    ("virtio/device.py", "a watched device has a short way", "        if self.service.inline and self.service.observer is None:\n", "        if self.service.inline:\n", OBSERVE + "a_device_that_is_not_watched_has_its_short_way"),
    ("virtio/recording.py", "differences in memory are not told", "                (\"writes\", line.get(\"writes\", []), writes),\n", "", RECORD + "other_data_is_told"),
    ("virtio/recording.py", "a record may call anything", "content[\"do\"] in actions", "bool(content[\"do\"])", RECORD + "what_is_no_record_is_refused"),
]
