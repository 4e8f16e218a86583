"""Builds the C++ kernels: one source set, one shared library per instruction set, loaded through ctypes.

The libraries are optional. Without a compiler, or on a system where they do not build, the package installs and runs on
its naive kernels.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h"))

# Contraction off: a multiply-add is fused only where the source says so, which is what keeps kernels bit-equal.
FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
LEVELS: dict[str, list[str]] = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"]}


def compiler() -> str | None:
    """The first C++ compiler found: $CXX, then the usual names."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


class BuildKernels(build_ext):
    """Compiles every level into `lockstep/kernels/_native`, in the source tree for an editable install."""

    def run(self) -> None:
        cxx = compiler()
        if cxx is None:
            print("lockstep: no C++ compiler found; installing without compiled kernels", file=sys.stderr)
            return
        folder = Path(self._folder())
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for level in LEVELS:
                self._build(cxx, level, folder, pool)

    def _folder(self) -> str:
        in_tree = self.inplace or self.editable_mode
        return str((ROOT if in_tree else Path(self.build_lib)) / "lockstep" / "kernels" / "_native")

    def _build(self, cxx: str, level: str, folder: Path, pool: ThreadPoolExecutor) -> None:
        target = folder / f"liblockstep_{level}.so"
        headers = max((ROOT / name).stat().st_mtime for name in (*HEADERS, "setup.py"))
        newest = max(headers, *((ROOT / name).stat().st_mtime for name in SOURCES))
        if target.exists() and target.stat().st_mtime > newest:
            return
        # Object files are kept: a change in one source costs one compilation a level.
        kept = ROOT / "build" / "native" / level
        kept.mkdir(parents=True, exist_ok=True)

        def compiled(source: str) -> str:
            after = max(headers, (ROOT / source).stat().st_mtime)
            return self._output(cxx, [*FLAGS, *LEVELS[level], "-c", source], kept / f"{Path(source).stem}.o", after)

        objects = list(pool.map(compiled, SOURCES))
        errors = [found for found in objects if found]
        if not errors:
            names = [str(kept / f"{Path(source).stem}.o") for source in SOURCES]
            errors = [found for found in [self._output(cxx, [*FLAGS, "-shared", *names], target, newest)] if found]
        if errors:
            print(f"lockstep: the {level} kernels did not build:\n{errors[0][-2000:]}", file=sys.stderr)

    def _output(self, cxx: str, arguments: list[str], target: Path, after: float) -> str:
        """Makes `target` if it is older than `after`; returns the compiler's complaint, if that failed."""
        if target.exists() and target.stat().st_mtime > after:
            return ""
        # Written aside and renamed, so that a running process keeps the file it has mapped.
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        command = [cxx, *arguments, "-o", str(partial)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            partial.unlink(missing_ok=True)
            return result.stderr or f"{cxx} ended with {result.returncode}"
        partial.replace(target)
        return ""

    def get_outputs(self) -> list[str]:
        return [str(Path(self._folder()) / f"liblockstep_{level}.so") for level in LEVELS]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("lockstep.kernels._native", sources=SOURCES, depends=HEADERS)],
    cmdclass={"build_ext": BuildKernels},
)
