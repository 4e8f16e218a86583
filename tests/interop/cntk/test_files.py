"""Models that the real CNTK wrote: equal to what it computed, ragged batches, real recurrences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from lockstep.core.errors import FormatError, InputError
from lockstep.interop.cntk.graph import CNTKNetwork, load_cntk
from lockstep.interop.cntk.reader import read_model
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks" / "cntk"
NETS = ("mlp", "cnn", "lstm", "gru", "sparse")


def _outputs(net: CNTKNetwork, x: object) -> list:
    out = net(x)
    return [out] if isinstance(out, torch.Tensor) else list(out)


def _relative(got: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(got.detach().numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", NETS)
def test_outputs_equal_cntks_and_every_weight_learns(name: str) -> None:
    net = load_cntk(FILES / f"{name}.model")
    stored = arrays(FILES / f"{name}_io.npz")
    x = torch.from_numpy(stored["x"])
    outputs = _outputs(net, x)
    for rows, got in (
        (x, outputs),
        (x[1:2], _outputs(net, x[1:2])),
        (torch.cat([x, x]), _outputs(net, torch.cat([x, x]))),
    ):
        for index, output in enumerate(got):
            whole = stored[f"y{index}"]
            expected = whole if rows is x else whole[1:2] if len(rows) == 1 else np.concatenate([whole, whole])
            assert _relative(output, expected) <= 1e-5
    sum(output.square().sum() for output in outputs).backward()
    assert len(list(net.weights.parameters())) >= 3
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.weights.parameters())


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_ragged_batches_equal_each_sequence_alone(name: str) -> None:
    net = load_cntk(FILES / f"{name}.model")
    stored = arrays(FILES / f"{name}_io.npz")
    x = torch.from_numpy(stored["x"])
    ragged = [x[0, :2], x[1], x[2, :4]]
    logits, values = net(ragged)
    for row, (sequence, got) in enumerate(zip(ragged, logits, strict=True)):
        assert _relative(got, stored["y0"][row, : len(sequence)]) <= 1e-5
    packed, _ = net(pack_sequence(ragged, enforce_sorted=False))
    for got, again in zip(logits, unpack_sequence(packed), strict=True):
        assert torch.equal(got, again)
    assert [len(value) for value in values] == [2, 5, 4]


def test_sparse_inputs_in_three_forms() -> None:
    net = load_cntk(FILES / "sparse.model")
    stored = arrays(FILES / "sparse_io.npz")
    index = torch.from_numpy(stored["x"])
    hot = torch.nn.functional.one_hot(index, 50).float()
    for form in (index, hot, hot.to_sparse()):
        assert _relative(net(form), stored["y0"]) <= 1e-5
    mixed = torch.zeros(1, 50)
    mixed[0, [3, 7]] = torch.tensor([0.5, -2.0])
    assert torch.allclose(net(mixed.to_sparse()), net(mixed), atol=1e-6)
    with pytest.raises(InputError, match=r"input 'tok': indices must lie in \[0, 50\)"):
        net(torch.tensor([50]))


def test_names_and_shapes() -> None:
    net = load_cntk(FILES / "cnn.model")
    assert (net.input_names, net.output_names) == (("obs",), ("logits", "value"))
    assert net.input_shapes == {"obs": (4, 84, 84)}
    recurrent = load_cntk(FILES / "gru.model")
    assert recurrent.sequence_inputs == ("obs",)
    loops = [part for part in recurrent.program.parts if part.direction]
    # The product of the input is outside of the loop; what depends on the state is inside.
    assert [part.direction for part in loops] == [1]
    assert len(loops[0].functions) < len(recurrent.program.inputs)


def test_errors_name_file_function_and_offset(tmp_path: Path) -> None:
    data = (FILES / "gru.model").read_bytes()
    (tmp_path / "cut.model").write_bytes(data[:20000])
    with pytest.raises(FormatError, match=r"cut.model: byte \d+: field \d+ claims"):
        read_model(tmp_path / "cut.model")
    (tmp_path / "one.model").write_bytes(b"B\0C\0N\0\0\0")
    with pytest.raises(FormatError, match="is a model of CNTK 1"):
        read_model(tmp_path / "one.model")
    # Operator 75, StableSigmoid, becomes 120, which no release has.
    found = [
        i + 11
        for i in range(len(data) - 12)
        if data[i : i + 4] == b"\x0a\x02op" and data[i + 10 : i + 12] == b"\x28\x4b"
    ]
    assert found
    changed = bytearray(data)
    for place in found:
        changed[place] = 120
    (tmp_path / "new.model").write_bytes(bytes(changed))
    with pytest.raises(
        FormatError, match=r"new.model: operation StableSigmoid\d+ \(op 120\): unknown operator number '120'"
    ):
        load_cntk(tmp_path / "new.model")
    with pytest.raises(InputError, match=r"input 'obs' has shape \(2, 9\); \['B', 11\] was expected"):
        load_cntk(FILES / "mlp.model")(torch.zeros(2, 9))
    with pytest.raises(InputError, match="at least one sequence"):
        load_cntk(FILES / "gru.model")([])
