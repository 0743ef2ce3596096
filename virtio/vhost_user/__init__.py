"""Virtio over a UNIX socket: the back-end's side of vhost-user, for QEMU and any other front-end.

:class:`.server.VhostUserServer` offers a device on a socket; the front-end's side, for tests, is
in :mod:`..driver`. Modules have the names of the protocol's chapters.
"""
