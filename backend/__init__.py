"""The ground: the Disk interface, the files and memories under it, and opening by name."""
