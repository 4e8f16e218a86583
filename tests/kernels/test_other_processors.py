"""The kernels of processors that this one is not: they cannot run here, and they are still C++ that compiles."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module: what it would build, without building it."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("lockstep_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_install_builds_what_this_processor_runs(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(flags: str) -> list[str]:
        monkeypatch.setattr(Path, "read_text", lambda _: f"processor : 0\nflags : {flags}\n")
        return build.levels_of_this_machine()

    assert says("sse sse2") == ["portable"]
    assert says("avx2 fma f16c") == ["portable", "avx2"]
    wide = "avx2 fma avx512f avx512bw avx512dq avx512vl"
    assert says(wide) == ["portable", "avx2", "avx512"]
    assert says(f"{wide} avx512_bf16 avx512_vnni") == list(build.LEVELS)


@pytest.mark.slow
def test_the_widest_level_compiles_where_it_cannot_run(build: ModuleType) -> None:
    compiler, widest = build.compiler(), list(build.LEVELS)[-1]
    if compiler is None or widest in build.levels_of_this_machine():
        pytest.skip("no compiler, or the level is built and judged here")
    command = [compiler, *build.FLAGS, *build.LEVELS[widest], "-fsyntax-only", *build.SOURCES]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
