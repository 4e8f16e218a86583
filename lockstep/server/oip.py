"""The Open Inference Protocol (KServe v2) over REST: infer requests with JSON or binary tensors, and metadata.

A binary request is a JSON head of `Inference-Header-Content-Length` bytes, then the raw little-endian bytes of those
inputs that have a `binary_data_size`, in order; a binary reply has the same form. Triton's sequence parameters
(`sequence_id`, `sequence_start`, `sequence_end`) are sessions.

Source: https://github.com/kserve/open-inference-protocol and Triton's extensions binary_data, sequence, statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic_core import to_json

from lockstep import __version__
from lockstep.core.errors import InputError, unknown_name
from lockstep.server.decide import Wish, decide, read_flag, read_seed, read_session_id, ready_policy
from lockstep.server.limits import Headers, check_media, decoded, int_header, parse_json
from lockstep.server.replies import Refusal, Reply, json_reply, shortened, shown
from lockstep.server.repository import Loaded, Repository, Served
from lockstep.server.runner import Decision
from lockstep.server.tensors import DATATYPES, Interface, TensorSpec, leaves

PLATFORM = "lockstep_policy"
EXTENSIONS = ["binary_tensor_data", "sequence", "statistics", "model_configuration", "model_repository"]
HEAD_LENGTH = b"inference-header-content-length"
MEDIA = (b"application/json", b"application/octet-stream", b"application/vnd.kserve.infer")
REQUEST_FIELDS = frozenset({"id", "parameters", "inputs", "outputs"})
INPUT_FIELDS = frozenset({"name", "shape", "datatype", "parameters", "data"})
OUTPUT_FIELDS = frozenset({"name", "parameters"})
PARAMETERS = frozenset(
    {
        "deterministic",
        "seed",
        "session_id",
        "reset",
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "timeout",
        "priority",
        "binary_data_output",
    }
)


async def infer(repository: Repository, name: str, version: str, body: bytes, headers: Headers) -> Reply:
    """Answer one infer request; the body is as sent, `version` empty for the current one.

    Raises:
        InputError: naming the field that is wrong.
        Refusal: with its status.
    """
    served = ready_policy(repository, name)
    loaded = served.loaded
    check_version(loaded, name, version)
    check_media(headers, MEDIA)
    body = decoded(body, headers, served.config.max_body_bytes)
    head, tail = _split(body, headers)
    document = parse_json(head)
    check_fields(document, REQUEST_FIELDS, "request")
    request_id = document.get("id", "")
    if not isinstance(request_id, str):
        raise InputError(f"id: expected text; got {shown(request_id)}", field="id")
    parameters = _object(document, "parameters", "parameters")
    check_fields(parameters, PARAMETERS, "parameters")
    obs, num_rows = _read_inputs(document, tail, loaded.interface)
    outputs = _read_outputs(document, parameters, loaded.interface)
    decision = await decide(repository, served, loaded, obs, num_rows, _wish(parameters, num_rows))
    return _reply(name, loaded, request_id, decision, outputs)


def check_version(loaded: Loaded, name: str, version: str) -> None:
    """Raises Refusal 404 if a version is asked for that is not the loaded one."""
    if version and version != loaded.version:
        raise Refusal(
            404, f"{name}: version {shown(version)} is not loaded; version {loaded.version} is", field="version"
        )


def check_fields(document: dict[str, Any], known: frozenset[str], where: str) -> None:
    """Raises InputError for an unknown key."""
    if document.keys() <= known:
        return
    wrong = next(key for key in document if key not in known)
    raise InputError(f"{where}: {unknown_name('field', shortened(wrong), known)}", field=shortened(wrong))


def _split(body: bytes, headers: Headers) -> tuple[bytes, memoryview]:
    head_length = headers.get(HEAD_LENGTH)
    length = len(body) if head_length is None else int_header(head_length, "Inference-Header-Content-Length")
    if length > len(body):
        raise InputError(
            f"Inference-Header-Content-Length: is {length}, the body has {len(body)} bytes",
            field="Inference-Header-Content-Length",
        )
    return body[:length], memoryview(body)[length:]


def _object(document: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object; got {shown(value)}", field=where)
    return value


def _named_entries(
    field: str, entries: list[Any], known_fields: frozenset[str], names: list[str]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where, name, entry) of each tensor that `field` ("inputs" or "outputs") lists; each name once, and known."""
    seen: dict[str, None] = {}
    for index, entry in enumerate(entries):
        where = f"{field}[{index}]"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected an object; got {shown(entry)}", field=where)
        check_fields(entry, known_fields, where)
        name = entry.get("name")
        if not isinstance(name, str) or name not in names:
            kind = field.removesuffix("s")
            raise InputError(f"{where}.name: unknown {kind} {shown(name)}; expected {names}", field=f"{where}.name")
        if name in seen:
            raise InputError(f"{where}.name: {name!r} is named twice", field=f"{where}.name")
        seen[name] = None
        yield where, name, entry


