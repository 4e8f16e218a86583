"""Networks that the real MXNet wrote, and files of older forms made here by hand from the format's description."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.core.errors import FormatError, InputError
from lockstep.interop.mxnet.arrays import reshape_codes
from lockstep.interop.mxnet.graph import MXNetNetwork, load_mxnet
from lockstep.interop.mxnet.reader import Params, read_params, read_symbol
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks" / "mxnet"
NETS = {"mlp": "0000", "cnn": "0000", "lstm": "0000", "gru": "0000", "symmlp": "0001"}


def _load(name: str) -> MXNetNetwork:
    return load_mxnet(FILES / f"{name}-symbol.json", FILES / f"{name}-{NETS[name]}.params")


def _outputs(net: MXNetNetwork, x: torch.Tensor) -> list[torch.Tensor]:
    out = net(x)
    return [out] if isinstance(out, torch.Tensor) else list(out)


def _relative(got: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(got.detach().numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", list(NETS))
def test_outputs_equal_mxnets_and_every_weight_learns(name: str) -> None:
    net = _load(name)
    stored = arrays(FILES / f"{name}_io.npz")
    x = torch.from_numpy(stored["x"])
    axis = 1 if name in ("lstm", "gru") else 0
    outputs = _outputs(net, x)
    for rows, got in (
        (x, outputs),
        (x.narrow(axis, 1, 1), _outputs(net, x.narrow(axis, 1, 1))),
        (torch.cat([x, x], axis), _outputs(net, torch.cat([x, x], axis))),
    ):
        for index, output in enumerate(got):
            whole = stored[f"y{index}"]
            expected = (
                whole
                if rows is x
                else whole.take([1], axis)
                if rows.shape[axis] == 1
                else np.concatenate([whole] * 2, axis)
            )
            assert _relative(output, expected) <= 1e-5
    sum(output[..., 0].square().sum() for output in outputs).backward()
    assert len(list(net.parameters())) > 3
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())
    assert net.unused == ()


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_sequence_length_is_free(name: str) -> None:
    stored = arrays(FILES / f"{name}_io.npz")
    for index, output in enumerate(_outputs(_load(name), torch.from_numpy(stored["x"][:2]))):
        assert _relative(output, stored[f"y{index}"][:2]) <= 1e-5


@pytest.mark.parametrize("key", ["attr", "param"])
def test_attributes_of_older_files(key: str, tmp_path: Path) -> None:
    """Before 1.0 operators kept their attributes under `attr`, before 0.9 under `param`, with two-number references."""
    content = json.loads((FILES / "symmlp-symbol.json").read_text())
    for node in content["nodes"]:
        if "attrs" in node:
            node[key] = node.pop("attrs")
        node["inputs"] = [reference[:2] for reference in node["inputs"]]
        node["backward_source_id"] = -1
    content = {"nodes": content["nodes"], "arg_nodes": content["arg_nodes"], "heads": [[9, 0]]}
    (tmp_path / "old-symbol.json").write_text(json.dumps(content))
    net = load_mxnet(tmp_path / "old-symbol.json", FILES / "symmlp-0001.params")
    stored = arrays(FILES / "symmlp_io.npz")
    assert net.input_names == ("data",)
    assert _relative(net(torch.from_numpy(stored["x"])), stored["y0"]) <= 1e-5


def _array(values: np.ndarray, version: int) -> bytes:
    """An array as MXNet of an age wrote it: 0 before any version number, else 1 to 3."""
    code = {"float32": 0, "float64": 1, "float16": 2, "int32": 4}[values.dtype.name]
    head = b"" if version == 0 else struct.pack("<I", 0xF993FAC7 + version)
    head += struct.pack("<i", 0) if version >= 2 else b""
    form = "I" if version == 0 else "q"
    head += struct.pack(f"<I{values.ndim}{form}", values.ndim, *values.shape)
    return head + struct.pack("<iii", 1, 0, code) + values.tobytes()


def _params(arrays: dict[str, bytes]) -> bytes:
    names = b"".join(struct.pack("<Q", len(name)) + name.encode() for name in arrays)
    return (
        struct.pack("<QQQ", 0x112, 0, len(arrays)) + b"".join(arrays.values()) + struct.pack("<Q", len(arrays)) + names
    )


@pytest.mark.parametrize("version", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32"])
def test_arrays_of_every_version(version: int, dtype: str, tmp_path: Path) -> None:
    values = np.arange(6).reshape(2, 3).astype(dtype)
    (tmp_path / "a.params").write_bytes(
        _params({"arg:w": _array(values, version), "aux:s": _array(values[0], version)})
    )
    params = read_params(tmp_path / "a.params")
    assert params.auxiliary == {"s"}
    assert params.arrays["w"].dtype == dtype
    assert np.array_equal(params.arrays["w"], values)
    assert np.array_equal(params.arrays["s"], values[0])


def test_sparse_arrays_are_refused_by_name(tmp_path: Path) -> None:
    sparse = struct.pack("<Ii", 0xF993FAC9, 1) + bytes(40)
    (tmp_path / "s.params").write_bytes(_params({"arg:w": sparse}))
    with pytest.raises(FormatError, match=r"s.params: byte 24: array 0 is row_sparse; only dense"):
        read_params(tmp_path / "s.params")


def _network(
    nodes: list[tuple[str, str, dict[str, str], list[int]]], arrays: dict[str, np.ndarray], tmp_path: Path
) -> MXNetNetwork:
    entries = [
        {"op": op, "name": name, "attrs": attrs, "inputs": [[number, 0, 0] for number in inputs]}
        for op, name, attrs, inputs in nodes
    ]
    (tmp_path / "n-symbol.json").write_text(json.dumps({"nodes": entries, "heads": [[len(nodes) - 1, 0, 0]]}))
    return MXNetNetwork(read_symbol(tmp_path / "n-symbol.json"), Params(arrays), "n.params")


def test_batch_norm_before_version_9_and_fixed_gamma(tmp_path: Path) -> None:
    """Old files name no auxiliary inputs; gamma counts as 1 unless fix_gamma=False, and is then no weight."""
    arrays = {
        "bn_gamma": np.full(2, 5, np.float32),
        "bn_beta": np.ones(2, np.float32),
        "bn_moving_mean": np.full(2, 0.5, np.float32),
        "bn_moving_var": np.full(2, 4, np.float32),
    }
    nodes = [("null", "data", {}, []), ("null", "bn_gamma", {}, []), ("null", "bn_beta", {}, [])]
    net = _network([*nodes, ("BatchNorm", "bn", {"eps": "0"}, [0, 1, 2])], arrays, tmp_path).eval()
    x = torch.randn(3, 2)
    assert torch.allclose(net(x), (x - 0.5) / 2 + 1)
    assert [key for key, _ in net.named_parameters()] == ["weights.bn_beta"]
    free = _network(
        [*nodes, ("BatchNorm", "bn", {"eps": "0", "fix_gamma": "False"}, [0, 1, 2])], arrays, tmp_path
    ).eval()
    assert torch.allclose(free(x), 5 * (x - 0.5) / 2 + 1)
    free.train()(x)
    assert torch.allclose(free.statistics.bn_moving_mean, 0.9 * torch.full((2,), 0.5) + 0.1 * x.mean(0), atol=1e-6)


@pytest.mark.parametrize(("convention", "size"), [("valid", 2), ("full", 3), ("same", 3)])
@pytest.mark.parametrize("kind", ["max", "avg", "sum"])
def test_pooling_conventions(convention: str, size: int, kind: str, tmp_path: Path) -> None:
    attrs = {"kernel": "(2, 2)", "stride": "(2, 2)", "pool_type": kind, "pooling_convention": convention}
    net = _network([("null", "data", {}, []), ("Pooling", "p", attrs, [0])], {}, tmp_path)
    x = torch.arange(25.0).reshape(1, 1, 5, 5)
    out = net(x)
    assert out.shape == (1, 1, size, size)
    assert float(out[0, 0, 0, 0]) == {"max": 6, "avg": 3, "sum": 12}[kind]
    if size == 3:
        # "full" ends its window at the image for an average; "same" counts the padding it adds.
        corner = {"max": 24.0, "avg": 24.0, "sum": 24.0}[kind]
        assert float(out[0, 0, 2, 2]) == corner if (kind, convention) != ("avg", "same") else True


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_recurrences_equal_the_librarys(mode: str, bidirectional: bool, tmp_path: Path) -> None:
    """One vector: all matrices layer by layer, direction by direction, then all biases in the same order."""
    kinds = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
    options = {"num_layers": 2, "bidirectional": bidirectional}
    judge = kinds[mode](3, 4, **options) if mode in kinds else torch.nn.RNN(3, 4, nonlinearity=mode[4:], **options)
    parts = dict(judge.named_parameters())
    ordered = [value for word in ("weight", "bias") for key, value in parts.items() if key.startswith(word)]
    vector = torch.cat([value.detach().reshape(-1) for value in ordered]).numpy()
    begin = {"shape": f"({4 if bidirectional else 2}, 0, 4)"}
    nodes = [("null", "data", {}, []), ("null", "w", {}, []), ("_zeros", "h", begin, []), ("_zeros", "c", begin, [])]
    attrs = {
        "mode": mode,
        "state_size": "4",
        "num_layers": "2",
        "bidirectional": str(bidirectional),
        "state_outputs": "True",
    }
    inputs = [0, 1, 2, 3] if mode == "lstm" else [0, 1, 2]
    net = _network([*nodes, ("RNN", "r", attrs, inputs)], {"w": vector}, tmp_path)
    x = torch.randn(5, 2, 3)
    assert torch.allclose(net(x), judge(x)[0], atol=1e-6)
    net(x).sum().backward()
    assert bool(net.weights["w"].grad.any())


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize(
    ("op", "attrs", "shapes", "expected"),
    [
        ("SliceChannel", {"num_outputs": "2", "axis": "1"}, [(3, 4)], lambda x: x[:, :2]),
        ("Concat", {"dim": "1"}, [(3, 4), (3, 2)], lambda a, b: torch.cat([a, b], 1)),
        ("SwapAxis", {"dim1": "0", "dim2": "2"}, [(2, 3, 4)], lambda x: x.transpose(0, 2)),
        ("transpose", {}, [(2, 3, 4)], lambda x: x.permute(2, 1, 0)),
        ("dot", {"transpose_b": "True"}, [(2, 3), (4, 3)], lambda a, b: a @ b.T),
        ("batch_dot", {}, [(2, 3, 4), (2, 4, 5)], torch.bmm),
        ("mean", {"axis": "1", "exclude": "True"}, [(2, 3, 4)], lambda x: x.mean((0, 2))),
        ("sum", {"axis": "(0, 1)", "keepdims": "True"}, [(2, 3, 4)], lambda x: x.sum((0, 1), keepdim=True)),
        ("broadcast_add", {}, [(2, 3), (1, 3)], torch.add),
        ("LeakyReLU", {"act_type": "elu", "slope": "0.5"}, [(2, 3)], lambda x: torch.nn.functional.elu(x, 0.5)),
        ("SoftmaxActivation", {}, [(2, 3)], lambda x: x.softmax(1)),
        ("UpSampling", {"scale": "2", "sample_type": "nearest"}, [(1, 2, 3, 3)], _doubled),
        ("L2Normalization", {}, [(2, 3)], lambda x: torch.nn.functional.normalize(x)),
        ("_rminus_scalar", {"scalar": "2"}, [(2, 3)], lambda x: 2 - x),
        ("slice_axis", {"axis": "1", "begin": "-2", "end": "None"}, [(2, 5)], lambda x: x[:, -2:]),
        ("Reshape", {"shape": "(-4, 2, -1, 0)"}, [(4, 3)], lambda x: x.reshape(2, 2, 3)),
    ],
)  # fmt: skip
def test_operators(
    op: str, attrs: dict[str, str], shapes: list[tuple[int, ...]], expected: object, tmp_path: Path
) -> None:
    variables = [("null", f"x{index}", {}, []) for index in range(len(shapes))]
    net = _network([*variables, (op, "op", attrs, list(range(len(shapes))))], {}, tmp_path)
    values = [torch.randn(shape) for shape in shapes]
    assert torch.allclose(net(*values), expected(*values), atol=1e-6)  # type: ignore[operator]


def test_reshape_codes_refuse_what_does_not_fit() -> None:
    assert reshape_codes((10, 5, 4), [-1, 0], reverse=True) == [-1, 4]
    with pytest.raises(InputError, match="do not fit shape"):
        reshape_codes((2,), [-3])


def test_errors_name_file_node_and_operator(tmp_path: Path) -> None:
    text = (FILES / "symmlp-symbol.json").read_text()
    for old, new, message in (
        ('"Activation"', '"Aktivation"', r"node 4 'activation0' \(Aktivation\): unknown operator"),
        ('{"act_type": "relu"}', '{"act_type": "relu", "slope": "2"}', "attribute slope='2' is not supported"),
        ('"fc1_weight"', '"fc9_weight"', "holds no array 'fc9_weight', a weight"),
        ("[[3, 0, 0]]", "[[30, 0, 0]]", "does not refer to an earlier node"),
    ):
        assert old in text
        (tmp_path / "bad-symbol.json").write_text(text.replace(old, new))
        with pytest.raises(FormatError, match=message):
            load_mxnet(tmp_path / "bad-symbol.json", FILES / "symmlp-0001.params")
    (tmp_path / "cut.params").write_bytes((FILES / "symmlp-0001.params").read_bytes()[:500])
    with pytest.raises(
        FormatError, match=r"cut.params: byte \d+: array 0 of shape \(32, 8\) needs 1024 bytes and \d+ are left"
    ):
        read_params(tmp_path / "cut.params")
    with pytest.raises(
        InputError, match=r"symmlp-symbol.json: node 3 'fc1' \(FullyConnected\) cannot take inputs of shapes"
    ):
        _load("symmlp")(torch.zeros(2, 9))
