"""Faults in features that have files of their own: (file, what goes wrong, old, new, test, …)."""
# One line each: a table.
# ruff: noqa: E501
# fmt: off

KEYS = "qcow2/test_amend_encryption.py::test_"
STATE = "qcow2/test_state.py::test_"
OPTIONS = "qcow2/test_options.py::test_"
OVERLAP = "qcow2/test_overlap.py::test_"
REPAIR = "qcow2/test_repair.py::test_"
RESIZE = "qcow2/test_resize.py::test_"
AMEND = "qcow2/test_amend.py::test_"
VMSTATE = "qcow2/test_vmstate.py::test_"
PACKED = "qcow2/test_compression.py::test_"
UPDATE = "qcow2/test_header_update.py::test_"
BITMAPS = "qcow2/test_bitmaps.py::test_"
BITS = "qcow2/test_dirty_bits.py::test_"
DATA = "qcow2/test_data_file.py::test_"
CRYPT = "qcow2/test_encryption.py::test_"
LUKS = "backend/test_luks1.py::test_"
CIPHER = "backend/test_sector_cipher.py::test_"
CONVERT = "backend/test_convert.py::test_"
COMPARE = "backend/test_compare.py::test_"
REBASE = "backend/test_rebase.py::test_"
COMMIT = "backend/test_commit.py::test_"
MAP = "backend/test_map.py::test_"
MEASURE = "backend/test_measure.py::test_"
REOPEN = "qcow2/test_reopen.py::test_"

