"""Damaged and hostile files of every format: an error of ours that names the file, every time.

Each format's files are mutated (cut, bytes changed, parts repeated or removed, numbers made huge), loaded and run in a child
process of its own, so that a crash, a hang or a flood of memory is seen.

The slow suite has a budget: 150 files of each format there. With 2,000, a line of JSON for each format
(files, how many were refused, what memory grew by, the slowest file's seconds):

    LOCKSTEP_FUZZ_FILES=2000 python -m pytest tests/interop/test_damaged_files.py -m slow -s

Graphs of TensorFlow need LOCKSTEP_TENSORFLOW_PYTHON, an interpreter with tf2onnx. The very script that converts runs there, in
a process of its own for each file that we did not refuse before, forked from one that has imported TensorFlow: "converted" is
the number of these, "crashed" of those that ended by a signal, and memory and seconds are the larger of theirs and ours.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import pytest
import torch

from lockstep.core.errors import LockstepError

FILES = Path(__file__).resolve().parents[1] / "fixtures" / "frameworks"
SECONDS_A_FILE = 20.0
MEMORY = 1 << 30


def _caffe(description: Path, weights: Path) -> None:
    from lockstep.interop.caffe.graph import load_caffe

    net = load_caffe(description, weights)
    # A batch of a million rows is no damage: what is run is a few rows of what the file describes.
    net(*(torch.zeros([min(shape[0], 3), *shape[1:]]) for shape in net.input_shapes.values()))


def _mxnet(symbol: Path, params: Path) -> None:
    from lockstep.interop.mxnet.graph import load_mxnet

    load_mxnet(symbol, params)(torch.zeros(2, 2, 8) if "gru" in str(symbol) else torch.zeros(2, 8))


def _cntk(model: Path) -> None:
    from lockstep.interop.cntk.graph import load_cntk

    net = load_cntk(model)
    net(
        *(
            torch.zeros(1, *([2] if name in net.sequence_inputs else []), *net.input_shapes[name])
            for name in net.input_names
        )
    )


def _ctf(path: Path) -> None:
    from lockstep.interop.cntk.ctf import CTFDataset, CTFStream

    streams = {"x": CTFStream(dim=3, is_sequence=True), "y": CTFStream(dim=5, is_sparse=True)}
    list(CTFDataset(path, streams, chunk_bytes=64).batches(2))


def _solver(path: Path) -> None:
    from lockstep.interop.caffe.solver import learning_rate, read_solver

    learning_rate(read_solver(path).config, 7)


def _any(**options: object) -> Callable[[Path, Path], None]:
    def load_any(path: Path, source: Path) -> None:
        from lockstep.interop.readers import load

        given = {key: value for key, value in options.items() if key != "beside"}
        if "beside" in options:
            given["params"] = source.with_suffix(".pdiparams")
        module = load(path, **given)
        sizes = [
            [n if isinstance(n, int) and n <= 128 else 3 for n in port.shape or (3,)] for port in module.graph.inputs
        ]
        module.outputs([torch.zeros(size) for size in sizes])

    return load_any


class WarmConverter:
    """In place of `converters.run_converter`."""

    def __init__(self) -> None:
        self.num, self.crashed, self.most, self.usual, self.slowest = 0, 0, 0, 0, 0.0
        self._process: subprocess.Popen[str] | None = None

    def reset(self) -> None:
        """Files that are whole are behind us."""
        self.num, self.crashed, self.usual, self.slowest = 0, 0, self.most, 0.0

    def __call__(self, command: Sequence[str], path: Path, framework: str) -> tuple[int, str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [command[0], str(WARM_CONVERTER), command[1]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": list(command[2:]), "seconds": int(SECONDS_A_FILE)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        self.num += 1
        self.crashed += answer["status"] < 0
        self.most, self.slowest = max(self.most, answer["bytes"]), max(self.slowest, answer["seconds"])
        if answer["status"] in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
            raise TimeoutError(f"the converter takes more than {SECONDS_A_FILE} s")
        return answer["status"], answer["words"]


WARM = WarmConverter()


def _tensorflow(path: Path, source: Path) -> None:
    """The damaged file among its companions, under the name that it has beside them."""
    from lockstep.interop import converters
    from lockstep.interop.readers import load

    converters.run_converter = WARM
    folder = path.with_name(f"{path.name}.files")
    root = source.parents[source.parent.name == "variables"]
    if not folder.exists():
        shutil.copytree(root, folder)
    place = folder / source.relative_to(root)
    whole = place.read_bytes()
    place.write_bytes(path.read_bytes())
    try:
        module = load(folder if (folder / "saved_model.pb").exists() else place)
        sizes = [
            [n if isinstance(n, int) and n <= 128 else 3 for n in port.shape or (3,)] for port in module.graph.inputs
        ]
        module.outputs([torch.zeros(size) for size in sizes])
    finally:
        place.write_bytes(whole)


def _checkpoint(path: Path, source: Path) -> None:
    from lockstep.interop.tensorflow import read_checkpoint

    shard = path.with_name(path.stem + ".data-00000-of-00001")
    if not shard.exists():
        shard.write_bytes(source.with_name(source.stem + ".data-00000-of-00001").read_bytes())
    read_checkpoint(path)


CAFFE, MXNET, CNTK, TF = FILES / "caffe", FILES / "mxnet", FILES / "cntk", FILES / "tf"
SAVED, AGENTS = TF / "mlp_saved", FILES / "keras2" / "dqn_policy"
WARM_CONVERTER = Path(__file__).parent / "tensorflow" / "warm_converter.py"
CONVERTED = ("saved_model", "frozen.pb", "meta")
MUTANT = "mutant"
"""In a damaged file's name, and in no error's words."""
FORMATS: dict[str, tuple[list[Path], Callable[[Path, Path], None]]] = {
    "prototxt": (
        [CAFFE / "mlp.prototxt", CAFFE / "lstm.prototxt"],
        lambda path, source: _caffe(path, source.with_suffix(".caffemodel")),
    ),
    "caffemodel": (
        [CAFFE / "mlp.caffemodel", CAFFE / "lstm.caffemodel"],
        lambda path, source: _caffe(source.with_suffix(".prototxt"), path),
    ),
    "caffemodel.h5": (
        [CAFFE / "lstm.caffemodel.h5"],
        lambda path, source: _caffe(CAFFE / "lstm.prototxt", path),
    ),
    "solver.prototxt": ([CAFFE / "solver.prototxt"], lambda path, source: _solver(path)),
    "symbol.json": (
        [MXNET / "symmlp-symbol.json", MXNET / "gru-symbol.json"],
        lambda path, source: _mxnet(
            path, MXNET / ("gru-0000.params" if "gru" in source.name else "symmlp-0001.params")
        ),
    ),
    "params": (
        [MXNET / "symmlp-0001.params", MXNET / "gru-0000.params"],
        lambda path, source: _mxnet(MXNET / f"{source.name.split('-')[0]}-symbol.json", path),
    ),
    "cntk": ([CNTK / "gru.model", CNTK / "sparse.model", CNTK / "mlp.model"], lambda path, source: _cntk(path)),
    "sb3": ([FILES / "sb3" / "a2c_acrobot.zip"], _any()),
    "sb2": ([FILES / "sb2" / "ppo2_dense.zip", FILES / "sb2" / "ppo2_dense.pkl"], _any()),
    "cleanrl": ([FILES / "cleanrl" / "dqn.cleanrl_model"], _any()),
    "safetensors": ([FILES / "torch" / "mlp.safetensors"], _any(activation="tanh")),
    "pt": ([FILES / "torch" / "mlp.pt"], _any(activation="tanh")),
    "pt2": ([FILES / "torch" / "mlp.pt2"], _any()),
    "pdparams": ([FILES / "paddle" / "mlp.pdparams"], _any(program=FILES / "paddle" / "mlp.json")),
    "pdiparams": ([FILES / "paddle" / "mlp.pdiparams"], _any(program=FILES / "paddle" / "mlp.json")),
    "paddle.json": ([FILES / "paddle" / "lstm.json", FILES / "paddle" / "mlp.json"], _any(beside=True)),
    "pdmodel": ([FILES / "paddle" / "cnn_old.pdmodel"], _any(beside=True)),
    "keras": ([FILES / "keras3" / "c.keras"], _any()),
    "h5": ([FILES / "keras3" / "c.h5"], _any()),
    "checkpoint": ([FILES / "tf" / "raw_ckpt.index"], _checkpoint),
    "saved_model": (
        [SAVED / "saved_model.pb", *sorted((SAVED / "variables").glob("*"))],
        _tensorflow,
    ),
    "agents": (
        [AGENTS / name for name in ("saved_model.pb", "policy_specs.pbtxt")] + sorted((AGENTS / "variables").glob("*")),
        _tensorflow,
    ),
    "frozen.pb": ([TF / "tf1_frozen.pb"], _tensorflow),
    "meta": ([TF / "tf1_model.ckpt.meta"], _tensorflow),
    "ctf": ([], lambda path, source: _ctf(path)),
}
CTF = b"".join(b"%d |x %d 2 0.5 |# note\n%d |x 1 2 3 |y %d:1\n" % (n, n, n, n % 5) for n in range(20))


def mutate(data: bytes, draw: random.Random) -> bytes:
    """A damaged copy."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(max(len(out), 1))
        # Structure stands mostly at the start and between large arrays.
        at = draw.choice((at, min(at, draw.randrange(2048)), max(len(out) - draw.randrange(1, 2048), 0)))
        kind = draw.randrange(8)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            out[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            out[at : at + 8] = draw.choice(
                (b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", (1 << 40).to_bytes(8, "little"))
            )
        elif kind == 3:
            del out[at : at + draw.randrange(1, 64)]
        elif kind == 4:
            out[at:at] = out[at : at + draw.randrange(1, 200)]
        elif kind == 5:
            out[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 16)))
        else:
            numbers = list(re.finditer(rb"\d+", bytes(out[: 1 << 14])))
            if numbers:
                found = draw.choice(numbers)
                new = draw.choice((b"0", b"-1", b"99999999999", b"1000000", b"7", b"1e30", b"nan"))
                out[found.start() : found.end()] = new
    return bytes(out)


