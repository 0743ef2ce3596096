"""Tests for anybody's virtio block device, by the rules of virtio 1.4.

    pytest --pyargs pyvirtio.virtio.conformance --device vhost-user:/path.sock
    pytest --pyargs pyvirtio.virtio.conformance --device my_emulator.tests:make_device

Each test names the requirements that it shows. A run ends with a matrix of all requirements on
devices: passed, failed, not testable (and why), not reached (and why); ``--matrix PREFIX`` writes
it to PREFIX.txt, PREFIX.json and PREFIX.html. ``--requirement ID`` runs what shows one of them.

The second form calls ``make_device(**wishes)``, which gives a :class:`~.device.DeviceUnderTest`
with a disk of at least 1 MiB whose content is nobody's: it is written to. ``wishes`` are only those
that the function has parameters for, see :data:`~.device.WISHES`.
"""