FEATURES: list[tuple[str, ...]] = [
    # -- dirty and corrupt marks --
    ("qcow2/state.py", "marks are in memory only", "        file.write(layout.INCOMPATIBLE_FEATURES_OFFSET, layout.U64.pack(features))\n", "", STATE + "corruption_marks_the_image_and_is_told_once"),
    ("qcow2/state.py", "version 2 gets a mark where it has no field", "    if header.version >= 3:\n        file.write", "    if header.version >= 2:\n        file.write", STATE + "version_2_image_has_no_place_for_the_mark"),
    ("qcow2/corruption.py", "a corrupt image is written on", "            self._health.poison(message)\n", "            pass\n", STATE + "corrupt_image_refuses_everything_afterwards"),
    ("qcow2/corruption.py", "a reader marks the image corrupt", "        fatal = self._writable\n", "        fatal = True\n", STATE + "corruption_met_read_only_refuses_only_that_request"),
    ("qcow2/metadata.py", "lazy refcounts leave the image clean", "                mark_dirty(self.file, self.header)\n", "", STATE + "lazy_image_is_dirty_from_the_first_flush_until_it_is_closed"),
    # -- options --
    ("qcow2/options.py", "the guest's discards always go on", 'pass_discard_request=values.boolean("pass-discard-request", discards)', 'pass_discard_request=values.boolean("pass-discard-request", True)', OPTIONS + "discards_are_passed_on_only_if_the_file_hears_of_them"),
    ("qcow2/options.py", "an unknown option is taken", "        for name in values.left:\n", "        for name in ():\n", OPTIONS + "unknown_options_are_refused"),
    ("qcow2/options.py", "lazy refcounts in version 2", "        if lazy and geometry.version < 3:\n", "        if lazy and geometry.version < 2:\n", OPTIONS + "lazy_refcounts_need_version_3"),
    ("qcow2/options.py", "the default check is another", 'template is not None else "cached"', 'template is not None else "constant"', OPTIONS + "defaults_are_qemus"),
    ("qcow2/options.py", "cache sizes may contradict", "        if l2 is not None and l2 > both:\n", "        if False:\n", OPTIONS + "wrong_values_are_refused"),
    # -- overlap checks --
    ("qcow2/overlap.py", "moved structures are not known", "        self._known = False\n\n    def add(", "        pass\n\n    def add(", OVERLAP + "tables_that_moved_are_known_where_they_are_now"),
    # -- repair --
    ("qcow2/repair.py", "leaks are counted and not lowered", "        stored[cluster] = want\n", "        stored[cluster] = have\n", REPAIR + "repair_leaves_a_clean_image_with_its_contents"),
    ("qcow2/check.py", "a repaired image stays dirty", "        mark_clean(metadata.file, metadata.header)\n", "", REPAIR + "repair_clears_the_dirty_and_corrupt_bits"),
    ("qcow2/check.py", "a repaired image stays corrupt", "        mark_consistent(metadata.file, metadata.header)\n", "", REPAIR + "repair_clears_the_dirty_and_corrupt_bits"),
    ("qcow2/check.py", "an image that is still corrupt counts as consistent", "    if not (result.corruptions or result.check_errors or result.failure):\n", "    if True:\n", REPAIR + "corrupt_bit_stays_while_something_is_corrupt"),
    ("qcow2/driver.py", "a dirty image is written unrepaired", "                disk._repair_if_dirty()\n", "", REPAIR + "dirty_image_is_repaired_when_it_is_opened_to_be_written"),
    ("qcow2/driver.py", "a read-only disk is repaired", "            metadata.check_writable(repair=True)\n", "            pass\n", REPAIR + "read_only_disk_is_not_repaired"),
    ("qcow2/snapshot_check.py", "too many snapshots stay", "        number = layout.MAX_SNAPSHOTS\n", "        number = layout.MAX_SNAPSHOTS + 1\n", REPAIR + "too_many_snapshots_are_cut_off"),
    # -- size --
    ("qcow2/past_end.py", "what was cut off keeps its entries", "            tables.set_entries(position, [0] * count)\n", "            pass\n", RESIZE + "what_was_cut_off_does_not_come_back"),
    ("qcow2/past_end.py", "what was cut off keeps its references", "                    metadata.drop_entry(entry, DiscardKind.ALWAYS)\n", "                    pass\n", RESIZE + "shrinking_keeps_what_a_snapshot_has", RESIZE + "shrinking_cuts_the_file"),
    ("qcow2/preallocate.py", "preallocated clusters are not ours", "    flags = layout.COPIED\n", "    flags = 0\n", RESIZE + "preallocated_clusters_are_written_in_place"),
    ("qcow2/resize.py", "preallocation when shrinking", '        if preallocation != "off":\n', "        if False:\n", RESIZE + "preallocation_when_shrinking_is_refused"),
    # -- amend --
    ("qcow2/amend.py", "a width without version 3", "        if bits != 16 and version < 3:\n", "        if bits != 16 and version < 2:\n", AMEND + "refusals"),
    ("qcow2/amend.py", "a downgrade with other widths", "    if metadata.header.refcount_order != 4:\n", "    if metadata.header.refcount_order > 4:\n", AMEND + "refusals"),
    ("qcow2/amend.py", "a downgrade forgets the snapshots' sizes", "snapshot.vm_state_size >= 1 << 32 or snapshot.disk_size != metadata.header.size", "snapshot.vm_state_size >= 1 << 32", AMEND + "snapshots_of_another_size_prevent_a_downgrade"),
    ("qcow2/zero_expansion.py", "allocated zero clusters keep what they held", "        metadata.file.write_zeroes(host, metadata.cluster_size)\n", "", AMEND + "downgrade_and_upgrade_keep_what_is_read"),
    ("qcow2/zero_expansion.py", "expanded zero clusters show the backing file", "    if backed and plain:\n", "    if False:\n", AMEND + "downgrade_and_upgrade_keep_what_is_read"),
    ("qcow2/refcount_width.py", "counts that do not fit are cut", "                if max(values) > most:\n", "                if False:\n", AMEND + "a_width_that_is_too_small_is_refused"),
    ("qcow2/refcount_width.py", "the old structures leak", "                metadata.refcounts.add(*part, -1)\n    metadata.settle()\n", "                pass\n    metadata.settle()\n", AMEND + "every_refcount_width_counts_the_same"),
    # -- vm state --
    ("qcow2/vmstate.py", "the size of the state is not kept", "            self._metadata.vm_state_end = max(known, position + length)\n", "            pass\n", VMSTATE + "the_stream_is_a_file_object"),
    ("qcow2/vmstate.py", "discarded VM state leaks", "            drop_tables(metadata, first, DiscardKind.OTHER)\n", "            pass\n", VMSTATE + "discarding_the_vm_state_frees_it"),
    # -- compressed writes --
    ("qcow2/compressed_writing.py", "compressed data claims the sector behind it", "sectors = (place.host % layout.SECTOR + length - 1) // layout.SECTOR", "sectors = (place.host % layout.SECTOR + length) // layout.SECTOR", PACKED + "data_that_end_with_a_sector_do_not_claim_the_next_one"),
    ("qcow2/compressed_writing.py", "a full refcount is raised further", "if start and refcounts.get(last) >= metadata.geometry.refcount_max:", "if False:", PACKED + "a_full_refcount_starts_a_new_host_cluster"),
    ("qcow2/compressed_writing.py", "a freed host cluster is filled further", "            self._next = 0\n\n    def _lower", "            pass\n\n    def _lower", PACKED + "a_host_cluster_that_was_freed_is_not_filled_further"),
    ("qcow2/compressed_writing.py", "overwritten clusters leak", "            metadata.drop_entry(place.old, DiscardKind.OTHER)\n", "            pass\n", PACKED + "overwriting_frees_what_was_there"),
    ("qcow2/compressed_writing.py", "parts of clusters are compressed", "if offset % size or (length % size and offset + length != disk_size):", "if offset % size:", PACKED + "ranges_that_are_not_whole_clusters_are_refused"),
    ("qcow2/compressed_writing.py", "a failed write leaks", "            self._lower(place.first, place.count)\n", "            pass\n", PACKED + "a_failed_write_leaves_nothing_behind"),
    # -- header --
    ("qcow2/header_update.py", "the rest of the header is not stable before the first sector", "        file.write(_SECTOR, rest)\n        file.flush()\n", "        file.write(_SECTOR, rest)\n", UPDATE + "a_cut_while_the_backing_file_changes_leaves_the_old_or_the_new_header"),
    ("qcow2/header_update.py", "names of 1,024 bytes are taken", "if name is not None and len(os.fsencode(name)) > layout.MAX_BACKING_NAME:", "if name is not None and len(os.fsencode(name)) > layout.MAX_BACKING_NAME + 1:", UPDATE + "names_that_the_header_cannot_hold_are_refused"),
    # -- bitmaps --
    ("qcow2/dirty_bits.py", "the last bits of a range are not set", "        chunk[end_byte] |= (1 << (end & 7)) - 1\n", "        chunk[end_byte] |= 0\n", BITS + "random_operations_match_an_integer"),
    ("qcow2/dirty_bits.py", "merging takes one of the two", "both = int.from_bytes(mine) | int.from_bytes(chunk)", "both = int.from_bytes(mine)", BITS + "random_operations_match_an_integer", BITMAPS + "merge_takes_the_union"),
    ("qcow2/dirty_bits.py", "bits behind the end come back", "self._chunks[last], \"little\") & ((1 << within) - 1)", "self._chunks[last], \"little\")", BITS + "random_operations_match_an_integer", BITS + "set_bits_past_the_end_of_what_is_loaded_are_dropped"),
    ("qcow2/bitmap_store.py", "full pieces are not told by all ones", "                table[number] = layout.BITMAP_ALL_ONES\n", "                table[number] = 0\n", BITMAPS + "the_all_ones_form_is_read_and_written"),
    ("qcow2/bitmap_store.py", "the old directory leaks", "        free_clusters(metadata, first, metadata.geometry.clusters(old.directory_size))\n", "        pass\n", BITMAPS + "nothing_is_leaked"),
    ("qcow2/bitmap_store.py", "a removed bitmap's data leaks", "            free_clusters(metadata, start, count)\n    first = entry", "            pass\n    first = entry", BITMAPS + "nothing_is_leaked"),
    ("qcow2/driver.py", "writes are not recorded", "        with self.bitmaps.recording(offset, length):\n            self._writer.write(offset, views, length)\n", "        if True:\n            self._writer.write(offset, views, length)\n", BITMAPS + "writes_zeroes_and_discards_are_recorded"),
    # -- data files --
    ("qcow2/data_file.py", "a raw data file does not hear of zeroes", "    if is_raw(metadata.header):\n        length", "    if False:\n        length", DATA + "zeroes_reach_a_raw_data_file"),
    ("qcow2/data_file.py", "what others left behind the end shows", "        data.truncate(old_size, shrink=True)\n", "        pass\n", DATA + "what_others_left_behind_the_end_does_not_show_after_growing"),
    ("qcow2/data_file.py", "a short data file is taken", "    if not disk.growable and disk.size < header.size:\n", "    if False:\n", DATA + "a_data_file_that_is_too_short_and_cannot_grow_is_refused"),
    ("qcow2/metadata.py", "the data file is not flushed before entries", "        if metadata.data_file is not None:\n            metadata.data_file.flush()\n", "", DATA + "the_data_file_is_flushed_before_an_entry_is_written"),
    ("qcow2/metadata.py", "a flush without metadata leaves the data file", "            if self.data_file is not None:\n                self.data_file.flush()\n", "", DATA + "a_flush_without_changes_of_metadata_flushes_the_data_file"),
    # -- encryption --
    ("qcow2/encryption.py", "every chunk begins with the first one's sector", "sector = ((host if self._by_host else guest) + done) // SECTOR", "sector = (host if self._by_host else guest) // SECTOR", CRYPT + "longer_than_one_piece"),
    ("qcow2/encryption.py", "LUKS counts guest sectors", "clear = cipher.decrypt(data, (host if self._by_host else guest) // SECTOR)", "clear = cipher.decrypt(data, guest // SECTOR)", CRYPT + "what_is_written_is_not_seen_in_the_file", CRYPT + "a_snapshot_reads_as_it_was"),
    ("backend/sector_cipher.py", "sector numbers have 32 bits in plain64", "(1 << 32) - 1 if ivgen == \"plain\" else (1 << 64) - 1", "(1 << 32) - 1", CIPHER + "iv_is_the_sector_number_in_so_many_bits"),
    ("backend/sector_cipher.py", "sector numbers are big-endian", "(number & mask).to_bytes(16, \"little\")", "(number & mask).to_bytes(16, \"big\")", CIPHER + "iv_is_the_sector_number_in_so_many_bits"),
    ("backend/luks1.py", "an active key slot is replaced unasked", "if header.slots[slot].active and not force:", "if False:", LUKS + "an_active_slot_is_replaced_only_by_force"),
    ("backend/luks1.py", "the last key is erased unasked", "            if not left and not force:\n", "            if False:\n", LUKS + "what_must_not_be_erased_is_refused"),
    ("backend/luks1.py", "erased key material stays", "        self._write(old.key_offset * luks_format.SECTOR, os.urandom(size))\n", "", LUKS + "an_erased_key_opens_nothing_and_its_material_is_gone"),
    ("backend/luks1.py", "a slot is one before its material is there", "new = KeySlot(luks_format.INACTIVE, 0, b\"\", header.slots[slot].key_offset)", "new = KeySlot(luks_format.ACTIVE, 1000, b\"\", header.slots[slot].key_offset)", LUKS + "a_cut_while_a_key_is_added_leaves_no_slot_that_is_half_there"),
    ("qcow2/encryption.py", "a new secret erases", "            if new_secret is not None:\n", "            if False:\n", KEYS + "what_qemu_refuses_is_refused_in_its_words"),
    ("qcow2/encryption.py", "the slot that was named is not the one taken", "self.add_key(new_secret, slot=slot, iter_time=milliseconds, force=force)", "self.add_key(new_secret, iter_time=milliseconds, force=force)", KEYS + "the_slot_is_the_one_named"),
    ("qcow2/encryption.py", "force is needed for nothing", "self.erase_key(slot=slot, passphrase=old_secret, force=force)", "self.erase_key(slot=slot, passphrase=old_secret, force=True)", KEYS + "what_qemu_refuses_is_refused_in_its_words"),
    ("qcow2/amend.py", "the encryption is not amended", "        metadata.encryption.amend(**options.encryption, force=force)\n", "        pass\n", KEYS + "a_passphrase_is_added_and_the_old_one_erased"),
    ("qcow2/amend.py", "the data file keeps its name", "            update_header(metadata, data_file=options.data_file or None)\n", "            pass\n", DATA + "the_data_files_name_is_amended"),
    ("qcow2/amend.py", "any image has a data file's name", "    if options.data_file is not None and not header", "    if options.data_file == \"\" and not header", DATA + "amending_what_a_data_file_must_stay_is_refused_as_by_qemu"),
    # -- between any two disks --
    ("backend/compare.py", "the end of the longer disk is not looked at", "                at = first_nonzero(_read(longer, offset, length))\n", "                at = -1\n", COMPARE + "a_longer_disk_is_identical_if_it_ends_in_zeroes"),
    ("backend/compare.py", "strict does not want equal states", "        if strict and _state(one) != _state(two):\n", "        if False:\n", COMPARE + "strict_wants_equal_sizes_and_states"),
    ("backend/compare.py", "the difference is told too early", "            start = middle\n", "            start = start\n            break\n", COMPARE + "the_first_byte_that_differs_is_told"),
    ("backend/rebase.py", "nothing is copied before the backing file changes", "        _copy_differences(overlay, backing, sparse, progress)\n", "", REBASE + "the_overlay_reads_the_same_over_another_backing_file"),
    ("backend/commit.py", "zeroes do not reach the base", "                target.write_zeroes(offset, length, unmap=True)\n", "                pass\n", COMMIT + "the_base_reads_as_the_one_that_qemu_commits_to"),
    ("backend/commit.py", "a smaller base stays small", "            target.truncate(overlay.size)\n", "            pass\n", COMMIT + "a_base_that_is_smaller_grows"),
    ("backend/commit.py", "the overlay is emptied though it is to be kept", "        if not keep and depth == 1:\n", "        if depth == 1:\n", COMMIT + "kept_overlays_keep_their_data"),
    ("backend/stream.py", "zeroes of a layer between show the base", "                overlay.write_zeroes(offset, length)\n", "                pass\n", REBASE + "zeroes_of_a_short_layer_between_hide_the_base"),
    ("backend/stream.py", "the chain is still named", "        image.change_backing_file(None)\n", "        pass\n", REBASE + "a_streamed_overlay_needs_no_chain"),
    ("backend/map.py", "runs that do not follow are joined", "and (host2 is None if host is None else host2 == host + length)", "and ((host2 is None) == (host is None))", MAP + "a_chain_is_mapped_as_qemu_maps_it"),
    ("backend/convert.py", "an old target keeps what it held", "        if not self.is_zero:\n            self.target.write_zeroes", "        if self.is_zero:\n            self.target.write_zeroes", CONVERT + "an_old_target_is_overwritten_with_zeroes_too"),
    ("qcow2/zeroing.py", "discard-no-unref is forgotten", "        if keep and entry & layout.COPIED and entry & layout.OFFSET_MASK:\n", "        if False:\n", OPTIONS + "discard_no_unref_keeps_the_clusters"),
    ("qcow2/cache.py", "cleaning never drops what was used once", "                self.referenced[slot] = 0\n            elif not self._pins", "                pass\n            elif not self._pins", OPTIONS + "cleaning_drops_what_was_not_used_since_the_last_time"),
    ("qcow2/snapshots.py", "a snapshot in view is deleted", "        self.refuse_views(snapshot)\n", "", VMSTATE + "a_snapshot_in_view_is_not_deleted"),
    ("qcow2/reload.py", "the tables are not read anew", "        metadata.reload()\n", "        pass\n", "qcow2/test_reopen.py::test_what_another_program_changed_is_seen_after_invalidate"),
    ("backend/luks1.py", "nobody is asked for the passphrase", "given = passphrase() if callable(passphrase) else passphrase", "given = passphrase", "qcow2/test_encryption.py::test_a_passphrase_is_bytes_or_what_asks_for_them"),
    ("qcow2/measure.py", "zeroes are measured as data", "        if not extent.zero and extent.data and extent.allocated:\n", "        if extent.allocated:\n", "backend/test_measure.py::test_a_chain_is_measured_as_qemu_does"),
]
