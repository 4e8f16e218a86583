"""The stored networks of `lockstep bench imports`: files of real frameworks, and how each is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A file, the stored inputs and outputs beside it (by stem), and how it is read.

    `axis` is that of the rows; `steps` that of a sequence whose first outputs do not depend on the later ones, None where there
    is no sequence or only its last output is stored.
    """

    file: str
    io: str
    options: dict[str, Any] = field(default_factory=dict)
    axis: int = 0
    steps: int | None = None
    continuous: bool = False
    """The outputs are the mean of a normal distribution, not logits; for --train."""
    short: str = ""
    """Stem of inputs and outputs stored of shorter sequences, where only the last step's output is stored."""
    one_hot: int = 0
    """Numbers are stored and the network reads vectors of so many columns, one of them 1; 0: the inputs as they are stored."""


def stored_networks() -> list[Case]:
    """One for each file."""

    def make(framework: str, net: str, *endings: str, stem: str = "", time_first: bool = False) -> list[Case]:
        is_sequence = net in ("gru", "lstm")
        axis, steps = (1, 0) if time_first else (0, 1)
        return [
            Case(
                f"{framework}/{stem or net}{ending}",
                f"{framework}/{net}",
                {"shapes": "data=4,84,84"} if (framework, net, ending) == ("mxnet", "cnn", "-symbol.json") else {},
                axis=axis if is_sequence else 0,
                steps=steps if is_sequence else None,
                continuous=net in ("mlp", "tf1"),
            )
            for ending in endings
        ]

    cases = make("caffe", "mlp", ".prototxt", ".caffemodel.h5") + make("caffe", "cnn", ".prototxt", ".caffemodel.h5")
    cases += make("caffe", "lstm", ".prototxt", ".caffemodel.h5", time_first=True)
    for net in ("mlp", "cnn", "gru", "lstm"):
        cases += make("cntk", net, ".model")
        cases += make("mxnet", net, "-symbol.json", ".onnx", time_first=True)
        cases += make("paddle", net, ".json", ".pdparams", "_pexport.onnx")
        cases += make("tf", net, ".keras", ".h5", "_saved", "_tf2onnx.onnx")
    cases += make("mxnet", "symmlp", "-symbol.json", ".onnx")
    cases += make("paddle", "cnn", ".pdmodel", stem="cnn_old") + make("paddle", "lstm", "_cli_pd.onnx")
    cases += [case for net in ("mlp", "gru", "lstm") for case in make("tf", net, "_kexport.onnx")]
    cases += [case for net in ("mlp", "lstm") for case in make("tf", net, "_fromkeras.onnx")]
    cases += make("tf", "raw", "_saved", "_tf2onnx.onnx")
    cases += make("tf", "tf1", "_frozen.pb", "_model.ckpt.meta", "_frozen.onnx", "_ckpt.onnx")
    cases += make("keras2", "k2cnn", ".keras", ".h5", "_sm", ".onnx")
    cases += [Case(f"keras2/k2rnn{ending}", "keras2/k2rnn", short="keras2/k2rnn_short") for ending in (".keras", ".h5")]
    cases += make("keras2", "dqn", "_policy")
    return [*cases, Case("cntk/sparse.model", "cntk/sparse", one_hot=50), *_own()]


def _own() -> list[Case]:
    """Those that lie in this repository alone: PyTorch, CleanRL, and small ones of Keras 3."""
    tanh = {"activation": "tanh"}
    cases = [
        Case("torch/mlp.pt2", "torch/mlp"),
        *(Case(f"torch/{net}.pt2", f"torch/{net}") for net in ("cnn", "cnn_core")),
    ]
    cases += [Case(f"torch/mlp.{ending}", "torch/mlp", tanh) for ending in ("pt", "safetensors")]
    cases += [Case(f"cleanrl/{net}.cleanrl_model", f"cleanrl/{net}") for net in ("dqn", "c51", "ppo", "ppo_atari")]
    name = "cleanrl/ppo_continuous_action"
    cases += [Case(f"{name}.cleanrl_model", name, continuous=True)]
    cases += [Case(f"keras3/{file}", f"keras3/{file[0]}") for file in ("a.keras", "a.h5", "b.keras")]
    return cases + [Case(f"keras3/{file}", "keras3/c", short="keras3/c_short") for file in ("c.keras", "c.h5")]
