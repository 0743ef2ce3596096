"""Command lines on top of the library: ``img`` and ``io`` speak qemu-img's and qemu-io's language.

What several of them need stands here beside the packages: command lines, sizes, messages. Nothing
heavy is imported before it is needed: scripts start these programs thousands of times.
"""
