"""Faults in what works unseen, and where something fails: (file, what, old, new, test, …)."""
# One line each: a table.
# ruff: noqa: E501
# fmt: off

OPTIONS = "qcow2/test_options.py::test_"
VMSTATE = "qcow2/test_vmstate.py::test_"
RUNS = "qcow2/test_runs.py::test_"
COMMIT = "backend/test_commit.py::test_"
REBASE = "backend/test_rebase.py::test_"
CONVERT = "backend/test_convert.py::test_"
BITMAPS = "qcow2/test_bitmaps.py::test_"
DATA = "qcow2/test_data_file.py::test_"
CRYPT = "qcow2/test_encryption.py::test_"
FILE = "backend/test_file.py::test_"
RAW = "backend/test_raw.py::test_"
OPEN = "backend/test_open.py::test_"
DIRECT = "backend/test_direct.py::test_"
OVERLAP = "qcow2/test_overlap.py::test_"
UPDATE = "qcow2/test_header_update.py::test_"
CHECK = "qcow2/test_check_finds.py::test_"
REPAIR = "qcow2/test_repair.py::test_"
MAP = "backend/test_map.py::test_"

QUIET: list[tuple[str, ...]] = [
    # -- cleaner --
    ("qcow2/cleaner.py", "only L2 tables are cleaned", "metadata.tables.cache.drop_unused() + metadata.refcounts.cache.drop_unused()", "metadata.tables.cache.drop_unused()", OPTIONS + "cleaning_drops_unused_refcounts_too"),
    ("qcow2/cleaner.py", "the interval is taken for none", "        if interval:\n            self._start()\n", "        if not interval:\n            self._start()\n", OPTIONS + "interval_makes_a_thread_clean"),
    ("qcow2/cleaner.py", "the thread never ends", "                _thread = None\n                return\n", "                _changed.wait(0.1)\n                continue\n", OPTIONS + "interval_makes_a_thread_clean"),
    # -- counts --
    ("qcow2/counts.py", "counts from 255 on are 255", "        if count >= MANY or cluster >= self.size:\n            self.many[cluster] = count\n", "        if cluster >= self.size:\n            self.many[cluster] = count\n", REPAIR + "every_refcount_width_is_rebuilt", "qcow2/test_tally.py::test_a_cluster_referred_to_very_often_keeps_its_exact_count"),
    ("qcow2/counts.py", "clusters behind the end are not told", "                outside.append(cluster)\n", "                pass\n", "qcow2/test_tally.py::test_far_clusters_are_handed_on_before_they_are_many"),
    ("qcow2/counts.py", "a run behind the end does not count", "            self[cluster] = self[cluster] + times\n\n    def clip", "            pass\n\n    def clip", "qcow2/test_tally.py::test_a_run_across_the_window_counts_on_both_sides"),
    ("qcow2/counts.py", "a run over others replaces them", "            if times < MANY and piece.count(0) == inside:\n", "            if times < MANY:\n", "qcow2/test_tally.py::test_tables_in_order_of_the_file_are_counted_as_runs"),
    # -- runs --
    ("qcow2/runs.py", "zero clusters are data", "            yield size, False, True, True, False, depth, host, file\n", "            yield size, True, False, True, False, depth, host, file\n", RUNS + "zero_clusters_with_a_place_are_no_data"),
    ("qcow2/runs.py", "layers below are not deeper", "depth + 1 + below, host, file", "depth + below, host, file", RUNS + "runs_are_those_of_block_status", MAP + "a_chain_is_mapped_as_qemu_maps_it"),
    ("qcow2/runs.py", "a table is believed by its ends", "        return entries == array(\"Q\", range(expected, expected + step * count, step))\n", "        return True\n", RUNS + "a_run_is_one_in_its_middle_too"),
    ("qcow2/runs.py", "a host byte is the cluster's first", "                host += start - at\n", "                host += 0\n", RUNS + "a_part_begins_where_it_lies"),
    # -- snapshot view --
    ("qcow2/snapshot_view.py", "a view is as large as the disk", "            snapshot.disk_size // layout.SECTOR * layout.SECTOR,\n", "            image.header.size // layout.SECTOR * layout.SECTOR,\n", VMSTATE + "a_view_shows_the_snapshot_while_the_disk_goes_on"),
    ("qcow2/snapshot_view.py", "a view reads the active tables", "            l1_table_offset=snapshot.l1_table_offset,\n", "            l1_table_offset=image.header.l1_table_offset,\n", VMSTATE + "a_view_shows_the_snapshot_while_the_disk_goes_on"),
    ("qcow2/snapshot_view.py", "a closed view keeps its snapshot", "        self._released(self)\n", "        pass\n", VMSTATE + "a_snapshot_in_view_is_not_deleted"),
    ("qcow2/snapshot_view.py", "a view's VM state has no size", "        self._metadata.vm_state_end = snapshot.vm_state_size\n", "        self._metadata.vm_state_end = 0\n", VMSTATE + "a_view_shows_the_snapshot_while_the_disk_goes_on"),
    # -- holes --
    ("qcow2/holes.py", "nobody asks for holes", "                    if used >= threshold:\n                        return True\n", "                    pass\n", RUNS + "holes_of_the_host_in_preallocated_clusters_are_zeroes"),
    ("qcow2/holes.py", "everybody asks for holes", "                if used >= threshold:\n", "                if True:\n", RUNS + "nobody_asks_for_holes_where_the_host_has_the_space"),
    # -- emptying --
    ("qcow2/emptying.py", "what was emptied keeps its references", "        lower_references(metadata, former, DiscardKind.REQUEST)\n", "        pass\n", COMMIT + "the_backing_file_takes_the_data_and_the_overlay_is_empty"),
    ("qcow2/emptying.py", "what was emptied is still there", "                tables.set_l1(index, 0)\n", "                pass\n", COMMIT + "the_backing_file_takes_the_data_and_the_overlay_is_empty"),
    # -- data file tables --
    ("qcow2/data_file_tables.py", "offset 0 is no place", "    if entry & (_FLAGS | layout.OFFSET_MASK) == layout.COPIED:\n        return ClusterKind.NORMAL\n", "", DATA + "qemu_reads_what_we_wrote"),
    ("qcow2/data_file_tables.py", "a cluster may be anywhere in the data file", "    if host != place:\n", "    if False:\n", DATA + "an_entry_for_another_place_is_refused"),
    ("qcow2/data_file_tables.py", "compressed clusters are followed", "        if kind is ClusterKind.COMPRESSED:\n            _refuse_compressed", "        if False:\n            _refuse_compressed", DATA + "compressed_entries_are_refused"),
    # -- bitmaps --
    ("qcow2/bitmap_table.py", "all ones are none", "            bits.set(8 * i * size, 8 * size)\n", "            pass\n", BITMAPS + "the_all_ones_form_is_read_and_written"),
    ("qcow2/bitmap_table.py", "tables of bitmaps in use are looked at", "        if entry.flags & layout.BitmapFlags.IN_USE:\n            continue\n", "", BITMAPS + "a_table_of_a_bitmap_in_use_is_not_looked_at"),
    ("qcow2/bitmap_table.py", "one cluster is read again and again", "    if stored > metadata.geometry.clusters(metadata.file.size):\n", "    if False:\n", BITMAPS + "one_cluster_named_again_and_again_does_not_fill_the_memory"),
    ("qcow2/bitmap_check.py", "the directory is nobody's", "    yield extension.directory_offset, extension.directory_size\n", "", BITMAPS + "check_counts_the_clusters_of_bitmaps_as_qemu_does"),
    ("qcow2/bitmap_check.py", "the data are nobody's", "                yield offset, metadata.cluster_size\n", "                pass\n", BITMAPS + "the_data_of_a_bitmap_are_no_leak"),
    ("qcow2/bitmap_directory.py", "any flags are taken", "        and not flags & layout.BITMAP_FLAGS_RESERVED\n", "", BITMAPS + "a_malformed_directory_is_refused"),
    ("qcow2/bitmap_directory.py", "extra data are passed over", "    if extra:\n", "    if False:\n", BITMAPS + "a_malformed_directory_is_refused"),
    ("qcow2/bitmaps.py", "a disabled bitmap is stored enabled", "flags = BitmapFlags.AUTO if bitmap.enabled else BitmapFlags(0)", "flags = BitmapFlags.AUTO", BITMAPS + "a_disabled_bitmap_is_disabled_for_the_next_process"),
    ("qcow2/bitmaps.py", "a bitmap that is written is not in use", "                file.write(offset + layout.BITMAP_FLAGS_OFFSET, layout.U32.pack(entry.flags))\n", "", BITMAPS + "a_bitmap_is_in_use_from_the_first_write_to_the_close"),
    ("qcow2/bitmaps.py", "merging takes other sizes", "            if other.disk_size != self.disk_size:\n", "            if False:\n", BITMAPS + "merge_takes_another_disks_bitmap_of_the_same_size"),
    # -- encryption options --
    ("qcow2/encryption_options.py", "two kinds of encryption at once", "        if self.encryption and self.encrypt_format is not None:\n", "        if False:\n", CRYPT + "encryption_that_is_not_there_is_refused"),
    ("qcow2/encryption_options.py", "encryption=on is LUKS", 'name = "aes" if self.encryption else', 'name = "luks" if self.encryption else', CRYPT + "encryption_on_is_legacy_aes"),
    # -- chain --
    ("backend/chain.py", "a layer counts as its own base", "        if layer is base and depth:\n", "        if layer is base:\n", COMMIT + "a_disk_is_not_its_own_base"),
    ("backend/chain.py", "zeroes behind a short layer's end are the base's", "return extent.depth < depth and (extent.allocated or extent.depth < depth - 1)", "return extent.depth < depth and extent.allocated", COMMIT + "zeroes_that_a_short_layer_between_shows_reach_the_base"),
    ("backend/chain.py", "a relative name is taken to another folder", "    if name is None or os.path.isabs(name) or folders[0] == folders[1]:\n", "    if True:\n", REBASE + "a_name_relative_to_another_folder_becomes_absolute"),
    # -- pump, progress --
    ("backend/pump.py", "writes come in any order", "        if self._in_order:\n", "        if False:\n", CONVERT + "in_order_writes_come_one_after_the_other"),
    ("backend/pump.py", "errors of threads are lost", "        raise state.error\n", "        pass\n", CONVERT + "an_error_comes_out_and_stops_everything"),
    ("backend/pump.py", "threads go on after an interrupt", "        state.stop()\n", "        pass\n", CONVERT + "an_error_in_between_stops_the_threads"),
    ("backend/pump.py", "one thread tells of no progress", "            done(piece)\n        return\n", "        return\n", CONVERT + "one_thread_tells_of_each_piece"),
    # -- rebase, measure --
    ("backend/rebase.py", "the former backing file stays open", "        former.close()\n", "        pass\n", REBASE + "the_former_backing_file_is_closed"),
    ("backend/rebase.py", "what was copied is not stable before the name changes", "        overlay.flush()\n", "        pass\n", REBASE + "what_was_copied_is_stable_before_the_name_changes"),
    ("backend/rebase.py", "zeroes of a shorter backing file are not looked for", "    if backing is None or offset >= backing.size:\n        return True, length\n", "    if backing is None:\n        return True, length\n", REBASE + "the_overlay_reads_the_same_over_another_backing_file"),
    ("backend/measure.py", "negative sizes are measured", "    if source < 0:\n", "    if False:\n", "backend/test_measure.py::test_a_negative_size_is_refused"),
    # -- files that cannot be opened or made --
    ("backend/file.py", "a failed open leaks its descriptor", "            self._fd = -1\n            os.close(fd)\n            raise\n", "            self._fd = -1\n            raise\n", FILE + "a_failed_open_leaves_no_descriptor"),
    ("backend/file.py", "a failed creation leaves a file", "                    os.unlink(name)\n", "                    pass\n", FILE + "a_creation_that_fails_leaves_what_was_there"),
    ("backend/file.py", "a failed creation deletes what was there", "            if made:\n                with suppress(FileNotFoundError):\n                    os.unlink(name)", "            if True:\n                with suppress(FileNotFoundError):\n                    os.unlink(name)", FILE + "a_creation_that_fails_leaves_what_was_there"),
    ("backend/file.py", "an exclusive creation takes what is there", "            if exclusive:\n", "            if False:\n", FILE + "create_exclusive_needs_a_new_name"),
    ("backend/raw.py", "a window before the file is taken", "    if offset < 0 or (size is not None and size < 0):\n", "    if size is not None and size < 0:\n", RAW + "windows_before_the_file_are_refused"),
    ("backend/raw.py", "a fixed window is resized", "        if self._fixed_size:\n", "        if False:\n", RAW + "a_fixed_window_cannot_be_resized"),
    ("backend/blockdev.py", "a file stays open where its image cannot be", "        node.abandon()\n", "", OPEN + "the_file_of_a_failed_image_is_closed_at_once"),
    ("backend/direct.py", "addresses need not be aligned", " and address_of(view) % self.memory_alignment == 0\n", "\n", DIRECT + "buffers_that_lie_unaligned_go_by_the_bounce_buffer"),
    # -- overlap, vm state, header --
    ("qcow2/overlap.py", "the header is nobody's", "            yield 0, 0\n", "            yield from ()\n", OVERLAP + "the_header_is_a_structure"),
    ("qcow2/overlap.py", "a write is looked at in its last cluster only", "        first = offset >> self._bits\n        last = (offset + length - 1)", "        first = last = (offset + length - 1)", OVERLAP + "long_write_that_touches_a_table_is_refused"),
    ("qcow2/vmstate.py", "a VM state is read from its beginning", "        offset = self.offset + position\n", "        offset = self.offset\n", VMSTATE + "a_part_of_the_vm_state_is_read_where_it_stands"),
    ("qcow2/vmstate.py", "a VM state is written to its beginning", "self._padded(self.offset + position, views, length)", "self._padded(self.offset, views, length)", VMSTATE + "any_position_can_be_written_and_read"),
]
