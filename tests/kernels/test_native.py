"""Loading: every build that this processor can run, the missing library, threads after a fork."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lockstep import kernels
from lockstep.core import env
from lockstep.core.errors import ConfigError
from lockstep.kernels import native

needs_library = pytest.mark.skipif(native.state.library is None, reason="no compiled kernels")


def runnable_levels() -> list[int]:
    return list(range(native.open_level(0).ls_cpu_level() + 1)) if native.state.library is not None else []


@pytest.fixture(params=runnable_levels(), ids=lambda level: native.LEVELS[level])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    before = native.state.library
    native.state.library = native.open_level(request.param)
    yield request.param
    native.state.library = before


def test_build_is_what_its_name_says(level: int) -> None:
    assert native.lib().ls_built_level() == level


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_level_equals_naive(level: int, dtype: str) -> None:
    weights = [torch.randn(5, 70, requires_grad=True), torch.randn(70, 7, requires_grad=True)]
    biases = [torch.randn(70, requires_grad=True), torch.randn(7, requires_grad=True)]
    x, noise = torch.randn(65, 5, requires_grad=True), torch.rand(65, 7)
    results = []
    for mode in ("auto", "naive"):
        with kernels.force(mode):
            y = kernels.mlp(x, weights, biases, "gelu", dtype=dtype)
            actions = torch.arange(65) % 7
            logprob, entropy = kernels.categorical_evaluate(y * 0.1, actions)
            grads = torch.autograd.grad((logprob * 2 + entropy).sum(), [x, *weights, *biases])
            drawn = kernels.squashed_gaussian_sample(y.detach() * 0.1, y.detach() * 0.01, noise)
            results.append([y, logprob, entropy, *grads, *drawn])
    for fast, slow in zip(*results, strict=True):
        scale = float(slow.detach().abs().max()) + 1e-6
        assert float((fast - slow).detach().abs().max()) <= (3e-5 if dtype == "fp32" else 2e-2) * scale


def test_every_level_is_batch_invariant(level: int) -> None:
    weights, biases = [torch.randn(33, 65), torch.randn(65, 3)], [torch.randn(65), torch.randn(3)]
    x = torch.randn(100, 33)
    for dtype in ("fp32", "bf16"):
        whole = kernels.mlp(x, weights, biases, "silu", dtype=dtype)
        parts = [kernels.mlp(p.clone(), weights, biases, "silu", dtype=dtype) for p in x.split([1, 7, 40, 52])]
        assert torch.equal(torch.cat(parts), whole)


def test_noise_is_the_same_on_every_level(level: int) -> None:
    stream = torch.arange(40)
    u = kernels.uniform(9, stream, stream, 5)
    with kernels.force("naive"):
        assert torch.equal(u, kernels.uniform(9, stream, stream, 5))


@needs_library
@pytest.mark.slow
def test_threads_survive_a_fork() -> None:
    code = """
import os, torch
from lockstep import kernels
torch.set_num_threads(1)
kernels.set_num_threads(2)
w, b, x = [torch.randn(256, 256)], [torch.randn(256)], torch.randn(500, 256)
before = kernels.mlp(x, w, b, "tanh")
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(kernels.mlp(x, w, b, "tanh"), before) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.slow
def test_without_a_library_the_naive_path_runs_and_one_warning_says_so(tmp_path: Path) -> None:
    """A copy of the package without its compiled folder, as it is installed where there is no compiler."""
    source = Path(native.__file__).parents[1]
    shutil.copytree(source, tmp_path / "lockstep", ignore=shutil.ignore_patterns("_native", "__pycache__"))
    code = (
        "import torch; from lockstep import kernels; x = torch.ones(2, 3); w = [torch.ones(3, 1)]\n"
        "for _ in range(2): y = kernels.mlp(x, w, None, 'tanh')\n"
        "info = kernels.describe(); print(kernels.__file__, info['level'], info['implementation'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env.child_environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout
    assert "none naive" in result.stdout
    assert result.stderr.count("naive kernels") == 1


def test_force_and_describe() -> None:
    with kernels.force("naive"):
        assert kernels.describe()["implementation"] == "naive"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.linear(torch.zeros(1, 2), torch.zeros(2, 1), None)
    with pytest.raises(ConfigError, match="did you mean 'naive'"), kernels.force("naiv"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ConfigError, match="at least 1"):
        kernels.set_num_threads(-1)
    before = kernels.num_threads()
    try:
        kernels.set_num_threads(0)
        assert kernels.num_threads() == (kernels.num_processors() if kernels.describe()["library"] else 1)
    finally:
        kernels.set_num_threads(before)
    assert set(kernels.describe()) >= {"level", "bf16", "num_threads", "library", "reason"}
    library = str(kernels.describe()["library"])
    assert library == os.path.basename(library)
    assert (native.NATIVE_FOLDER / library).is_file() or kernels.describe()["reason"]


@needs_library
def test_a_library_of_earlier_sources_is_called_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native.SIGNATURES, "ls_of_tomorrow", ([], None))
    found = native._State()
    assert found.library is None
    assert "older than this package" in found.reason
    assert "ls_of_tomorrow" in found.reason


@needs_library
def test_a_library_of_other_headers_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lockstep.h").write_text("struct LsSampling { int32_t other; };\n")
    monkeypatch.setattr(native, "SOURCE_FOLDER", tmp_path)
    found = native._State()
    assert found.library is None
    assert "older than this package" in found.reason
