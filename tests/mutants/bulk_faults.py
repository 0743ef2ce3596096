"""Faults where tables are worked on as a whole, and in zeroes: (file, what, old, new, test, …)."""
# One line each: a table.
# ruff: noqa: E501
# fmt: off

TALLY = "qcow2/test_tally.py::test_"
SNAPSHOTS = "qcow2/test_snapshot_rules.py::test_"
PART = "qcow2/test_zeroes_in_part.py::test_"
MAP = "backend/test_map.py::test_"
RESIZE = "qcow2/test_resize.py::test_"

BULK: list[tuple[str, ...]] = [
    # -- tally --
    ("qcow2/tally.py", "a high count is cut", "            if MANY in piece:\n", "            if False:\n", TALLY + "a_cluster_referred_to_very_often_keeps_its_exact_count"),
    ("qcow2/tally.py", "clusters behind the window are lost", "merge_runs(c for c in counts.many if c >= WINDOW)", "merge_runs(())", TALLY + "random_tables_are_counted_as_one_by_one"),
    ("qcow2/tally.py", "clusters with a high count come up twice", "merge_runs(c for c in counts.many if c >= WINDOW)", "merge_runs(counts.many)", TALLY + "a_cluster_referred_to_very_often_keeps_its_exact_count"),
    ("qcow2/tally.py", "compressed data is in its first cluster only", "        self.add_clusters([*chain.from_iterable(more)], times)\n", "", TALLY + "random_tables_are_counted_as_one_by_one"),
    ("qcow2/tally.py", "unaligned offsets spill into their neighbours", "mask = every_entry(layout.OFFSET_MASK & -(1 << bits), len(table) // 8)", "mask = every_entry(layout.OFFSET_MASK, len(table) // 8)", TALLY + "entries_that_lie_unaligned_do_not_spill_into_their_neighbours"),
    ("qcow2/tally.py", "what was handed on is counted again", "min(self._end, WINDOW)\n        self._start()\n", "min(self._end, WINDOW)\n", TALLY + "what_was_handed_on_is_not_counted_again"),
    ("qcow2/tally.py", "a run is believed by its ends", "return (first, count) if int.from_bytes(table) == first * ones + ramp else None", "return first, count", TALLY + "a_run_is_one_in_its_middle_too"),
    ("qcow2/tally.py", "far clusters are held without a limit", "        if len(counts.many) > _MAX_OUTSIDE:\n            self.finish()\n", "", TALLY + "far_clusters_are_handed_on_before_they_are_many"),
    # -- sharing --
    ("qcow2/sharing.py", "unallocated entries get COPIED", "            self._counts.bytes[0] = 0  # an entry with that number refers to nothing\n", "", SNAPSHOTS + "what_is_not_allocated_gets_no_flag"),
    ("qcow2/sharing.py", "compressed entries get COPIED", '[0 if e & layout.COMPRESSED else (e & mask) >> bits for e in entries]', '[(e & mask) >> bits for e in entries]', SNAPSHOTS + "flags_of_compressed_clusters_stay_clear"),
    ("qcow2/sharing.py", "far clusters never get COPIED", "self._refcounts.get(c) == 1 for c", "self._refcounts.get(c) == 0 for c", SNAPSHOTS + "flags_are_right_in_tables_without_any_order"),
    ("qcow2/sharing.py", "only the first chunk is looked up", "for number in {cluster >> _CHUNK_BITS for cluster in clusters}:", "for number in {first >> _CHUNK_BITS}:", SNAPSHOTS + "flags_are_right_in_tables_without_any_order"),
    ("qcow2/sharing.py", "what was raised before a failure stays raised", "        for first, counts in reversed(done):\n", "        for first, counts in ():\n", SNAPSHOTS + "what_was_raised_before_a_refcount_at_its_limit_is_lowered_again"),
    # -- zeroes for a part of a cluster --
    ("qcow2/zeroing.py", "what lies around a part is zeroed with it", "                if not all(not part or reader.is_zero(kind, at, part) for at, part in around):\n                    return False\n", "", PART + "the_backing_file_decides_where_nothing_is_stored", PART + "stored_data_are_overwritten"),
    ("qcow2/zeroing.py", "what was written meanwhile is zeroed", "                    if entry != seen:\n", "                    if False:\n", PART + "a_zero_cluster_that_is_filled_in_between_keeps_its_data", PART + "a_write_that_comes_in_between_is_kept"),
    ("qcow2/zeroing.py", "version 2 hides nothing", "                    return not backed  #", "                    return True  #", PART + "without_zero_clusters_zeroes_hide_a_backing_file"),
    ("qcow2/reading.py", "zeroes go on behind a first run of them", "                offset += extent.length\n        except", "                break\n        except", PART + "data_behind_zeroes_of_a_layer_below_are_kept"),
    ("qcow2/driver.py", "bitmaps do not hear of a part", "        with REPORTING, self.bitmaps.recording(offset, length):\n            if zeroing.write_zeroes_in_part(", "        with REPORTING:\n            if zeroing.write_zeroes_in_part(", PART + "bitmaps_hear_of_it"),
    ("qcow2/driver.py", "what was left behind the end shows", "        if any(data):\n", "        if False:\n", RESIZE + "what_a_cluster_has_behind_the_end_does_not_show"),
    ("qcow2/driver.py", "zeroes behind the end are stored again", "        if any(data):\n", "        if True:\n", RESIZE + "zeroes_behind_the_end_are_not_stored_again"),
    ("qcow2/driver.py", "growing hides whole clusters alone by zeroes", "        unit = self._metadata.geometry.subcluster_size\n", "        unit = self._metadata.cluster_size\n", RESIZE + "growing_hides_a_longer_backing_file_by_subclusters"),
    ("qcow2/bitmaps.py", "what lies past the end is recorded", "        if offset >= self.disk_size:\n", "        if False:\n", RESIZE + "what_is_hidden_for_growing_is_no_write_for_bitmaps"),
    ("qcow2/resize.py", "nothing behind the end counts as stored", "            if kind in (ClusterKind.NORMAL, ClusterKind.COMPRESSED):\n", "            if False:\n", RESIZE + "what_a_cluster_has_behind_the_end_does_not_show"),
    # -- facts --
    ("qcow2/driver.py", "a cipher's zeroes are zeroes", "return self._metadata.encryption is None and self._metadata.data.has_zero_init", "return self._metadata.data.has_zero_init", "interop/test_encryption.py::test_what_qemu_preallocated_is_zeroes_only_where_nothing_is_encrypted"),
    ("qcow2/driver.py", "only preallocated images read as zeroes", "        if not l1 or not l1[0]:\n", "        if not l1:\n", "interop/test_encryption.py::test_what_qemu_preallocated_is_zeroes_only_where_nothing_is_encrypted"),
    ("qcow2/status.py", "subclusters that are not allocated have no place", "        if not host:\n            place", "        if True:\n            place", MAP + "subclusters_that_are_not_allocated_have_a_place_as_with_qemu"),
    ("qcow2/subclusters.py", "places that do not follow are one run", "                or (first_host and not host)\n", "", MAP + "subclusters_that_are_not_allocated_have_a_place_as_with_qemu"),
]
