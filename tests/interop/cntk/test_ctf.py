"""CTF files as a data set: every form of input, streamed, and a model of CNTK fitted to one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lockstep.core.errors import ConfigError, FormatError
from lockstep.interop.cntk.ctf import CTFDataset, CTFStream
from lockstep.interop.cntk.graph import load_cntk
from lockstep.learn.fitting import fit

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks" / "cntk"
DENSE = {"x": CTFStream(dim=2), "y": CTFStream(dim=1, name="label")}


def test_forms_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.ctf").write_text(
        "100 |words 3:1 |label 0 1 |# the first #| of two\n100 |words 7:0.5 9:2\n\n"
        "200\t|label 1 0 |words 0:1 |other 5\r\n300 |words |label 1 1\n"
    )
    streams = {"words": CTFStream(dim=10, is_sparse=True, is_sequence=True), "target": CTFStream(dim=2, name="label")}
    data = CTFDataset(tmp_path / "a.ctf", streams)
    (batch,) = data.batches(5, shuffle=False)
    assert len(data) == 3
    assert [tuple(x.shape) for x in batch["words"]] == [(2, 10), (1, 10), (1, 10)]
    assert batch["words"][0].to_dense()[1, [7, 9]].tolist() == [0.5, 2.0]
    assert float(batch["words"][2].to_dense().abs().sum()) == 0.0
    assert batch["target"].tolist() == [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]


def _shards(folder: Path, num_files: int, num_rows: int) -> list[Path]:
    paths = []
    for number in range(num_files):
        rows = range(number * num_rows, (number + 1) * num_rows)
        paths.append(folder / f"part{number}.ctf")
        paths[-1].write_text("".join(f"|x {row} {row % 7} |label {row}\n" for row in rows))
    return paths


def test_every_sequence_once_in_an_order_of_the_seed(tmp_path: Path) -> None:
    data = CTFDataset(_shards(tmp_path, 3, 200), DENSE, chunk_bytes=256, window_chunks=3)
    assert len(data) == 600
    assert len(data.chunks) > 30

    def order(**options: int) -> list[int]:
        return [int(row) for batch in data.batches(7, **options) for row in batch["y"][:, 0]]  # type: ignore[call-overload]

    first = order(seed=1)
    assert sorted(first) == list(range(600)) != first
    assert first == order(seed=1) != order(seed=2)
    assert order(seed=1, epoch=1) != first
    assert order(seed=1, skip=10) == first[70:]
    halves = [[int(r) for b in data.batches(7, seed=1, shard=(n, 2)) for r in b["y"][:, 0]] for n in range(2)]
    assert sorted(halves[0] + halves[1]) == list(range(600))


def test_only_a_window_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the files, no more than `window_chunks` chunks are read ahead of what is handed out."""
    data = CTFDataset(_shards(tmp_path, 2, 2000), DENSE, chunk_bytes=1000, window_chunks=4)
    read: list[int] = []
    original = CTFDataset.sequences
    monkeypatch.setattr(
        CTFDataset, "sequences", lambda self, chunk: (read.append(chunk.num_bytes), original(self, chunk))[1]
    )
    handed = 0
    for batch in data.batches(10):
        handed += len(batch["x"])
        assert sum(read) <= (handed / 4000 + 0.1) * sum(chunk.num_bytes for chunk in data.chunks)
    assert handed == 4000
    assert max(chunk.num_bytes for chunk in data.chunks) < 1100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("|x 1 2 |label 3\n|x 1 |label 3\n", "a.ctf, byte 16: line 2: input 'x': 1 values, 2 expected"),
        ("|x 1 2 |label 3:1\n", "line 1: input 'label': could not convert string to float"),
        ("|x 1 nan |label 3\n", "'nan' is not finite"),
        ("|x 1 2\n", "has 0 samples of 'label', 1 expected"),
        ("1 |x 1 2 |label 1\n1 |x 2 3\n", "has 2 samples of 'x', 1 expected; is_sequence=True would allow it"),
        ("|x 1 2 | |label 1\n", "a '|' without a name"),
        ("\n\n", "holds no sequences"),
    ],
)
def test_errors_name_file_byte_and_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.ctf").write_text(text)
    with pytest.raises(FormatError) as caught:
        list(CTFDataset(tmp_path / "a.ctf", DENSE).batches(2, shuffle=False))
    assert message in str(caught.value)


def test_a_bad_wish_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"absent.ctf: cannot be read"):
        CTFDataset(tmp_path / "absent.ctf", DENSE)
    with pytest.raises(ConfigError, match="dim=0"):
        CTFDataset(tmp_path / "absent.ctf", {"x": CTFStream(dim=0)})


def test_a_recurrent_model_is_fitted_to_ragged_sequences(tmp_path: Path) -> None:
    """The GRU that CNTK wrote learns, from a CTF file of sequences of 1 to 6 steps, which of four entries came last."""
    draw = random.Random(0)
    lines = []
    for number in range(64):
        last = 0
        for _ in range(draw.randint(1, 6)):
            last = draw.randrange(4)
            values = " ".join(f"{float(entry == last) + 0.1 * draw.random():.3f}" for entry in range(8))
            lines.append(f"{number} |obs {values}")
        lines[-1] += f" |label {last}:1"
    (tmp_path / "train.ctf").write_text("\n".join(lines) + "\n")
    streams = {"obs": CTFStream(dim=8, is_sequence=True), "label": CTFStream(dim=4, is_sparse=True)}
    data = CTFDataset(tmp_path / "train.ctf", streams, chunk_bytes=1024, window_chunks=2)
    net = load_cntk(FILES / "gru.model").train()

    def objective(batch: dict) -> torch.Tensor:
        logits, _ = net(batch["obs"])
        return torch.nn.functional.cross_entropy(torch.stack([row[-1] for row in logits]), batch["label"].to_dense())

    optimiser = torch.optim.Adam(net.weights.parameters(), 0.02)
    epochs = (batch for epoch in range(20) for batch in data.batches(16, epoch=epoch))
    losses = list(fit(objective, optimiser, epochs, num_steps=24))
    assert len(losses) == 24
    assert sum(losses[-4:]) / 4 < 0.25 * sum(losses[:4]) / 4


def test_sparse_sequences_reach_the_embedding() -> None:
    net = load_cntk(FILES / "sparse.model")
    rows = torch.zeros(3, 50)
    rows[[0, 1, 2], [4, 9, 4]] = torch.tensor([1.0, 0.5, 2.0])
    assert torch.allclose(net(rows.to_sparse()), net(rows), atol=1e-6)
