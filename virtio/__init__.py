"""The device: virtio-blk on virtqueues, and the transports it is reached through."""
