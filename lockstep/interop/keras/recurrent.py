"""LSTM, GRU and SimpleRNN of Keras as ONNX's operations, one or both directions.

Keras' LSTM has the gates i, f, c, o; its GRU z, r, h as ONNX. A GRU with `reset_after` (every one that cuDNN could run) has two
biases and multiplies the reset gate after the product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lockstep.core.errors import FormatError
from lockstep.interop.keras.lowering import Lowering, Value

GATES = {"LSTM": (0, 3, 1, 2), "GRU": (0, 1, 2), "SimpleRNN": (0,)}
WORDS = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu", "softsign": "Softsign", "hard_sigmoid": "HardSigmoid"}


def recurrent(low: Lowering, kind: str, config: dict[str, Any], x: Value, datasets: list[str], *, both: bool) -> Value:
    """One layer; `both` directions are joined along the units.

    Raises:
        FormatError: a variant without a form here.
    """
    for key in ("go_backwards", "return_state", "time_major"):
        if config.get(key):
            raise FormatError(f"has {key}, which has no form here")
    order, hidden = GATES[kind], int(config["units"])
    has_bias, halves = bool(config.get("use_bias", True)), 2 if both else 1
    per = 3 if has_bias else 2
    if len(datasets) != per * halves:
        raise FormatError(f"has {len(datasets)} arrays; {per * halves} were expected")
    after = kind == "GRU" and bool(config.get("reset_after", not low.keras2 or "reset_after" in config))
    parts: dict[str, str] = {}
    for index, part in enumerate(("kernel", "recurrence", "bias")[:per]):
        own = [datasets[half * per + index] for half in range(halves)]
        name = f"{config['name']}.{part}"
        if part == "bias":
            parts[part] = low.stored(
                name,
                own,
                lambda a: np.stack([_bias(b, order, hidden, after) for b in a]),
                _bias_back(order, hidden, after),
            )
        else:
            parts[part] = low.stored(
                name, own, lambda a: np.stack([_gates(k, order, hidden).T for k in a]), _kernel_back(order, hidden)
            )
    op = {"SimpleRNN": "RNN"}.get(kind, kind)
    make = low.make
    steps = make.node("Transpose", [low.last(x)], perm=[1, 0, 2])
    outs = [make.fresh(op) for _ in range(2)]
    make.node(
        op,
        [steps, parts["kernel"], parts["recurrence"], parts.get("bias", "")],
        outputs=outs,
        hidden_size=hidden,
        direction="bidirectional" if both else "forward",
        **_activations(low, kind, config, halves, after),
    )
    if config.get("return_sequences"):
        # [T, D, N, H] -> [N, T, D * H]
        rows = make.node("Transpose", [outs[0]], perm=[2, 0, 1, 3])
        return Value(3, last=make.node("Reshape", [rows, make.constant([0, 0, -1])]))
    rows = make.node("Transpose", [outs[1]], perm=[1, 0, 2])
    return Value(2, last=make.node("Reshape", [rows, make.constant([0, -1])]))


def _activations(low: Lowering, kind: str, config: dict[str, Any], halves: int, after: bool) -> dict[str, Any]:
    inner, outer = config.get("recurrent_activation", "sigmoid"), config.get("activation", "tanh")
    for word in (inner, outer):
        if word not in WORDS:
            raise FormatError(f"has the activation {word!r}, which recurrent layers here do not know")
    names = {"LSTM": [inner, outer, outer], "GRU": [inner, outer], "SimpleRNN": [outer]}[kind] * halves
    found: dict[str, Any] = {"activations": [WORDS[name] for name in names]}
    if kind == "GRU":
        found["linear_before_reset"] = int(after)
    if "hard_sigmoid" not in names:
        return found
    slope = 0.2 if low.keras2 else 1 / 6
    hard = sum(name == "hard_sigmoid" for name in names)
    return {**found, "activation_alpha": [slope] * hard, "activation_beta": [0.5] * hard}


def _gates(array: np.ndarray, order: tuple[int, ...], hidden: int) -> np.ndarray:
    """Columns of gates in another order."""
    if array.shape[-1] != len(order) * hidden:
        raise FormatError(f"has an array {list(array.shape)} for {hidden} units")
    blocks = np.split(array, len(order), axis=-1)
    return np.concatenate([blocks[gate] for gate in order], axis=-1)


def _ungates(array: np.ndarray, order: tuple[int, ...], hidden: int) -> np.ndarray:
    blocks = np.split(array, len(order), axis=-1)
    out = [blocks[0]] * len(order)
    for place, gate in enumerate(order):
        out[gate] = blocks[place]
    return np.concatenate(out, axis=-1)


def _bias(bias: np.ndarray, order: tuple[int, ...], hidden: int, after: bool) -> np.ndarray:
    if after != (bias.ndim == 2):
        raise FormatError(f"has a bias {list(bias.shape)}, which does not fit reset_after={after}")
    own = bias if after else np.stack([bias, np.zeros_like(bias)])
    return np.concatenate([_gates(part, order, hidden) for part in own])


def _bias_back(order: tuple[int, ...], hidden: int, after: bool) -> Any:
    def back(stored: np.ndarray) -> list[np.ndarray]:
        pairs = [np.split(row, 2) for row in stored]
        undone = [[_ungates(part, order, hidden) for part in pair] for pair in pairs]
        return [np.stack(pair) if after else pair[0] + pair[1] for pair in undone]

    return back


def _kernel_back(order: tuple[int, ...], hidden: int) -> Any:
    return lambda stored: [_ungates(kernel.T, order, hidden) for kernel in stored]
