"""Faults in machine/, and in what it asks of qcow2/: (file, what goes wrong, old, new, test, …)."""
# One line each: a table.
# ruff: noqa: E501
# fmt: off

INCREMENTS = "machine/test_increments.py::test_"
BRANCHES = "machine/test_branches.py::test_"
MACHINE = "machine/test_snapshots.py::test_"
STREAM = "machine/test_stream.py::test_"
CUTS = "machine/test_cuts.py::test_"
ASIDE = "qcow2/test_aside.py::test_"
PAGE = "examples/test_toy.py::test_the_code_on_the_page_runs"

MACHINES: list[tuple[str, ...]] = [
    # -- finding what changed --
    ("machine/dirty.py", "a mark ends a page too soon", "offset // PAGE, -(-(offset + length) // PAGE)", "offset // PAGE, (offset + length) // PAGE", INCREMENTS + "the_emulator_marks_what_it_writes"),
    ("machine/dirty.py", "marks are never taken off", "        self.pages[:] = bytes(len(self.pages))\n", "        pass\n", INCREMENTS + "the_emulator_marks_what_it_writes"),
    ("machine/dirty.py", "nothing is dirty at first", 'self.pages = bytearray(b"\\1") * pages_of(size)', "self.pages = bytearray(pages_of(size))", INCREMENTS + "the_emulator_marks_what_it_writes"),
    ("machine/dirty.py", "marks for another RAM are taken", "        if len(self.pages) != pages_of(len(ram)):\n", "        if False:\n", INCREMENTS + "dirty_pages_of_another_size_are_refused"),
    ("machine/dirty.py", "the copy is not brought up to date", "            if changed is None or everything or any(changed[number * per_chunk :][:per_chunk]):\n", "            if changed is None or everything:\n", INCREMENTS + "every_page_that_changed_is_found_and_no_other"),
    ("machine/dirty.py", "a chunk that is the same counts as changed", "                pages[first : first + _CHUNK // PAGE] = bytes(pages_of(len(new)))\n", "", INCREMENTS + "every_page_that_changed_is_found_and_no_other"),
    ("machine/dirty.py", "hashes are not brought up to date", "        self._hashes = _hashes(ram) if changed is None else self._seen\n", "        self._hashes = self._hashes or _hashes(ram)\n", INCREMENTS + "every_page_that_changed_is_found_and_no_other"),
    # -- RAM at fixed places --
    ("machine/placed.py", "pages are not checked", "        if wrong is not None:\n", "        if False:\n", INCREMENTS + "a_page_that_is_damaged_loads_nothing"),
    ("machine/placed.py", "RAM of another size is taken", "    if found != size:\n", "    if False:\n", INCREMENTS + "a_placed_section_that_makes_no_sense_loads_nothing"),
    ("machine/placed.py", "pages of another size are taken", "    if page != PAGE:\n", "    if False:\n", INCREMENTS + "a_placed_section_that_makes_no_sense_loads_nothing"),
    ("machine/placed.py", "a short table is taken", "    if len(data) != 4 * pages_of(size):\n", "    if False:\n", INCREMENTS + "a_placed_section_that_makes_no_sense_loads_nothing"),
    ("machine/placed.py", "pages past the end are looked for", "    if placed.position + placed.size > source.size:\n", "    if False:\n", INCREMENTS + "pages_past_the_end_are_none_even_where_all_is_zeroes"),
    # -- increments --
    ("machine/increment.py", "a base is known by its place", "if lineage is not None and lineage.uuid == base.lineage.uuid:", "if lineage is not None:", INCREMENTS + "another_machines_snapshot_is_not_shared_with"),
    ("machine/increment.py", "a base with another name is lost", "                        return other\n        return None\n", "                        return None\n        return None\n", INCREMENTS + "a_renamed_base_is_found_by_its_uuid"),
    ("machine/increment.py", "trackers are trusted after all", "        self._trusted = False\n\n\nclass", "        pass\n\n\nclass", INCREMENTS + "all_is_written_if_there_is_nothing_to_share_with"),
    ("machine/increment.py", "a whole save trusts the tracker", '                changed[name] = b"\\1" * len(found)\n', "                pass\n", INCREMENTS + "all_is_written_if_there_is_nothing_to_share_with"),
    ("machine/increment.py", "zeroes are written", "        runs = zeroes if nothing.startswith(contents) else data\n", "        runs = data\n", INCREMENTS + "pages_of_zeroes_are_zero_clusters"),
    ("machine/increment.py", "zeroes are left as they were", "            draft.write_zeroes(_clusters(zeroes, position, draft.cluster_size))\n", "", INCREMENTS + "pages_of_zeroes_are_zero_clusters"),
    ("machine/increment.py", "a long stream runs into RAM", "        if len(stream) > kept.reserve:\n            return None\n", "", INCREMENTS + "a_component_that_grows_gets_more_room"),
    ("machine/increment.py", "the trackers hear nothing", "            self._trackers[name].settle(ram, pending.changed[name])\n", "            pass\n", INCREMENTS + "only_dirty_pages_are_written"),
    ("machine/increment.py", "after loading the trackers hear nothing", "            self._trackers[name].settle(ram, None)\n", "            pass\n", INCREMENTS + "what_was_loaded_is_what_the_next_one_shares_with"),
    ("machine/increment.py", "places that overlap are shared with", "        if ram.position % cluster or ram.position < end:\n", "        if False:\n", INCREMENTS + "places_that_overlap_are_not_shared_with"),
    ("machine/increment.py", "checksums of the base change", "name: replace(old, checksums=old.checksums[:])", "name: replace(old)", INCREMENTS + "a_save_that_failed_changes_no_checksum"),
    ("machine/increment.py", "a tracker that was interrupted is believed", "        self._trusted = False\n        self._base = replace", "        self._base = replace", INCREMENTS + "a_tracker_that_was_interrupted_is_not_believed"),
    ("machine/increment.py", "a tracker that was interrupted while loading is believed", "        self._base, self._trusted = None, False\n", "        self._base, self._trusted = None, True\n", INCREMENTS + "a_tracker_that_was_interrupted_is_not_believed"),
    ("machine/snapshots.py", "a refcount at its limit refuses the save", '                if error.field != "refcount" or pending.figures.whole:\n', "                if True:\n", INCREMENTS + "all_is_written_where_a_refcount_has_reached_its_limit"),
    ("machine/state.py", "RAM is read twice", "                    checked[name] = contents\n", "                    pass\n", "machine/test_cost.py::test_ram_is_read_once"),
    ("qcow2/vmstate.py", "gaps are not read", "            if not 0 <= gap <= _BRIDGED or", "            if gap or", "machine/test_cost.py::test_pages_that_lie_scattered_are_read_in_rows"),
    ("qcow2/snapshots.py", "all is collected again", "        with metadata.exclusive(settled=False, told=True), ExitStack() as undo:\n", "        with metadata.exclusive(settled=False), ExitStack() as undo:\n", "machine/test_cost.py::test_it_takes_no_more_steps_in_an_image_with_many"),
    # -- lineage --
    ("machine/lineage.py", "the parent is not the nearest ancestor", "(self.uuid, *self.ancestors)[:MAX_ANCESTORS]", "(*self.ancestors, self.uuid)[-MAX_ANCESTORS:]", BRANCHES + "snapshots_form_a_tree", BRANCHES + "a_deleted_parent_leaves_the_one_before_it"),
    ("machine/lineage.py", "lineages grow for ever", "(self.uuid, *self.ancestors)[:MAX_ANCESTORS]", "(self.uuid, *self.ancestors)", BRANCHES + "a_lineage_comes_back_and_stays_short"),
    ("machine/lineage.py", "a lineage cut short is taken", "    if len(data) <= _UUID or len(data) != _UUID + 1 + data[_UUID] * _UUID:\n", "    if not data:\n", BRANCHES + "a_lineage_of_another_length_is_refused"),
    # -- machine snapshots --
    ("machine/snapshots.py", "a draft that failed leaks", "                    pending.draft.close()\n", "                    pass\n", INCREMENTS + "a_save_that_failed_loses_no_dirty_page"),
    ("machine/snapshots.py", "a disk that failed leaves the others' snapshots", "            for disk in self._disks():\n                with _undoing(error):\n                    _delete(disk, name)\n            raise\n", "            raise\n", MACHINE + "a_disk_that_fails_to_save_undoes_the_others"),
    ("machine/snapshots.py", "the state comes before the disks", "                disk.snapshots.create(name, **times)\n", "                pass\n", MACHINE + "the_machine_and_its_disks_go_back_together"),
    ("machine/snapshots.py", "the running disk gets RAM", "        last_disk.snapshots.apply(last_snapshot, vm_state=False)\n", "        last_disk.snapshots.apply(last_snapshot)\n", MACHINE + "only_snapshots_hold_ram"),
    ("machine/snapshots.py", "disks go back one by one", "            with _undoing(error):\n                disk.snapshots.apply(way_back, vm_state=False)\n", "            pass\n", MACHINE + "a_disk_that_fails_to_go_back_leaves_all_as_they_were"),
    ("machine/snapshots.py", "a name is taken twice", '                raise ValueError(f"Snapshot', '                str(f"Snapshot', MACHINE + "a_name_is_taken_once"),
    ("machine/snapshots.py", "snapshots of disks alone are loaded", "        if not snapshot.vm_state_size:\n", "        if False:\n", MACHINE + "a_snapshot_of_disks_alone_is_not_loaded"),
    ("machine/snapshots.py", "what lacks a disk is listed", "            and all(_find(disk, snapshot.name) is not None for disk in self._others)\n", "", MACHINE + "only_what_can_be_loaded_is_listed"),
    ("machine/snapshots.py", "a way back that was left is in the way", "            _delete(disk, _WAY_BACK)  # left by a cut\n", "", CUTS + "a_cut_between_two_images_leaves_whole_machine_snapshots", MACHINE + "a_way_back_that_a_cut_left_is_replaced"),
    # -- the stream --
    ("machine/stream.py", "a section comes twice", "            if section.name in self.sections:\n", "            if False:\n", STREAM + "a_section_twice_is_refused"),
    ("machine/stream.py", "payloads are not checked", "        if _CHECKSUM.unpack(self._take(_CHECKSUM.size)) != (checksum,):\n", "        self._take(_CHECKSUM.size)\n        if False:\n", STREAM + "every_flipped_byte_is_noticed_and_nothing_is_loaded"),
    ("machine/stream.py", "newer sections are taken", "        if version > what.version:\n", "        if False:\n", STREAM + "a_newer_section_is_refused_by_name"),
    ("machine/stream.py", "newer streams are taken", "        if version > VERSION:\n", "        if False:\n", STREAM + "a_newer_stream_is_refused"),
    ("machine/stream.py", "any length is read", "        if length > what.max_length:\n", "        if False:\n", STREAM + "a_payload_longer_than_there_is_use_for_is_not_read"),
    ("machine/state.py", "what is missing stays as it is", "            if name not in reader.sections and name != LINEAGE:\n", "            if False:\n", STREAM + "a_missing_section_is_named"),
    ("machine/state.py", "what is left of a component is ignored", "            stream.end()\n", "            pass\n", STREAM + "a_section_that_makes_no_sense_loads_nothing"),
    ("machine/ram.py", "pages that are none are taken", "    if spare or reader", "    if reader", STREAM + "a_section_that_makes_no_sense_loads_nothing"),
    # -- forks --
    ("machine/fork.py", "any snapshot of the base will do", "(snapshot.id, snapshot.name, (snapshot.date_sec, snapshot.date_nsec)) == identity:", "snapshot:", BRANCHES + "a_fork_is_not_opened_as_something_else"),
    ("machine/fork.py", "the base stays open", "closed=base.close)", "closed=id)", BRANCHES + "a_fork_is_not_opened_as_something_else"),
    # -- VM state aside --
    ("qcow2/aside.py", "fresh clusters are counted twice", "        taken = [(first, self._references.take_run(first, count)) for first, count in self._fresh]\n", "        taken: list[tuple[int, list[array[int]]]] = []\n", ASIDE + "a_draft_has_what_its_base_has_and_what_was_written"),
    ("qcow2/aside.py", "what was written over leaks", "        self._free_orphans()\n", "", ASIDE + "what_is_written_twice_leaves_nothing_of_the_first"),
    ("qcow2/aside.py", "the base's references stay", "            self._references.remove_entries((old,))\n", "            pass\n", ASIDE + "a_draft_has_what_its_base_has_and_what_was_written"),
    ("qcow2/aside.py", "a table that changes counts in its old place", "                self._references.remove_clusters([offset >> metadata.cluster_bits])\n", "", ASIDE + "a_draft_has_what_its_base_has_and_what_was_written"),
    ("qcow2/aside.py", "zeroes are no clusters at all", "        entry = (layout.ZERO, 0) if", "        entry = (0, 0) if", ASIDE + "zeroes_hide_a_longer_backing_file"),
    ("qcow2/aside.py", "any number shares a host cluster", "        if places and len(packed) <= room:\n", "        if len(packed) <= room:\n", ASIDE + "few_compressed_clusters_share_a_host_cluster"),
    ("qcow2/aside.py", "a draft given up leaks", "                    metadata.lower(*part, DiscardKind.OTHER)\n", "                    pass\n", ASIDE + "a_draft_given_up_leaves_nothing"),
    ("qcow2/driver.py", "a draft outlives its image", "                        self.snapshots.give_up_drafts()\n", "", ASIDE + "a_draft_that_is_open_when_the_image_is_closed_leaves_nothing"),
    ("qcow2/aside.py", "compressed clusters are not encrypted", "        if self._metadata.header.crypt_method is not layout.CryptMethod.NONE:\n", "        if False:\n", ASIDE + "compressed_clusters_of_an_encrypted_image_are_refused"),
    ("qcow2/aside.py", "a draft outlives a repair", "        if self.closed or self._metadata.refcounts is not self._refcounts:\n", "        if self.closed:\n", ASIDE + "a_draft_does_not_outlive_a_repair"),
    ("qcow2/aside.py", "the tail of a cluster is not written", "                    views.append(memoryview(bytes(-len(part) % size)))\n", "                    pass\n", ASIDE + "another_process_finds_it", ASIDE + "a_draft_has_what_its_base_has_and_what_was_written"),
    ("qcow2/reference_vector.py", "what was raised stays raised", "            take_off()\n            raise\n", "            raise\n", ASIDE + "a_vector_is_raised_whole_or_not_at_all"),
    ("qcow2/known_references.py", "changed tables count as they were", "                _exchange(references, known[1], table)\n", "                pass\n", "machine/test_sequences.py"),
    ("qcow2/known_references.py", "a table that moved counts in its old place", "                references.add_clusters([offset >> bits])\n                _exchange", "                references.add_clusters([known[0] >> bits])\n                _exchange", "machine/test_sequences.py"),
    ("qcow2/refcount_codec.py", "refcounts run over", "        if passed & _top_bits(len(deltas), self.order):\n", "        if False:\n", ASIDE + "packed_refcounts_add_up_or_nothing_changes"),
    ("qcow2/snapshots.py", "bases of other sizes are shared with", "        if geometry.l1_entries(base.disk_size) != geometry.l1_entries(metadata.header.size):\n", "        if False:\n", ASIDE + "a_base_of_another_size_is_not_shared"),
    ("qcow2/snapshots.py", "a base counts as the refcounts were laid out", "            or known.references.refcounts is not metadata.refcounts  # counted for another layout\n", "", ASIDE + "a_base_is_counted_anew_where_refcounts_have_another_width"),
    ("qcow2/snapshots.py", "a draft outlives its base", "            if base is not None and (snapshot is None or _is_same(base, snapshot)):\n", "            if False:\n", ASIDE + "a_draft_does_not_outlive_its_base"),
    ("qcow2/aside.py", "a draft is not the snapshot's", "        self.closed = True  # from here on it is the snapshot's, or that of ``undo``\n", "", ASIDE + "a_draft_is_the_snapshots_from_the_moment_that_it_is_listed"),
    ("qcow2/aside.py", "narrow refcounts are shared too often", "1 if narrow else MAX_SHARING", "MAX_SHARING", INCREMENTS + "all_is_written_where_a_refcount_has_reached_its_limit"),
    ("qcow2/reference_vector.py", "slices without a count stay", "                    del self._slices[number]\n                    continue\n", "                    pass\n", ASIDE + "slices_that_nothing_refers_to_any_more_are_forgotten"),
    ("qcow2/snapshots.py", "going back brings RAM", "                del target[needed:]\n", "                pass\n", ASIDE + "going_back_brings_no_vm_state_unless_asked"),
    ("qcow2/snapshots.py", "what is the same is switched to", "        if size == header.size and not any(coming) and not any(going):\n            return\n", "", ASIDE + "going_back_to_where_one_is_writes_nothing"),
    ("qcow2/snapshot_view.py", "a view does not decrypt", "        self._metadata.encryption = image.encryption\n", "", ASIDE + "a_draft_has_what_its_base_has_and_what_was_written"),
]
