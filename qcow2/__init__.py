"""The format: a qcow2 driver that reads and writes."""
