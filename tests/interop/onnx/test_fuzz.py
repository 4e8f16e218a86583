"""Damaged ONNX files: an error of ours each time, or a network that runs; within bounds of time and memory."""

from __future__ import annotations

import json
import random
import resource
import time
from pathlib import Path

import pytest
import torch

from lockstep.core.errors import LockstepError
from lockstep.interop.onnx.reader import read_onnx
from lockstep.models.graph import GraphModule
from tests.interop.onnx.build import mlp

pytest.importorskip("onnx")
FIXTURES = Path(__file__).parents[2] / "fixtures" / "frameworks"
SECONDS, BYTES = 20.0, 2**30


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One of: cut off, bytes changed, a stretch removed, doubled, or swapped for noise."""
    data = bytearray(content)
    at = rng.randrange(len(data))
    match rng.randrange(6):
        case 0:
            return bytes(data[:at])
        case 1:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            del data[at : at + rng.randint(1, 64)]
        case 3:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        case 4:
            length = rng.randint(1, 32)
            data[at : at + length] = rng.randbytes(length)
        case 5:
            # Where structure is dense: the head of the file holds names, sizes and attributes of small graphs.
            data[rng.randrange(min(len(data), 600))] ^= 1 << rng.randrange(8)
    return bytes(data)


def example(module: GraphModule) -> list[torch.Tensor]:
    """Zeros of the declared shapes, large and free sizes cut to 3."""
    inputs = []
    for port in module.graph.inputs:
        sizes = [n if isinstance(n, int) and n <= 128 else 3 for n in port.shape or (3,)]
        inputs.append(torch.zeros(sizes, dtype=torch.__dict__.get(port.dtype, torch.float32)))
    return inputs


def attack(source: Path, folder: Path, num: int, seed: int) -> tuple[int, int]:
    """(number of files that were refused, number that ran)."""
    content, rng = source.read_bytes(), random.Random(seed)
    refused = ran = 0
    for _ in range(num):
        (folder / "bad.onnx").write_bytes(mutated(content, rng))
        started = time.process_time()
        try:
            module = read_onnx(folder / "bad.onnx")
            with torch.no_grad():
                module.outputs(example(module))
            ran += 1
        except LockstepError:
            refused += 1
        assert time.process_time() - started < SECONDS
    return refused, ran


def peak() -> int:
    """Largest memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    before = peak()
    refused, ran = attack(mlp(tmp_path / "good.onnx", (4, 8, 2), softmax=True, value=True), tmp_path, 120, seed=1)
    assert refused > 20
    assert ran > 0
    assert peak() - before < BYTES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf/lstm_tf2onnx", "mxnet/gru", "cntk/lstm", "paddle/mlp_pexport", "tf/tf1_frozen"])
def test_two_thousand_damaged_files(name: str, tmp_path: Path) -> None:
    before = peak()
    refused, ran = attack(FIXTURES / f"{name}.onnx", tmp_path, 400, seed=len(name))
    print(
        json.dumps({"format": f"onnx: {name}", "files": 400, "refused": refused, "grown_mib": (peak() - before) >> 20})
    )
    assert refused > 50
    assert refused + ran == 400
    assert peak() - before < BYTES
