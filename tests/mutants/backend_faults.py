"""Faults in ``backend/``: (file, what goes wrong, old, new, test, …)."""
# One line each: a table.
# ruff: noqa: E501
# fmt: off

DISK = "backend/test_disk.py::test_"
FILE = "backend/test_file.py::test_"
RAW = "backend/test_raw.py::test_"
OPEN = "backend/test_open.py::test_"
LOCKS = "backend/test_locks.py::test_"
DIRECT = "backend/test_direct.py::test_"
BUFFERS = "backend/test_buffers.py::test_"

BACKEND: list[tuple[str, ...]] = [
    # -- buffers --
    ("backend/buffers.py", "parts begin at a wrong byte", "        piece = view[start : start + length]\n", "        piece = view[:length]\n", BUFFERS + "a_part_of_several_buffers"),
    ("backend/buffers.py", "parts go on for too long", "        length -= len(piece)\n", "        length -= 0\n", BUFFERS + "a_part_of_several_buffers"),
    ("backend/buffers.py", "later buffers begin inside, too", "        length -= len(piece)\n        start = 0\n", "        length -= len(piece)\n", BUFFERS + "a_part_of_several_buffers"),
    ("backend/buffers.py", "a buffer that is skipped does not count", "            start -= size\n", "            pass\n", BUFFERS + "a_part_of_several_buffers"),
    ("backend/buffers.py", "one buffer is not cut", "return [view] if len(view) == length else [view[:length]]", "return [view]", BUFFERS + "a_part_of_one_buffer"),
    ("backend/buffers.py", "scattering repeats the beginning", "        start = end\n\n\ndef clear", "        pass\n\n\ndef clear", BUFFERS + "scattering"),
    ("backend/buffers.py", "the end of a long buffer is not cleared", "part = min(len(_ZEROES), size - start)", "part = min(len(_ZEROES), size - start) // 2 * 2", BUFFERS + "clearing_buffers_of_any_length"),
    ("backend/buffers.py", "a buffer with holes is taken", "        elif not view.c_contiguous:\n", "        elif False:\n", BUFFERS + "a_buffer_with_holes_is_refused"),
    # -- disk --
    ("backend/disk.py", "reads past the end are not refused", "if self.closed or offset < 0 or offset + length > self.size:\n            self._refuse(offset, length)\n            views, length", "if self.closed or offset < 0 or offset > self.size:\n            self._refuse(offset, length)\n            views, length", DISK + "requests_outside_the_disk_are_refused"),
    ("backend/disk.py", "read-only disks are written", "if self.closed or self.read_only or offset < 0 or offset + length > self.size:\n            self._refuse(offset, length, writing=True)\n        if self.detect_zeroes", "if self.closed or offset < 0 or offset + length > self.size:\n            self._refuse(offset, length, writing=True)\n        if self.detect_zeroes", DISK + "writing_to_a_read_only_disk_is_eperm"),
    ("backend/disk.py", "what lies before the aligned part is not zeroed", "            self._write_zeroes_in_part(offset, head - offset, unmap)\n", "            pass\n", BUFFERS + "zeroes_cover_exactly_what_was_asked"),
    ("backend/disk.py", "what lies behind the aligned part is not zeroed", "            self._write_zeroes_in_part(tail, stop - tail, unmap)\n", "            pass\n", BUFFERS + "zeroes_cover_exactly_what_was_asked"),
    ("backend/disk.py", "a part inside one unit reaches past its end", "        head = min(start, stop)\n", "        head = start\n", BUFFERS + "zeroes_cover_exactly_what_was_asked"),
    ("backend/disk.py", "alignment reaches backwards", "start = -(-offset // alignment) * alignment", "start = offset // alignment * alignment", BUFFERS + "zeroes_cover_exactly_what_was_asked"),
    ("backend/disk.py", "alignment reaches forwards", "            end = end // alignment * alignment\n", "            end = -(-end // alignment) * alignment\n", BUFFERS + "zeroes_cover_exactly_what_was_asked"),
    ("backend/disk.py", "the end of the disk is not aligned", "        if end != self.size:\n", "        if True:\n", BUFFERS + "a_discard_may_end_with_the_disk"),
    ("backend/disk.py", "shrinking need not be asked for", "if size < self.size and not shrink:", "if False:", DISK + "shrinking_must_be_asked_for"),
    ("backend/disk.py", "listeners are not told", "                listener(size)\n", "                pass\n", DISK + "resize_listeners_are_told_until_they_stop"),
    ("backend/disk.py", "closed disks are used", '        if self.closed:\n            raise ValueError(f"{self.format_name}: the disk is closed")', '        if False:\n            raise ValueError(f"{self.format_name}: the disk is closed")', DISK + "a_closed_disk_refuses_everything"),
    ("backend/disk.py", "growable disks take any offset", "and offset + length <= _MAX_SIZE:", "and offset + length <= 1 << 65:", DISK + "growable_disk_still_refuses_negative_and_absurd_offsets"),
    ("backend/disk.py", "past the end of a growable disk buffers keep what they held", "        clear(split(views, inside, length - inside))\n", "", DISK + "growable_disk_reads_zeroes_past_its_end", FILE + "a_growable_file_grows_by_writes_and_zeroes", BUFFERS + "past_the_end_of_a_growable_disk_buffers_are_cleared"),
    # -- memory, null --
    ("backend/memory.py", "what was cut off comes back", "                self._data[size : self.size] = bytes(self.size - size)\n", "                pass\n", DISK + "what_a_memory_disk_lost_by_shrinking_does_not_come_back"),
    ("backend/memory.py", "the caller's buffer is not let go", "            self._data.release()", "            pass", DISK + "a_closed_memory_disk_lets_the_callers_memory_go"),
    ("backend/memory.py", "a read-only buffer is taken for writing", "if self._data.readonly and not read_only:", "if False:", DISK + "a_memory_disk_needs_a_writable_buffer_unless_read_only"),
    ("backend/memory.py", "no memory is no typed error", "except (MemoryError, OverflowError) as error:", "except ZeroDivisionError as error:", DISK + "growth_without_memory_is_a_backend_error"),
    ("backend/null.py", "zeroes are not read when asked for", "        if self.read_zeroes:\n", "        if not self.read_zeroes:\n", DISK + "null_disk_reads_zeroes_only_if_asked"),
    # -- transfer --
    ("backend/transfer.py", "a short write is taken for a whole one", "    while done < length:\n        put", "    while False:\n        put", FILE + "short_transfers_are_continued"),
    ("backend/transfer.py", "a short read is taken for a whole one", "    while 0 < done < length:", "    while False:", FILE + "short_transfers_are_continued"),
    ("backend/transfer.py", "a write without progress goes on for ever", "        if not put:\n            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n", "        if not put:\n            raise OSError(errno.EIO, os.strerror(errno.EIO))\n", FILE + "a_write_that_makes_no_progress_is_enospc"),
    ("backend/transfer.py", "more buffers than the system takes", "views[:_IOV_MAX], offset)\n    while 0", "views, offset)\n    while 0", FILE + "more_views_than_one_system_call_takes"),
    ("backend/transfer.py", "empty buffers look like the end of the file", "        views = [view for view in views if len(view)]  # else a batch of empty ones looks like EOF\n", "        pass\n", FILE + "many_empty_buffers_do_not_look_like_the_end_of_the_file"),
    # -- file --
    ("backend/file.py", "the straight way forgets FUA", "                and not fua\n", "", FILE + "fua_and_flush_reach_fdatasync"),
    ("backend/file.py", "flushes succeed after one has failed", "                self._cache_lost = failure\n", "                pass\n", FILE + "after_a_failed_flush_all_flushes_fail_until_reopened"),
    ("backend/file.py", "a reopened file still fails to flush", "        self._cache_lost = None\n        self._unflushed = True\n        self._aim()", "        self._unflushed = True\n        self._aim()", FILE + "after_a_failed_flush_all_flushes_fail_until_reopened"),
    ("backend/file.py", "cache=unsafe flushes", '        if self._cache == "unsafe":\n            return\n', "", FILE + "cache_unsafe_does_not_flush"),
    ("backend/file.py", "discards that are to be ignored are done", '        if self.discard_mode == "ignore":\n            return\n', "", FILE + "discard_gives_space_back_unless_ignored"),
    ("backend/file.py", "zeroes past the end do not make the file longer", 'self._writev(offset + length - 1, [memoryview(b"\\0")], 1)', "pass", FILE + "a_growable_file_grows_by_writes_and_zeroes"),
    ("backend/file.py", "preallocation cuts a file", 'if preallocation != "off" and size < old:', "if False:", FILE + "preallocation_when_shrinking_is_refused"),
    ("backend/file.py", "pipes and sockets are opened", "        return True\n    number = errno.EISDIR", "        return True\n    return False\n    number = errno.EISDIR", FILE + "pipes_sockets_and_character_devices_are_refused"),
    ("backend/file.py", "a size that others changed is not seen", "        self._set_size(os.lseek(self._fd, 0, os.SEEK_END))\n", "        pass\n", FILE + "invalidate_sees_a_size_that_others_changed"),
    # -- space --
    ("backend/space.py", "punching a hole cuts the file", "_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE", "_PUNCH = FALLOC_FL_PUNCH_HOLE", FILE + "discard_gives_space_back_unless_ignored"),
    ("backend/space.py", "what the file system refuses is asked again", "            self._refused.add(what)\n            return False\n", "            return False\n", FILE + "what_the_file_system_refuses_is_not_tried_again"),
    ("backend/space.py", "a failure counts as not possible", "            if error.errno not in _NOT_THERE:\n                raise\n", "", FILE + "write_zeroes_that_fails_is_an_error"),
    ("backend/space.py", "a hole is data", "                return Run(False, min(start, size))\n", "                return Run(True, min(start, size))\n", FILE + "block_status_tells_holes_from_data"),
    ("backend/space.py", "the hole at the end is data", "                return Run(False, size)\n            self", "                return Run(True, size)\n            self", FILE + "block_status_tells_holes_from_data"),
    # -- locks --
    ("backend/locks.py", "QEMU's locks are on other bytes", "_UNSHARED_BASE = 200", "_UNSHARED_BASE = 300", LOCKS + "qemus_bytes_are_the_ones_locked"),
    ("backend/locks.py", "writers do not lock for writing", "        used |= Permission.WRITE | Permission.RESIZE\n", "        used |= Permission.RESIZE\n", LOCKS + "qemus_bytes_are_the_ones_locked"),
    ("backend/locks.py", "others may write meanwhile", "return used, Permission(0) if force_share else Permission.WRITE | Permission.RESIZE", "return used, Permission(0)", LOCKS + "two_opens_in_one_process"),
    ("backend/locks.py", "a refused change keeps what it took", "        except OSError:\n            self._hold(before)\n            raise\n", "        except OSError:\n            raise\n", LOCKS + "a_refused_change_gives_back_what_it_took"),
    ("backend/locks.py", "nobody is asked", "            self._check(used, unshared)\n", "", LOCKS + "two_opens_in_one_process"),
    ("backend/locks.py", "where locks are not supported nothing opens", "                return False\n            raise\n        return True\n", "                raise\n            raise\n        return True\n", LOCKS + "where_nothing_can_be_locked_nothing_is"),
    # -- raw --
    ("backend/raw.py", "a guarded disk takes a header", "        if any(kind.name != FORMAT.name and kind.probe(start) > 1 for kind in formats()):\n", "        if False:\n", RAW + "a_header_cannot_be_written"),
    ("backend/raw.py", "a header written in parts passes", "        header = bytearray(self.file.read(self.offset, min(PROBE_SIZE, self.size)))\n", "        header = bytearray(min(PROBE_SIZE, self.size))\n", RAW + "a_header_cannot_be_written_in_parts"),
    ("backend/raw.py", "what is checked is not what is written", "head = gather(split(views, 0, part))  # a copy: the guest may change its own", "head = split(views, 0, part)[0]", RAW + "what_is_checked_is_what_is_written"),
    ("backend/raw.py", "a file that ends inside a sector is cut", "return -(-(file.size - offset) // _SECTOR) * _SECTOR", "return (file.size - offset) // _SECTOR * _SECTOR", RAW + "a_file_that_ends_inside_a_sector_is_rounded_up"),
    ("backend/raw.py", "a window past the end of the file is taken", "    if size > file.size - offset:\n", "    if size > file.size:\n", RAW + "windows_that_are_none_are_refused_in_qemus_words"),
    ("backend/raw.py", "truncating forgets where the window begins", "self.file.truncate(self.offset + size, preallocation", "self.file.truncate(size, preallocation", RAW + "truncate_keeps_what_lies_before_the_window"),
    # -- open, registry --
    ("backend/blockdev.py", "raw by guess is not guarded", '            arguments["probed"] = True\n', "            pass\n", OPEN + "raw_by_guess_warns_and_is_guarded"),
    ("backend/node.py", "loops are not found", "    if identity in context.chain:\n", "    if False:\n", OPEN + "loops_are_found"),
    ("backend/blockdev.py", "chains have no limit", "        if len(context.chain) >= MAX_CHAIN:\n", "        if False:\n", OPEN + "chains_have_a_limit"),
    ("backend/node.py", "backing files are opened for writing", '                "read_only": True,\n', "", OPEN + "backing_files_are_read_only_and_the_image_is_not"),
    ("backend/blockdev.py", "the format named in the image is not used", '                given.setdefault("driver", reference.format)\n', "", OPEN + "the_format_named_in_the_image_is_used"),
    ("backend/references.py", "names are relative to where we are", "return os.path.join(os.path.dirname(reference.parent), name)", "return name", OPEN + "relative_names_are_relative_to_the_image"),
    ("backend/blockdev.py", "any protocol is a file", "    if prefix is None:\n", "    if True:\n", OPEN + "other_protocols_are_refused_by_name"),
    ("backend/blockdev.py", "the first format wins", "        if certainty > sure:\n", "        if best is None:\n", OPEN + "the_format_is_probed"),
    ("backend/open.py", "a failed creation destroys the old image", "            cleanup.callback(_unlink, new_name)\n            file = make(new_name)\n", "            cleanup.callback(_unlink, path)\n            file = make(new_name)\n", OPEN + "a_failed_creation_leaves_the_old_file_or_none"),
    ("backend/open.py", "a new image forgets the old one's mode", "        os.fchmod(fd, stat.S_IMODE(status.st_mode))\n", "", OPEN + "create_replaces_what_was_there_and_keeps_its_mode"),
    # -- direct --
    ("backend/direct.py", "neighbours in a block are undone", "                self._load(start, bounce[: self.alignment])\n", "                pass\n", DIRECT + "unaligned_requests_of_all_kinds"),
    ("backend/direct.py", "the file grows to whole blocks", "                os.ftruncate(self._fd, wanted)\n", "                pass\n", DIRECT + "the_file_ends_exactly_where_it_was_written_to"),
    ("backend/direct.py", "one who is alone is not", "                while self._alone or self._sharers:\n", "                while self._alone:\n", DIRECT + "a_shared_lock_is_shared_and_exclusive"),
]
