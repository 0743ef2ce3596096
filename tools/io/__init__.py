"""``pyvirtio-io``: qemu-io's commands, output and exit codes."""
