"""Freed memory stays with a process that trains: another step of the same sizes asks the system for none."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
from lockstep.kernels.memory import keep_memory
import torch
if sys.argv[1] == "keep":
    assert keep_memory()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(1 << 20) for _ in range(8)]  # 8 blocks of 4 MB
    del held
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such setting")
def test_a_step_of_the_same_sizes_takes_no_new_pages() -> None:
    # The C library's own first threshold, fixed: left free it grows with the blocks it meets, and what it gives back is chance.
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    faults = {}
    for wish in ("keep", "default"):
        done = subprocess.run(
            [sys.executable, "-c", STEPS, wish], capture_output=True, text=True, timeout=120, check=True, env=fixed
        )
        faults[wish] = int(done.stdout)
    assert faults["keep"] < 200 < faults["default"]
