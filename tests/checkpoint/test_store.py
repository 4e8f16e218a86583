"""Checkpoints: exact round trip, atomicity, pruning, and damage that is either found or harmless."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lockstep.checkpoint.store import MANIFEST, STATE, TENSORS, Checkpointer, read_checkpoint
from lockstep.core.errors import CheckpointError

TORCH_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64,
]  # fmt: skip
NUMPY_DTYPES = ["?", "u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8"]


def same(a: Any, b: Any) -> bool:
    """Equal in type, dtype, shape and bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def bits(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def rich_state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return {
        "model": dict(model.state_dict()),
        "optimiser": optimiser.state_dict(),
        "python": random.Random(3).getstate(),
        "numpy": np.random.default_rng(3).bit_generator.state,
        "torch": torch.Generator().manual_seed(3).get_state(),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "strided": np.arange(10)[::3],
        "scalars": [np.float32(0.1), np.int64(-5), np.bool_(True)],
        "numbers": (
            1,
            -(2**200),
            0.1,
            float("inf"),
            -float("inf"),
            float("nan"),
            -0.0,
            True,
            None,
            "é\ud800",
            b"\0\xff",
        ),
        "empty": {"list": [], "tuple": (), "dict": {}, "tensor": torch.empty(0, 3), "array": np.empty((2, 0))},
        "keys": {0: "a", None: "b", (1, "x"): "c", True: "d", 1.5: "e"} | {"$tuple": 1},
    }


@pytest.fixture
def store(tmp_path: Path) -> Checkpointer:
    return Checkpointer(tmp_path / "checkpoints")


def test_round_trip_is_exact(store: Checkpointer) -> None:
    state = rich_state()
    store.save(12, state)
    step, loaded = store.load()
    assert step == 12
    assert same(loaded, state)
    assert str(loaded["numbers"][6]) == "-0.0"


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (63, 5), (2, 3, 7)], ids=str)
def test_every_torch_dtype_and_shape(store: Checkpointer, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)  # random bits: NaN payloads included
    store.save(0, {"x": tensor})
    assert same(store.load()[1]["x"], tensor)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_every_numpy_dtype(store: Checkpointer, dtype: str) -> None:
    raw = np.random.default_rng(0).integers(
        0, 2 if dtype == "?" else 256, (6, np.dtype(dtype).itemsize), dtype=np.uint8
    )
    arrays = {
        "flat": raw.view(dtype).reshape(6),
        "fortran": raw.view(dtype).reshape(2, 3).T,
        "zero_d": raw.view(dtype)[0, 0],
    }
    arrays["zero_d"] = np.array(arrays["zero_d"])
    store.save(0, arrays)
    assert same(store.load()[1], arrays)


def test_tensors_file_is_safetensors(store: Checkpointer) -> None:
    half = torch.randn(5, 3).bfloat16()
    folder = store.save(1, {"half": half, "bytes": torch.arange(7, dtype=torch.uint8)})
    tensors = load_file(folder / TENSORS)
    assert same(tensors["0"], half)
    assert tensors["1"].tolist() == list(range(7))


def test_loaded_arrays_are_writable_and_independent(store: Checkpointer) -> None:
    store.save(1, {"a": np.zeros(3), "b": torch.zeros(3)})
    loaded = store.load()[1]
    loaded["a"] += 1
    loaded["b"] += 1
    assert store.load()[1]["a"].sum() == 0


