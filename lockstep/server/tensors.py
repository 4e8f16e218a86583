"""The named arrays that go into and come out of a policy, and the checks that a client's data must pass.

Legend: N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from lockstep.core.errors import InputError
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, MultiDiscreteSpace, Space
from lockstep.models.control.policy import Policy
from lockstep.models.control.preprocess import ACTION_MASK
from lockstep.server.replies import shown

OBSERVATION = "observation"
DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
FLOAT32_MAX = float(np.finfo(np.float32).max)
DATATYPE_OF = {dtype: datatype for datatype, dtype in DATATYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `shape` is a row's. `upper` bounds integers from above (exclusive), per column or for all, and
    where there is an `upper`, `lower` does from below; `mask_blocks` are the sizes of independent choices, each of which
    needs one allowed entry.

    >>> TensorSpec("observation", "float32", (4,)).datatype
    'FP32'
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    upper: tuple[int, ...] = ()
    lower: tuple[int, ...] = (0,)
    mask_blocks: tuple[int, ...] = ()

    @property
    def datatype(self) -> str:
        """Name of the dtype in the Open Inference Protocol."""
        return DATATYPE_OF[self.dtype]

    def rows_from_json(self, value: Any, *, batched: bool) -> np.ndarray:
        """Numbers as nested lists -> [N, *shape]; without `batched`, one row that lacks the leading dimension.

        Raises:
            InputError: naming this tensor.
        """
        _, kinds = leaves(value)
        if not (kinds <= {int, float} or kinds == {bool}):
            got = "numbers and arrays mixed, or something else" if isinstance(value, list) else shown(value)
            raise InputError(
                f"{self.name}: expected numbers of shape {self._shape(batched)}; got {got}", field=self.name
            )
        try:
            array = np.array(value)
        except ValueError as error:
            raise InputError(
                f"{self.name}: expected numbers of shape {self._shape(batched)}; got arrays that differ in length",
                field=self.name,
            ) from error
        if array.dtype.kind not in "biuf":
            raise InputError(f"{self.name}: holds an integer beyond 64 bits", field=self.name)
        return self.checked(array if batched else array[None], batched=batched)

    def checked(self, array: np.ndarray, *, batched: bool = True) -> np.ndarray:
        """Array [N, *shape] in the policy's dtype, N >= 1, every value one that the policy can read.

        Raises:
            InputError: naming this tensor.
        """
        if array.shape[1:] != self.shape or array.ndim == 0 or array.shape[0] == 0:
            got = array.shape if batched else array.shape[1:]
            raise InputError(f"{self.name}: expected shape {self._shape(batched)}; got {list(got)}", field=self.name)
        kind = self.dtype[0]
        if kind == "f":
            return self._real(array)
        if kind == "b" or self.mask_blocks:
            return self._flags(array)
        return self._integer(array)

    def _real(self, array: np.ndarray) -> np.ndarray:
        if array.dtype.kind not in "fiu":
            raise InputError(f"{self.name}: expected real numbers; got {array.dtype}", field=self.name)
        # One comparison refuses NaN, infinities and what float32 cannot hold, and leaves the cast without warnings.
        if array.size and not np.abs(array).max() <= FLOAT32_MAX:
            raise InputError(f"{self.name}: holds NaN, an infinity or a value beyond float32", field=self.name)
        return array if array.dtype == np.float32 else array.astype(np.float32)

    def _flags(self, array: np.ndarray) -> np.ndarray:
        if array.dtype.kind not in "biu" or (array.dtype.kind != "b" and ((array != 0) & (array != 1)).any()):
            raise InputError(f"{self.name}: expected true or false, or 0 or 1", field=self.name)
        flags = array.astype(np.bool_)
        columns = flags.reshape(len(flags), -1)
        start = 0
        for size in self.mask_blocks:
            if not columns[:, start : start + size].any(axis=1).all():
                raise InputError(
                    f"{self.name}: a row allows no choice; at least one entry must be true", field=self.name
                )
            start += size
        return flags.astype(self.dtype)

    def _integer(self, array: np.ndarray) -> np.ndarray:
        if array.dtype.kind not in "iu":
            raise InputError(f"{self.name}: expected integers; got {array.dtype}", field=self.name)
        info = np.iinfo(self.dtype)
        low, high = array.min(), array.max()
        if low < info.min or high > info.max:
            raise InputError(f"{self.name}: expected integers in {info.min}..{info.max}", field=self.name)
        if self.upper and ((array < np.array(self.lower)) | (array >= np.array(self.upper))).any():
            raise InputError(
                f"{self.name}: expected integers from {list(self.lower)} to below {list(self.upper)}", field=self.name
            )
        return array.astype(self.dtype)

    def _shape(self, batched: bool) -> list[int]:
        return [-1, *self.shape] if batched else list(self.shape)


@dataclass(frozen=True)
class Interface:
    """What a policy takes and gives. `is_dict`: observations are objects keyed by the inputs' names.

    >>> Interface((TensorSpec("observation", "float32", (4,)),), (), False).inputs[0].name
    'observation'
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    is_dict: bool

    def observation_from_json(self, value: Any, *, batched: bool) -> tuple[Any, int]:
        """(array or dictionary of arrays with N rows, N) from a JSON observation.

        Raises:
            InputError: naming the part that is wrong.
        """
        if not self.is_dict:
            rows = self.inputs[0].rows_from_json(value, batched=batched)
            return rows, len(rows)
        if not isinstance(value, dict):
            names = [spec.name for spec in self.inputs]
            raise InputError(f"observation: expected an object with {names}; got {shown(value)}", field=OBSERVATION)
        self.check_names(value)
        return self.joined({s.name: s.rows_from_json(value[s.name], batched=batched) for s in self.inputs})

    def check_names(self, got: dict[str, Any]) -> None:
        """Raises InputError unless exactly the inputs are there."""
        names = [spec.name for spec in self.inputs]
        for name in names:
            if name not in got:
                raise InputError(f"{name}: missing; expected {names}", field=name)
        for name in got:
            if name not in names:
                raise InputError(f"unknown input {shown(name)}; expected {names}", field=name)

    def joined(self, arrays: dict[str, np.ndarray]) -> tuple[Any, int]:
        """(observation in the policy's form, N) from checked arrays that must agree in N."""
        num_rows = len(arrays[self.inputs[0].name])
        for name, array in arrays.items():
            if len(array) != num_rows:
                first = self.inputs[0].name
                raise InputError(f"{name}: has {len(array)} rows, {first} has {num_rows}", field=name)
        return (arrays if self.is_dict else arrays[self.inputs[0].name]), num_rows

    def example(self, num_rows: int) -> Any:
        """An observation of zeros (masks of ones, choices at their lowest), to warm a policy up."""
        arrays = {}
        for spec in self.inputs:
            fill = 1 if spec.mask_blocks else np.array(spec.lower) if spec.upper else 0
            arrays[spec.name] = np.full(
                (num_rows, *spec.shape), fill, spec.dtype if spec.dtype[0] != "f" else "float32"
            )
        return arrays if self.is_dict else arrays[OBSERVATION]