def _read_inputs(document: dict[str, Any], tail: memoryview, interface: Interface) -> tuple[Any, int]:
    entries = document.get("inputs")
    if not isinstance(entries, list):
        raise InputError("inputs: expected an array of tensors", field="inputs")
    specs = {spec.name: spec for spec in interface.inputs}
    arrays: dict[str, np.ndarray] = {}
    offset = 0
    for _, name, entry in _named_entries("inputs", entries, INPUT_FIELDS, list(specs)):
        arrays[name], offset = _read_tensor(entry, specs[name], tail, offset)
    if offset != len(tail):
        raise InputError(
            f"inputs: {len(tail)} binary bytes follow the JSON, the tensors' binary_data_size add up to {offset}",
            field="inputs",
        )
    interface.check_names(arrays)
    return interface.joined(arrays)


def _read_tensor(entry: dict[str, Any], spec: TensorSpec, tail: memoryview, offset: int) -> tuple[np.ndarray, int]:
    name = spec.name
    datatype, shape = entry.get("datatype"), entry.get("shape")
    if datatype not in accepted_datatypes(spec):
        raise InputError(f"{name}: datatype is {shown(datatype)}; expected {spec.datatype}", field=name)
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise InputError(f"{name}: shape must be an array of sizes; got {shown(shape)}", field=name)
    if len(shape) != len(spec.shape) + 1 or tuple(shape[1:]) != spec.shape:
        raise InputError(f"{name}: expected shape {[-1, *spec.shape]}; got {shown_shape(shape)}", field=name)
    count = math.prod(shape)
    parameters = _object(entry, "parameters", f"{name}.parameters")
    check_fields(parameters, frozenset({"binary_data_size"}), f"{name}.parameters")
    size = parameters.get("binary_data_size")
    if size is None:
        array = _from_json(entry.get("data"), name, count)
        if datatype == "BOOL" and array.dtype != np.bool_:
            raise InputError(f"{name}: expected true or false for datatype BOOL", field=name)
        return spec.checked(array.reshape(shape)), offset
    if "data" in entry:
        raise InputError(f"{name}: has both data and binary_data_size", field=name)
    dtype = np.dtype(DATATYPES[datatype]).newbyteorder("<")
    if type(size) is not int or size != count * dtype.itemsize or offset + size > len(tail):
        raise InputError(
            f"{name}: binary_data_size is {shown(size)}; shape and datatype make {count * dtype.itemsize}, "
            f"{len(tail) - offset} bytes are left in the body",
            field=name,
        )
    array = np.frombuffer(tail, np.uint8 if datatype == "BOOL" else dtype, count, offset)
    if datatype == "BOOL":
        if (array > 1).any():
            raise InputError(f"{name}: a BOOL byte must be 0 or 1", field=name)
        array = array.view(np.bool_)
    return spec.checked(array.reshape(shape)), offset + size


def accepted_datatypes(spec: TensorSpec) -> tuple[str, ...]:
    """Datatypes that an input may come in; the first is the one that the metadata names."""
    if spec.dtype[0] == "f":
        return tuple(dict.fromkeys((spec.datatype, "FP32", "FP64")))
    return tuple(dict.fromkeys((spec.datatype, "BOOL"))) if spec.mask_blocks else (spec.datatype,)


def shown_shape(shape: list[int]) -> str:
    """A shape for an error message."""
    return str(shape) if len(shape) <= 8 else f"{len(shape)} axes"


def _from_json(data: Any, name: str, count: int) -> np.ndarray:
    """Flat or nested JSON numbers, or booleans -> [count]."""
    if not isinstance(data, list):
        raise InputError(f"{name}: data must be an array of numbers; got {shown(data)}", field=name)
    values, kinds = leaves(data)
    if not (kinds <= {int, float} or kinds == {bool}):
        raise InputError(f"{name}: data holds something other than numbers", field=name)
    if len(values) != count:
        raise InputError(f"{name}: shape makes {count} elements, data has {len(values)}", field=name)
    array = np.array(values)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name}: data holds an integer beyond 64 bits", field=name)
    return array


def _read_outputs(
    document: dict[str, Any], parameters: dict[str, Any], interface: Interface
) -> list[tuple[TensorSpec, bool]]:
    """(output, whether in binary form), in the order asked for."""
    binary = read_flag(parameters, "binary_data_output", False)
    entries = document.get("outputs")
    if entries is None or entries == []:
        return [(spec, binary) for spec in interface.outputs]
    if not isinstance(entries, list):
        raise InputError(f"outputs: expected an array; got {shown(entries)}", field="outputs")
    specs = {spec.name: spec for spec in interface.outputs}
    asked: dict[str, bool] = {}
    for where, name, entry in _named_entries("outputs", entries, OUTPUT_FIELDS, list(specs)):
        wishes = _object(entry, "parameters", f"{where}.parameters")
        check_fields(wishes, frozenset({"binary_data"}), f"{where}.parameters")
        asked[name] = read_flag(wishes, "binary_data", binary)
    return [(specs[name], flag) for name, flag in asked.items()]


