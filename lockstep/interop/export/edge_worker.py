"""Converters and runtimes for phones and small devices, in an interpreter of their own. Run as a script; it imports nothing
of Lockstep, for the interpreter may not have it.

    edge_worker.py convert litert|executorch PROGRAM.pt2 OUT     one program, flat inputs and outputs, one row
    edge_worker.py serve litert|executorch FILE FD               answers frames on the socket FD until it is closed

A frame is eight bytes of length, little-endian, and an .npz. The first frame is sent: `metadata`, the file's JSON as bytes.
A request holds the inputs, N rows each, by place ("0", "1", ...) and `repeat`; the reply the outputs by place and
`seconds`, of the fastest of `repeat` calls with the first row.
"""

from __future__ import annotations

import io
import json
import socket
import sys
import time
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

KEY = "lockstep"
RunRow = Callable[[list[np.ndarray]], list[np.ndarray]]


def convert_litert(program: Any, metadata: str, out: str) -> None:
    """The metadata goes where TensorFlow Lite keeps associated files: into a zip behind the flatbuffer."""
    import litert_torch

    litert_torch.convert(_module(program), program.example_inputs[0]).export(out)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(f"{KEY}.json", metadata)


def open_litert(path: str) -> tuple[str, RunRow]:
    from ai_edge_litert.interpreter import Interpreter

    with zipfile.ZipFile(path) as archive:
        metadata = archive.read(f"{KEY}.json").decode()
    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    signature = interpreter.get_signature_runner()
    inputs, outputs = signature.get_input_details(), signature.get_output_details()
    sources = [inputs[f"args_{place}"] for place in range(len(inputs))]
    targets = [outputs[f"output_{place}"]["index"] for place in range(len(outputs))]

    def run(row: list[np.ndarray]) -> list[np.ndarray]:
        for source, array in zip(sources, row, strict=True):
            # The converter makes 64-bit integers 32-bit ones.
            interpreter.set_tensor(source["index"], array.astype(source["dtype"], copy=False))
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in targets]

    return metadata, run


def convert_executorch(program: Any, metadata: str, out: str) -> None:
    """The metadata is a method of the program that returns a string."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        constant_methods={KEY: metadata},
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    with open(out, "wb") as file:
        lowered.to_executorch().write_to_file(file)


def open_executorch(path: str) -> tuple[str, RunRow]:
    import torch
    from executorch.runtime import Runtime

    torch.set_num_threads(1)
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    metadata = program.load_method(KEY).execute([])[0]

    def run(row: list[np.ndarray]) -> list[np.ndarray]:
        return [output.numpy().copy() for output in method.execute([torch.from_numpy(array) for array in row])]

    return metadata, run


CONVERTERS = {"litert": convert_litert, "executorch": convert_executorch}
RUNTIMES = {"litert": open_litert, "executorch": open_executorch}


def _module(program: Any) -> Any:
    """The program as a module that may be told to stop training, which a loaded program refuses."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = program.module()

        def train(self, mode: bool = True) -> Any:
            return self

        def forward(self, *inputs: torch.Tensor) -> Any:
            return self.inner(*inputs)

    return Module()


def convert(kind: str, source: str, out: str) -> None:
    import torch

    extra = {KEY: ""}
    program = torch.export.load(source, extra_files=extra)
    CONVERTERS[kind](program, extra[KEY], out)


def serve(kind: str, path: str, descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as stream:
        metadata, run = RUNTIMES[kind](path)
        names = len(json.loads(metadata)["inputs"])
        _send(stream, {"metadata": np.frombuffer(metadata.encode(), np.uint8)})
        while header := stream.read(8):
            with np.load(io.BytesIO(stream.read(int.from_bytes(header, "little")))) as request:
                repeat = int(request["repeat"])
                inputs = [request[str(place)] for place in range(names)]
            seconds = min((_seconds(run, [x[:1] for x in inputs]) for _ in range(repeat)), default=0.0)
            rows = [run([x[n : n + 1] for x in inputs]) for n in range(len(inputs[0]))]
            reply = {str(place): np.concatenate(parts) for place, parts in enumerate(zip(*rows, strict=True))}
            _send(stream, {**reply, "seconds": np.float64(seconds)})


def _seconds(run: RunRow, row: list[np.ndarray]) -> float:
    start = time.perf_counter()
    run(row)
    return time.perf_counter() - start


def _send(stream: Any, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    stream.write(len(buffer.getvalue()).to_bytes(8, "little") + buffer.getvalue())
    stream.flush()


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(*sys.argv[2:])
    else:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
