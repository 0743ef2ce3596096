"""The machine as a whole: its state in a stream, and snapshots of it with its disks."""
