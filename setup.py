"""Builds the C++ kernels: one source set, one shared library per instruction set, loaded through ctypes.

The libraries are optional. Without a compiler, or on a system where they do not build, the package installs and runs on
its naive kernels.

A wheel holds every level. An editable install, which stays on its machine, builds the portable level and the one that
this processor takes; `python setup.py build_ext --inplace` builds all that it runs, for the tests judge each.
`make test-emulated` builds the AVX-512 levels for a processor without, see tests/kernels/emulated.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

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
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
LEVELS: dict[str, list[str]] = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"]}
# What `ls_cpu_level` of csrc/cpu.cpp asks the processor, in the words of /proc/cpuinfo.
AVX512_NEEDS = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
NEEDS = {
    "avx2": ("avx2", "fma"),
    "avx512": AVX512_NEEDS,
    "avx512bf16": (*AVX512_NEEDS, "avx512_bf16", "avx512_vnni"),
}
# AVX-512 in SIMDe's functions, slow and for tests alone. Unrolled they would take minutes a file. The macros are what the
# compiler defines for the level's own flags; `ls_cpu_level` finds whatever it asks for.
EMULATED = [*AVX2, "-O1", "-w", "-I", str(ROOT / "tests" / "kernels" / "emulated"), "-D__builtin_cpu_supports(name)=1"]
EMULATED += [f"-fdisable-{name}" for name in ("tree-cunroll", "tree-cunrolli", "rtl-loop2_unroll")]
AVX512_MACROS = ["-D__AVX512F__", "-D__AVX512BW__", "-D__AVX512DQ__", "-D__AVX512VL__"]
EMULATED_LEVELS = {
    "portable": ["-D__builtin_cpu_supports(name)=1"],
    "avx2": AVX2,
    "avx512": [*EMULATED, *AVX512_MACROS],
    "avx512bf16": [*EMULATED, *AVX512_MACROS, "-D__AVX512VNNI__", "-D__AVX512BF16__"],
}


def interface() -> int:
    """Tells what the functions take; `lockstep.kernels.native` asks the sources that it lies beside the same."""
    return zlib.crc32(b"".join((ROOT / name).read_bytes() for name in HEADERS)) & 0x7FFFFFFF


def compiler() -> str | None:
    """The first C++ compiler found: $CXX, then the usual names."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def levels_of_this_machine() -> list[str]:
    """The levels that this processor runs, the lowest first; all of them where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return list(LEVELS)
    flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
    return [level for level in LEVELS if flags.issuperset(NEEDS.get(level, ()))]


class BuildKernels(build_ext):
    """Compiles every level into `lockstep/kernels/_native`, in the source tree for an editable install."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("simde=", None, "folder of SIMDe's headers: emulates AVX-512 for tests (needs GCC and AVX2)"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.simde: str | None = None

    def run(self) -> None:
        cxx = compiler()
        if cxx is None:
            print("lockstep: no C++ compiler found; installing without compiled kernels", file=sys.stderr)
            return
        folder = Path(self._folder())
        folder.mkdir(parents=True, exist_ok=True)
        objects = ROOT / "build" / ("emulated" if self.simde else "native")
        # The longest first, so that no core waits for another's last file.
        by_size = sorted(SOURCES, key=lambda name: -(ROOT / name).stat().st_size)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            compiled = {
                level: [pool.submit(self._compile, cxx, level, source, objects / level) for source in by_size]
                for level in self._levels()
            }
            for level, parts in compiled.items():
                self._link(cxx, level, [part.result() for part in parts], folder)

    def _levels(self) -> list[str]:
        if not (self.editable_mode or self.inplace):
            return list(LEVELS)
        runs = levels_of_this_machine()
        return runs if not self.editable_mode else list(dict.fromkeys(["portable", runs[-1]]))

    def _folder(self) -> str:
        in_tree = self.inplace or self.editable_mode
        return str((ROOT if in_tree else Path(self.build_lib)) / "lockstep" / "kernels" / "_native")

    def _compile(self, cxx: str, level: str, source: str, folder: Path) -> Path | None:
        """The object of a source, made anew if the source, a header or this file is newer; None: it did not compile."""
        defines = [f"-DLS_INTERFACE={interface()}"] if Path(source).name == "cpu.cpp" else []
        # By the interface's number: a header that went away leaves no newer file behind.
        target = folder / f"{'-'.join([Path(source).stem, *(define.split('=')[1] for define in defines)])}.o"
        newest = max((ROOT / name).stat().st_mtime for name in (source, *HEADERS, "setup.py"))
        if target.exists() and target.stat().st_mtime > newest:
            return target
        folder.mkdir(parents=True, exist_ok=True)
        flags = [*EMULATED_LEVELS[level], "-I", self.simde] if self.simde else LEVELS[level]
        command = [cxx, *FLAGS, *flags, *defines, "-c", source, "-o"]
        return target if self._run(command, target, f"{source} of the {level} kernels did not compile") else None

    def _link(self, cxx: str, level: str, objects: list[Path | None], folder: Path) -> None:
        target = folder / f"liblockstep_{level}.so"
        parts = [part for part in objects if part is not None]
        if len(parts) < len(objects):
            return
        if target.exists() and target.stat().st_mtime > max(part.stat().st_mtime for part in parts):
            return
        command = [cxx, *FLAGS, "-shared", *map(str, parts), "-o"]
        self._run(command, target, f"the {level} kernels did not link")

    def _run(self, command: list[str], target: Path, failure: str) -> bool:
        # Written aside and renamed, so that a running process keeps the file it has mapped.
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        result = subprocess.run([*command, str(partial)], cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            partial.unlink(missing_ok=True)
            print(f"lockstep: {failure}:\n{result.stderr[-2000:]}", file=sys.stderr)
            return False
        partial.replace(target)
        return True

    def get_outputs(self) -> list[str]:
        return [str(Path(self._folder()) / f"liblockstep_{level}.so") for level in self._levels()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("lockstep.kernels._native", sources=SOURCES, depends=HEADERS)],
    cmdclass={"build_ext": BuildKernels},
)