def _attack(name: str, num: int, seed: int, folder: str, answer: multiprocessing.connection.Connection) -> None:  # type: ignore[name-defined]
    torch.set_num_threads(1)
    sources, load = FORMATS[name]
    originals = [(source, source.read_bytes()) for source in sources] or [(Path("a.ctf"), CTF)]

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {SECONDS_A_FILE} s")

    # Seconds of the processor: a busy machine is no hang. One that waits and does nothing runs into the whole test's deadline.
    signal.signal(signal.SIGPROF, give_up)
    failures: list[str] = []
    refused, slowest = 0, 0.0
    for source, data in originals:  # what is loaded once for all is not the files' doing
        path = Path(folder) / f"whole-{source.name}"
        path.write_bytes(data)
        load(path, source)
    WARM.reset()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw = random.Random(seed)
    for index in range(num):
        source, data = draw.choice(originals)
        path = Path(folder) / f"{MUTANT}-{source.name}"
        path.write_bytes(mutate(data, draw))
        signal.setitimer(signal.ITIMER_PROF, SECONDS_A_FILE)
        started = time.process_time()
        try:
            load(path, source)
        except LockstepError as error:
            refused += 1
            if MUTANT not in str(error) and "input" not in str(error):
                failures.append(f"{index}: names no file: {error}")
        except BaseException as error:
            failures.append(f"{index}: {type(error).__name__}: {error} {traceback.format_exc()[-600:]}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - started)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    grown, slowest = max(grown, WARM.most - WARM.usual), max(slowest, WARM.slowest)
    answer.send(
        (failures, refused, grown, slowest, {"converted": WARM.num, "crashed": WARM.crashed} if WARM.num else {})
    )


def _run(name: str, num: int, seed: int, folder: Path, timeout: float) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_attack, args=(name, num, seed, str(folder), theirs))
    child.start()
    theirs.close()
    try:
        assert ours.poll(timeout), f"{name}: hangs"
        failures, refused, grown, slowest, more = ours.recv()
    except EOFError:
        child.join(10)
        pytest.fail(f"{name}: the process died with exit code {child.exitcode}")
    finally:
        child.kill()
        child.join(10)
    found = {"format": name, "files": num, "refused": refused, "failures": len(failures), "grown_mib": grown >> 20}
    print(json.dumps({**found, "slowest_s": round(slowest, 2), **more}))
    assert not failures, f"{len(failures)} of {num}:\n" + "\n".join(failures[:4])
    assert refused > num // 4
    assert grown < MEMORY


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in CONVERTED])
def test_a_few_damaged_files(name: str, tmp_path: Path) -> None:
    _run(name, 6, 1, tmp_path, 120)


NUM_FILES = int(os.environ.get("LOCKSTEP_FUZZ_FILES", "150"))
SECONDS_IN_ALL = 840 * max(1, NUM_FILES // 500)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS_IN_ALL + 60)
@pytest.mark.parametrize("name", list(FORMATS))
def test_many_damaged_files(name: str, tmp_path: Path) -> None:
    if name in CONVERTED and "LOCKSTEP_TENSORFLOW_PYTHON" not in os.environ:
        pytest.skip("no interpreter with tf2onnx is named")
    _run(name, NUM_FILES, 2, tmp_path, SECONDS_IN_ALL)
