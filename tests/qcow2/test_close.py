"""Closing an image."""

from __future__ import annotations

import pyvirtio


def test_second_close_does_nothing(tmp_path):
    disk = pyvirtio.create_disk(tmp_path / "image.qcow2", 1 << 20)
    disk.close()
    disk.close()
    assert disk.closed


def test_overlay_closes_over_a_base_that_is_closed_already(tmp_path):
    base = pyvirtio.create_disk(tmp_path / "base.qcow2", 1 << 20)
    overlay = pyvirtio.create_disk(
        tmp_path / "overlay.qcow2",
        1 << 20,
        backing_file="base.qcow2",
        backing_fmt="qcow2",
        backing=lambda reference: base,
    )
    base.close()
    overlay.close()
    assert overlay.closed