def leaves(value: Any) -> tuple[list[Any], set[type]]:
    """Innermost values, flat, and their types; a value beside arrays leaves the arrays unopened. NumPy alone would spend
    gigabytes on a list that mixes numbers and long text.

    >>> leaves([[1, 2.5], [3, 4]])[0]
    [1, 2.5, 3, 4]
    """
    level = [value]
    while (kinds := set(map(type, level))) == {list}:
        level = list(chain.from_iterable(level))
    return level, kinds


def interface_of(policy: Policy) -> Interface:
    """The inputs and outputs of a policy, from its spec."""
    obs_space, action_space = policy.spec.obs_space, policy.spec.action_space
    if isinstance(obs_space, DictSpace):
        inputs = tuple(_spec(name, space, action_space) for name, space in obs_space.spaces.items())
    else:
        inputs = (_spec(OBSERVATION, obs_space, action_space),)
    outputs = [TensorSpec("action", *_action_form(action_space)), TensorSpec("logprob", "float32", ())]
    if policy.critic is not None:
        outputs.append(TensorSpec("value", "float32", ()))
    return Interface(inputs, tuple(outputs), isinstance(obs_space, DictSpace))


def _spec(name: str, space: Space, action_space: Space) -> TensorSpec:
    blocks: tuple[int, ...] = ()
    if name == ACTION_MASK:
        match action_space:
            case DiscreteSpace():
                blocks = (action_space.n,)
            case MultiDiscreteSpace():
                blocks = action_space.nvec
    match space:
        case DiscreteSpace():
            return TensorSpec(name, "int64", (), upper=(space.start + space.n,), lower=space.lowest)
        case MultiDiscreteSpace():
            upper = tuple(first + n for first, n in zip(space.lowest, space.nvec, strict=True))
            return TensorSpec(name, "int64", (len(space.nvec),), upper=upper, lower=space.lowest, mask_blocks=blocks)
        case BoxSpace():
            return TensorSpec(name, space.dtype, space.shape, mask_blocks=blocks)
    raise InputError(f"{name}: {space} cannot be served", field=name)


def _action_form(space: Space) -> tuple[str, tuple[int, ...]]:
    match space:
        case DiscreteSpace():
            return "int64", ()
        case MultiDiscreteSpace():
            return "int64", (len(space.nvec),)
        case BoxSpace():
            return "float32", space.shape
    raise InputError(f"action space {space} cannot be served", field="action")
