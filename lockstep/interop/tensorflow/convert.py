"""`tf2onnx.convert` with a bound on memory, in an interpreter that has it. Run as a script; it imports nothing of Lockstep, for
the interpreter may not have it.

    convert.py BYTES ARGUMENTS...       what `python -m tf2onnx.convert ARGUMENTS` does; BYTES are the size of what it reads
"""

from __future__ import annotations

import os
import sys

FREE_BYTES = 768 << 20
"""Memory that any conversion may take beside what TensorFlow took when it was imported."""
BYTES_A_BYTE = 16
"""And as much for each byte of the network: the converter copies it several times."""
BYTES_A_CPU = 64 << 20
"""And for each processor, whose threads have stacks."""


def bound_memory(num_bytes: int) -> None:
    """From here on no more than that can be had: a damaged graph asks for a terabyte and gets an error. Linux alone."""
    try:
        import resource

        with open("/proc/self/status", encoding="ascii") as file:
            taken = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData:"))
    except (ImportError, OSError, StopIteration):
        return
    limit = taken + FREE_BYTES + BYTES_A_BYTE * num_bytes + BYTES_A_CPU * (os.cpu_count() or 1)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


def convert(arguments: list[str]) -> None:
    """Convert, in this process."""
    import tf2onnx.convert

    bound_memory(int(arguments[0]))
    sys.argv = ["tf2onnx.convert", *arguments[1:]]
    tf2onnx.convert.main()


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules are none of the interpreter's
    convert(sys.argv[1:])
