"""Bodies as OpenAPI describes them. Requests are read by hand (see `act`, `oip`); these models are their description, and
the tests hold the two together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockstep.server.decide import MAX_SESSION_ID
from lockstep.server.tensors import DATATYPES, Interface, TensorSpec

Seed = Annotated[int, Field(ge=0, lt=2**63, description="of the sampling noise")]
SessionId = Annotated[str, Field(min_length=1, max_length=MAX_SESSION_ID)]
Numbers = float | int | bool | list[Any]
Datatype = Literal[*DATATYPES]  # type: ignore[valid-type]


class Strict(BaseModel):
    """Unknown fields are errors, nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorReply(BaseModel):
    """Every refusal."""

    error: str
    field: str | None = Field(None, description="the part of the request that is wrong")


class ActRequest(Strict):
    """One `observation`, or `observations` with a leading axis of rows (each entry of a dictionary observation alike)."""

    observation: Any = None
    observations: Any = None
    deterministic: bool = Field(True, description="the distribution's mode; false draws a sample")
    seed: Seed | None = None
    session_id: SessionId | None = Field(
        None, description="whose recurrent state, frame stack and random stream to use"
    )
    reset: bool | list[bool] | None = Field(None, description="the observation begins an episode of the session")


class ActReply(BaseModel):
    """`action` in the environment's form; with `observations`, everything has the leading axis."""

    action: Numbers
    logprob: float | list[float]
    value: float | list[float] | None
    version: str
    digest: str


class PolicyInfo(BaseModel):
    """A served policy."""

    name: str
    version: str
    digest: str
    ready: bool
    recurrent: bool
    num_sessions: int
    spec: dict[str, Any]


class PolicyList(BaseModel):
    policies: list[PolicyInfo]


class ReloadReply(BaseModel):
    name: str
    version: str
    digest: str
    changed: bool


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InputParameters(Strict):
    binary_data_size: Annotated[int, Field(ge=0)] | None = None


class InferInput(Strict):
    name: str
    shape: list[Annotated[int, Field(ge=0, lt=2**31)]]
    datatype: Datatype
    parameters: InputParameters | None = None
    data: list[Any] = Field([], description="numbers, row-major, flat or nested; not with binary_data_size")


class OutputParameters(Strict):
    binary_data: bool = False


class InferOutput(Strict):
    name: Literal["action", "logprob", "value"]
    parameters: OutputParameters | None = None


class InferParameters(Strict):
    """Triton's sequence parameters name a session; `timeout` is in microseconds; `priority` is accepted and unused."""

    deterministic: bool = True
    seed: Seed | None = None
    session_id: SessionId | None = None
    reset: bool = False
    sequence_id: Annotated[int, Field(ge=0, lt=2**64)] | SessionId | None = None
    sequence_start: bool = False
    sequence_end: bool = False
    timeout: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    priority: int = 0
    binary_data_output: bool = False


class InferRequest(Strict):
    id: str = ""
    parameters: InferParameters | None = None
    inputs: list[InferInput]
    outputs: list[InferOutput] | None = None


class InferReplyTensor(BaseModel):
    name: str
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[float | int | bool] | None = None


class InferReply(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferReplyTensor]


class IndexEntry(BaseModel):
    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


def observation_schema(interface: Interface, *, batched: bool) -> dict[str, Any]:
    """JSON schema of an observation that this policy takes."""
    if not interface.is_dict:
        return _tensor_schema(interface.inputs[0], batched)
    parts = {spec.name: _tensor_schema(spec, batched) for spec in interface.inputs}
    return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}


def _tensor_schema(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    if spec.dtype[0] == "f":
        schema: dict[str, Any] = {"type": "number"}
    elif spec.dtype[0] == "b" or spec.mask_blocks:
        schema = {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 1}]}
    else:
        schema = {"type": "integer"}
        if spec.upper:
            # One schema for all elements: it must not refuse what the widest of them takes.
            schema |= {"minimum": min(spec.lower), "maximum": max(spec.upper) - 1}
    for size in reversed(spec.shape):
        schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
    return {"type": "array", "items": schema, "minItems": 1} if batched else schema