@pytest.mark.parametrize(
    "leaf",
    [
        object(),
        {1, 2},
        np.array(["x"], dtype=object),
        np.zeros(2, ">f4"),
        np.zeros(2, "M8[s]"),
        torch.zeros(2, 2).to_sparse(),
    ],
    ids=["object", "set", "objects", "big-endian", "datetime", "sparse"],
)
def test_what_cannot_be_written_is_named(store: Checkpointer, leaf: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state\['deep'\]\[1\]"):
        store.save(1, {"deep": [0, leaf]})
    assert store.checkpoints() == []


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    store = Checkpointer(tmp_path, keep_last=2)
    for step, score in ((1, 5.0), (2, 9.0), (3, None), (4, float("nan")), (5, 7.0)):
        store.save(step, {"step": step}, score)
    assert [path.name for path in store.checkpoints()] == [f"step_{n:012d}" for n in (2, 4, 5)]
    assert store.best() == tmp_path / "step_000000000002"
    assert store.latest() == tmp_path / "step_000000000005"
    without = Checkpointer(tmp_path, keep_last=1, keep_best=False)
    without.save(6, {})
    assert [path.name for path in without.checkpoints()] == ["step_000000000006"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000000006"]


def test_same_step_again_replaces_and_later_steps_are_dropped(tmp_path: Path) -> None:
    store = Checkpointer(tmp_path, keep_last=3)
    for step in (10, 20, 30):
        store.save(step, {"turn": 1}, score=float(step))
    store.save(20, {"turn": 2})
    assert store.load() == (20, {"turn": 2})
    assert [path.name for path in store.checkpoints()] == ["step_000000000010", "step_000000000020"]


def test_interrupted_replacement_still_loads(tmp_path: Path) -> None:
    store = Checkpointer(tmp_path)
    folder = store.save(20, {"turn": 1})
    folder.rename(folder.with_name(folder.name + ".replaced"))  # a kill between the two renames of a second save
    assert store.load() == (20, {"turn": 1})
    store.save(20, {"turn": 2})
    assert store.load() == (20, {"turn": 2})


def test_leftovers_of_a_kill_are_ignored_and_removed(tmp_path: Path) -> None:
    store = Checkpointer(tmp_path)
    (tmp_path / ".writing-1").mkdir()
    (tmp_path / ".writing-1" / TENSORS).write_bytes(b"half")
    assert store.latest() is None
    store.save(1, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000000001"]


def test_falls_back_to_the_previous_one_saying_so(tmp_path: Path) -> None:
    said: list[str] = []
    store = Checkpointer(tmp_path, report=said.append)
    store.save(1, {"x": torch.ones(3)})
    newest = store.save(2, {"x": torch.zeros(3)})
    (newest / TENSORS).write_bytes((newest / TENSORS).read_bytes()[:-1])
    step, state = store.load()
    assert step == 1
    assert state["x"].sum() == 3
    assert len(said) == 1
    assert "truncated" in said[0]
    assert TENSORS in said[0]
    with pytest.raises(CheckpointError, match="truncated"):
        store.load(newest)


def test_a_checkpoint_pruned_while_it_is_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    writer, reader = Checkpointer(tmp_path, keep_last=1), Checkpointer(tmp_path, report=said.append)
    writer.save(1, {"x": 1})
    once = [True]

    def read_slowly(folder: Path) -> tuple[int, dict[str, Any]]:
        if once:
            once.pop()
            writer.save(np.int64(2), {"x": 2}, np.float32(0.5))  # type: ignore[arg-type]
        return read_checkpoint(folder)

    monkeypatch.setattr("lockstep.checkpoint.store.read_checkpoint", read_slowly)
    assert reader.load() == (2, {"x": 2})
    assert said == []


def test_nothing_to_load(tmp_path: Path) -> None:
    store = Checkpointer(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        store.load()
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        store.load(tmp_path / "nowhere")
    folder = store.save(1, {"x": torch.ones(2)})
    (folder / STATE).unlink()
    with pytest.raises(CheckpointError, match="every checkpoint in"):
        store.load()


def test_another_format_and_another_step_are_refused(tmp_path: Path) -> None:
    store = Checkpointer(tmp_path)
    folder = store.save(1, {})
    renamed = folder.with_name("step_000000000009")
    shutil.copytree(folder, renamed)
    with pytest.raises(CheckpointError, match="is of step 1"):
        read_checkpoint(renamed)
    document = json.loads((folder / MANIFEST).read_text())
    document["body"]["step"] = 2
    (folder / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(folder)


def test_damage_is_found_or_harmless(tmp_path: Path) -> None:
    """Truncations, flipped bits and zeroed spans anywhere: an error that names the file, or the same state."""
    state = rich_state()
    folder = Checkpointer(tmp_path).save(3, state)
    originals = {name: (folder / name).read_bytes() for name in (TENSORS, STATE, MANIFEST)}
    rng = random.Random(0)
    found = unnamed = 0
    for _ in range(240):
        name = rng.choice(list(originals))
        content = bytearray(originals[name])
        place = rng.randrange(len(content))
        kind = rng.choice(("truncate", "flip", "zero", "extend"))
        if kind == "truncate":
            del content[place:]
        elif kind == "flip":
            content[place] ^= 1 << rng.randrange(8)
        elif kind == "zero":
            content[place : place + 64] = bytes(len(content[place : place + 64]))
        else:
            content += b"\0"
        (folder / name).write_bytes(content)
        try:
            step, loaded = read_checkpoint(folder)
        except CheckpointError as error:
            found += 1
            unnamed += name not in str(error)
        else:
            assert step == 3
            assert same(loaded, state), (name, kind, place)
        (folder / name).write_bytes(originals[name])
    assert found > 160
    assert unnamed == 0, "the message must name the damaged file"
    assert same(read_checkpoint(folder)[1], state)


def test_a_full_disk_is_an_error_that_keeps_the_previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpointer(tmp_path)
    store.save(1, {"x": 1})

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lockstep.checkpoint.store.write_tensors", refuse)
    with pytest.raises(CheckpointError, match="No space left"):
        store.save(2, {"x": 2})
    assert store.load() == (1, {"x": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000000001"]


def test_buffers_are_not_copied(tmp_path: Path) -> None:
    """Peak memory while a 64 MB buffer is saved stays far below a second copy."""
    import tracemalloc

    buffer = np.zeros((64, 1 << 20), np.uint8)
    tracemalloc.start()
    try:
        Checkpointer(tmp_path).save(1, {"buffer": buffer})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
