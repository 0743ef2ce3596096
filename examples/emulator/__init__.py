"""A RISC-V board in Python with a disk in it: Unicorn is the CPU, everything around it is here.

Run it with ``python -m examples.emulator --help``. To read it, start at :mod:`.board`, which puts
the parts together; each part is one small file that could be moved to another emulator.
"""