def _wish(parameters: dict[str, Any], num_rows: int) -> Wish:
    if not parameters:
        return Wish()
    session_id = read_session_id(parameters)
    sequence = parameters.get("sequence_id")
    if type(sequence) is int and 0 < sequence < 2**64:
        sequence = str(sequence)
    elif sequence == 0 or sequence == "":
        sequence = None
    if sequence is not None:
        if session_id is not None:
            raise InputError("sequence_id: give either sequence_id or session_id", field="sequence_id")
        session_id = read_session_id({"sequence_id": sequence}, "sequence_id")
    start, end = read_flag(parameters, "sequence_start", False), read_flag(parameters, "sequence_end", False)
    reset = read_flag(parameters, "reset", False) or start
    if (reset or end) and session_id is None:
        raise InputError("reset: needs a session_id or sequence_id", field="reset")
    timeout = parameters.get("timeout")
    if timeout is not None and not (type(timeout) is int and 0 <= timeout < 2**63):
        raise InputError(f"timeout: expected microseconds; got {shown(timeout)}", field="timeout")
    return Wish(
        deterministic=read_flag(parameters, "deterministic", True),
        seed=read_seed(parameters),
        session_id=session_id,
        reset=np.ones(num_rows, np.bool_) if reset else None,
        end_session=end,
        timeout_s=timeout * 1e-6 if timeout else None,
    )


def _reply(
    name: str, loaded: Loaded, request_id: str, decision: Decision, outputs: list[tuple[TensorSpec, bool]]
) -> Reply:
    arrays = {"action": decision.action, "logprob": decision.logprob, "value": decision.value}
    entries: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for spec, binary in outputs:
        array = arrays[spec.name]
        assert array is not None
        entry: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": array.shape}
        if binary:
            data = np.ascontiguousarray(array, np.dtype(spec.dtype).newbyteorder("<")).tobytes()
            entry["parameters"] = {"binary_data_size": len(data)}
            raw.append(data)
        else:
            entry["data"] = array.ravel().tolist()
        entries.append(entry)
    document: dict[str, Any] = {"model_name": name, "model_version": loaded.version}
    if request_id:
        document["id"] = request_id
    document["outputs"] = entries
    head = to_json(document)
    if not raw:
        return Reply(200, head)
    length = (HEAD_LENGTH, str(len(head)).encode())
    return Reply(200, b"".join([head, *raw]), ((b"content-type", b"application/octet-stream"), length))


def server_metadata() -> Reply:
    """GET /v2."""
    return json_reply({"name": "lockstep", "version": __version__, "extensions": EXTENSIONS})


def model_metadata(served: Served) -> dict[str, Any]:
    """GET /v2/models/{name}."""
    loaded = served.loaded
    return {
        "name": served.name,
        "versions": [loaded.version],
        "platform": PLATFORM,
        "inputs": [_described(spec) for spec in loaded.interface.inputs],
        "outputs": [_described(spec) for spec in loaded.interface.outputs],
    }


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}


def model_config(served: Served) -> dict[str, Any]:
    """GET /v2/models/{name}/config, the fields of Triton's model configuration that have a meaning here."""
    interface = served.loaded.interface
    return {
        "name": served.name,
        "platform": PLATFORM,
        "backend": "lockstep",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": served.config.max_batch,
        "input": [_configured(spec) for spec in interface.inputs],
        "output": [_configured(spec) for spec in interface.outputs],
        "dynamic_batching": {"max_queue_delay_microseconds": served.config.max_wait_us},
    }


def _configured(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape)}


def model_stats(served: Served) -> dict[str, Any]:
    """One entry of GET /v2/models/stats; durations in nanoseconds."""
    stats = served.batcher.stats
    done = stats.num_succeeded + stats.num_failed
    return {
        "name": served.name,
        "version": served.loaded.version,
        "last_inference": stats.last_ms,
        "inference_count": stats.num_rows,
        "execution_count": stats.num_batches,
        "inference_stats": {
            "success": {"count": stats.num_succeeded, "ns": stats.success_ns},
            "fail": {"count": stats.num_failed, "ns": stats.fail_ns},
            "queue": {"count": done, "ns": stats.queue_ns},
            "compute_input": {"count": stats.num_batches, "ns": 0},
            "compute_infer": {"count": stats.num_batches, "ns": stats.run_ns},
            "compute_output": {"count": stats.num_batches, "ns": 0},
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [],
    }
