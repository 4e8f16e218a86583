"""The node cases that ship in the `onnx` package, run through our importer.

python -m tests.interop.onnx.node_cases            number of passing cases, and those that fail
python -m tests.interop.onnx.node_cases --freeze   add newly passing cases to passing.txt
"""

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.backend.test.loader import load_node_model_tests

from lockstep.core.errors import LockstepError
from lockstep.interop.onnx.reader import from_model
from lockstep.interop.onnx.tensors import from_array
from lockstep.models.graph.values import Items

PASSING = Path(__file__).parent / "passing.txt"


@functools.cache
def cases() -> dict[str, Any]:
    """All cases by name, made by onnx's own code."""
    with warnings.catch_warnings():
        # Overflows in the expected results are what some cases are about.
        warnings.simplefilter("ignore")
        return {case.name: case for case in load_node_model_tests()}


def run(name: str) -> None:
    """Run one case.

    Raises:
        AssertionError, LockstepError: it does not give what the case expects.
    """
    torch.manual_seed(0)
    case = cases()[name]
    model = onnx.ModelProto.FromString(case.model.SerializeToString())
    module = from_model(model, path=name)
    for inputs, outputs in case.data_sets:
        with torch.no_grad():
            got = module.outputs([_value(x) for x in inputs])
        for value, want, port in zip(got, outputs, module.graph.outputs, strict=True):
            _compare(value, _value(want), port.name, case)


def failure(name: str) -> str:
    """Why a case fails, empty where it passes."""
    try:
        run(name)
    except (LockstepError, AssertionError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return ""


def frozen() -> list[str]:
    """Cases that must pass."""
    return PASSING.read_text().split() if PASSING.exists() else []


def _value(x: Any) -> Any:
    """An input or expected output of a case as our value."""
    if x is None:
        return None
    if isinstance(x, list | tuple):
        return Items(_value(item) for item in x)
    if isinstance(x, onnx.TensorProto):
        x = numpy_helper.to_array(x)
    if isinstance(x, onnx.SequenceProto):
        return Items(_value(item) for item in numpy_helper.to_list(x))
    return from_array(np.asarray(x))


def _compare(got: Any, want: Any, name: str, case: Any) -> None:
    if isinstance(want, Items):
        assert isinstance(got, Items), f"{name} is {type(got).__name__}"
        assert len(got) == len(want), f"{name} has {len(got)} items; expected {len(want)}"
        for one, other in zip(got, want, strict=True):
            _compare(one, other, name, case)
        return
    if want is None or isinstance(want, np.ndarray):
        assert (got is None) == (want is None), name
        assert want is None or (got.shape == want.shape and bool((got == want).all())), f"{name}: {got} != {want}"
        return
    assert isinstance(got, torch.Tensor), f"{name} is {type(got).__name__}"
    assert got.dtype == want.dtype, f"{name} is {got.dtype}; expected {want.dtype}"
    assert got.shape == want.shape, f"{name} has shape {list(got.shape)}; expected {list(want.shape)}"
    rtol, atol = case.rtol, case.atol
    wide = torch.complex128 if want.dtype.is_complex else torch.float64
    if want.dtype in (torch.int64, torch.uint64):
        assert torch.equal(got, want), f"{name}: {got.reshape(-1)[:5]} != {want.reshape(-1)[:5]}"
        return
    a, b = got.detach().to(wide).numpy(), want.to(wide).numpy()
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


def main(args: list[str]) -> int:
    started = time.monotonic()
    wish = [name for name in cases() if not args or args[0].startswith("--") or args[0] in name]
    failures = {name: reason for name in wish if (reason := failure(name))}
    passing = [name for name in wish if name not in failures]
    for name, reason in failures.items():
        print(f"{name:<60} {reason}")
    print(Counter(reason.split(":")[1][:40] for reason in failures.values()).most_common(12))
    print(f"{len(passing)} of {len(wish)} node cases pass in {time.monotonic() - started:.0f} s")
    if args[:1] == ["--freeze"]:
        PASSING.write_text("\n".join(sorted({*frozen(), *passing})) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
