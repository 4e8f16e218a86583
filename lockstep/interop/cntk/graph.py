"""A CNTK model as a module, with its dynamic axes as ragged batches and its delays as real recurrences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lockstep.core.errors import FormatError, InputError, LockstepError, unknown_name
from lockstep.interop.cntk.convolution import CONVOLUTIONS, shift
from lockstep.interop.cntk.ops import Apply
from lockstep.interop.cntk.program import FUTURE, PAST, Part, Program, Reference, check_reachable
from lockstep.interop.cntk.reader import (
    BATCH_AXIS,
    CONSTANT,
    INPUT,
    PARAMETER,
    Attributes,
    Function,
    Variable,
    read_model,
)
from lockstep.interop.cntk.values import Value, from_sequences, to_sequences
from lockstep.interop.loops import is_recording, loop

Given = Tensor | Sequence[Tensor] | PackedSequence
_HARMLESS = frozenset(
    (
        "maxTempMemSizeInSamples",
        "useCuDNNEngine",
        "rngSeed",
        "rngOffset",
        "disableRegularization",
        "phase",
        "outputRank",
    )
)
MAX_STEPS = 1 << 20


class CNTKNetwork(nn.Module):
    """A model of CNTK 2; parameters are Parameters under their uid, constants buffers.

    Inputs are row-major with the dynamic axes in front, as in CNTK's Python API: [B, *shape], or [B, T, *shape] for a
    sequence. A batch of sequences of different lengths is a list of [T_i, *shape] or a `PackedSequence`; outputs come in the
    same form. A sparse input of shape [V] is also taken as indices [B] or [B, T] or as a sparse tensor [B, V].

    `input_names` and `output_names` are the names in the file, or uids where it gives none; `input_shapes` are the static
    shapes; `sequence_inputs` name those with a sequence axis.

    Raises:
        FormatError: an operator or attribute is unknown, or the file contradicts itself; names file and function.
    """

    def __init__(self, model_path: str | Path) -> None:
        super().__init__()
        model = read_model(model_path)
        self.path = model.path
        self.program = Program(model)
        check_reachable(self.program)
        self._functions = {uid: _apply(model.functions[uid], len(refs)) for uid, refs in self.program.inputs.items()}
        self.weights = nn.ParameterDict()
        self.constants = nn.ParameterDict()
        used = [source for refs in self.program.inputs.values() for source, _ in refs]
        variables = [model.variables[uid] for uid in dict.fromkeys(used) if uid in model.variables]
        for variable in variables:
            if variable.kind in (PARAMETER, CONSTANT):
                self._add(variable)
            elif variable.kind != INPUT:
                raise FormatError(f"placeholder {variable.uid!r} is bound to nothing", path=self.path)
        # The order of the file, not of the walk from the outputs.
        inputs = [v for v in model.variables.values() if v.kind == INPUT and v in variables]
        self._inputs = {_unique(variable, inputs): variable for variable in inputs}
        self.input_names = tuple(self._inputs)
        self.input_shapes = {name: tuple(variable.shape)[::-1] for name, variable in self._inputs.items()}
        self.sequence_inputs = tuple(name for name, variable in self._inputs.items() if _num_dynamic(variable) == 2)
        self.output_names = self.program.output_names

    def _add(self, variable: Variable) -> None:
        assert variable.value is not None
        value = torch.from_numpy(variable.value.astype("float32", copy=True))
        if variable.kind == PARAMETER:
            self.weights[variable.uid.replace(".", "_")] = nn.Parameter(value)
        else:
            self.constants[variable.uid.replace(".", "_")] = nn.Parameter(value, requires_grad=False)

    def forward(self, *inputs: Given, **named: Given) -> object:
        """Inputs in the order of `input_names`, or by name -> the output, or outputs in the order of the file.

        Raises:
            InputError: an input is missing or does not fit; names the function.
        """
        given = {**dict(zip(self.input_names, inputs, strict=False)), **named}
        if len(inputs) > len(self.input_names) or set(given) != set(self.input_names):
            raise InputError(f"got inputs {list(given)}; the model reads {list(self.input_names)}", field="inputs")
        values: dict[Reference, Value] = {}
        for key, tensor in (*self.weights.items(), *self.constants.items()):
            values[key, 0] = Value(tensor, 0)
        for name, variable in self._inputs.items():
            values[variable.uid, 0] = _to_value(name, variable, given[name])
        for part in self.program.parts:
            if part.direction == 0:
                function = part.functions[0]
                values[function.uid, 0] = self._call(function, values)
            elif is_recording():
                self._record(part, values)
            else:
                self._recur(part, values)
        outputs = []
        for reference in self.program.outputs:
            if reference not in values:
                raise InputError(f"{self.path}: output {reference} is not computed", field="outputs")
            outputs.append(_like(values[reference], given))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _call(self, function: Function, values: Mapping[Reference, Value]) -> Value:
        if torch.compiler.is_compiling():
            return self._perform(function, values)
        try:
            return self._perform(function, values)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError, OverflowError, ZeroDivisionError) as error:
            if isinstance(error, LockstepError) and str(error).startswith(self.path):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{self.path}: {function.uid} ({_operator(function)}) cannot take its inputs: {reason}",
                field=function.uid,
            ) from error

    def _perform(self, function: Function, values: Mapping[Reference, Value]) -> Value:
        inputs = [values[reference] for reference in self.program.inputs[function.uid]]
        if function.op in (PAST, FUTURE):
            return _delay(function, inputs[0].dense(), inputs[1].dense())
        return self._functions[function.uid](inputs, self.training)

    def _recur(self, part: Part, values: dict[Reference, Value]) -> None:
        """Run a recurrence step by step; values from outside are taken at their step."""
        inside = {function.uid for function in part.functions}
        outer = {
            reference: values[reference].dense()
            for function in part.functions
            for reference in self.program.inputs[function.uid]
            if reference[0] not in inside and reference in values
        }
        sequences = [value for value in outer.values() if value.num_dynamic == 2]
        if not sequences:
            raise InputError(
                f"{self.path}: the recurrence of {part.functions[0].uid} reads no sequence", field="inputs"
            )
        num_rows = max(value.tensor.shape[0] for value in sequences)
        num_steps = max(value.tensor.shape[1] for value in sequences)
        lengths = next((value.lengths for value in sequences if value.lengths is not None), None)
        history: dict[str, list[Value]] = {uid: [] for uid in inside}
        steps = range(num_steps) if part.direction > 0 else range(num_steps - 1, -1, -1)
        for step in steps:
            now = {
                reference: Value(value.tensor[:, step], 1) if value.num_dynamic == 2 else value
                for reference, value in outer.items()
            }
            for function in part.functions:
                if function.op in (PAST, FUTURE):
                    now[function.uid, 0] = self._earlier(function, history, outer, now, step, lengths, num_rows)
            for function in part.functions:
                if function.op not in (PAST, FUTURE):
                    now[function.uid, 0] = self._call(function, now)
            for uid in inside:
                history[uid].append(now[uid, 0])
        for uid, kept in history.items():
            ordered = kept if part.direction > 0 else kept[::-1]
            static = torch.broadcast_shapes(*(value.static for value in ordered))
            rows = [value.tensor.expand(num_rows, *static) for value in ordered]
            values[uid, 0] = Value(torch.stack(rows, 1), 2, lengths)

    def _record(self, part: Part, values: dict[Reference, Value]) -> None:
        """The same recurrence as one loop of a trace: delayed values are its states, all rows have the same length."""
        inside = {function.uid for function in part.functions}
        delays = [function for function in part.functions if function.op in (PAST, FUTURE)]
        others = [function for function in part.functions if function.op not in (PAST, FUTURE)]
        refs = dict.fromkeys(ref for function in part.functions for ref in self.program.inputs[function.uid])
        known = {ref: values[ref].dense() for ref in refs if ref[0] not in inside}
        scanned = {ref: value for ref, value in known.items() if value.num_dynamic == 2}
        outer = {ref: value for ref, value in known.items() if ref not in scanned}
        if not scanned or any(value.lengths is not None for value in scanned.values()):
            raise InputError(f"{self.path}: a recurrence without sequences of one length", field="inputs")
        num_rows = next(iter(scanned.values())).tensor.shape[0]
        states = []
        for function in delays:
            initial = outer[self.program.inputs[function.uid][1]]
            static = torch.broadcast_shapes(initial.static, self._declared(function))
            front = initial.tensor.shape[:1] if initial.num_dynamic else (num_rows,)
            states += [initial.tensor.expand(*front, *static).contiguous()] * _offset(function)
        read = {ref for uid, refs in self.program.inputs.items() if uid not in inside for ref in refs}
        wanted = [f for f in part.functions if (f.uid, 0) in read or (f.uid, 0) in self.program.outputs]

        def step(states: list[Tensor], slices: list[Tensor], given: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            now = {ref: Value(x, 1) for ref, x in zip(scanned, slices, strict=True)}
            now |= {ref: Value(x, value.num_dynamic) for (ref, value), x in zip(outer.items(), given, strict=True)}
            later, at = [], 0
            for function in delays:
                now[function.uid, 0] = Value(states[at], 1)
                at += _offset(function)
            for function in others:
                now[function.uid, 0] = self._call(function, now).dense()
            at = 0
            for function in delays:
                end = at + _offset(function)
                newest = now[self.program.inputs[function.uid][0]].tensor.expand(*states[at].shape)
                later += [*states[at + 1 : end], newest]
                at = end
            rows = states[0].shape[0]
            return later, [now[f.uid, 0].tensor.expand(rows, *now[f.uid, 0].static).clone() for f in wanted]

        # The first axis of a loop is the steps, in the order of time that the delay looks along.
        turned = [value.tensor.transpose(0, 1) for value in scanned.values()]
        turned = turned if part.direction > 0 else [x.flip(0) for x in turned]
        _, results = loop(step, states, turned, [value.tensor for value in outer.values()])
        for function, result in zip(wanted, results, strict=True):
            ordered = result if part.direction > 0 else result.flip(0)
            values[function.uid, 0] = Value(ordered.transpose(0, 1), 2)

    def _declared(self, function: Function) -> tuple[int, ...]:
        """The static shape that the file gives a delayed operand, where it does."""
        variable = self.program.model.variables.get(function.inputs[0])
        shape = () if variable is None else tuple(variable.shape)[::-1]
        return shape if all(dim > 0 for dim in shape) else ()

    def _earlier(
        self,
        function: Function,
        history: Mapping[str, list[Value]],
        outer: Mapping[Reference, Value],
        now: Mapping[Reference, Value],
        step: int,
        lengths: Tensor | None,
        num_rows: int,
    ) -> Value:
        """What a delay yields at a step: an earlier result, or the initial state."""
        operand, start = self.program.inputs[function.uid]
        offset = _offset(function)
        if start not in now:
            raise InputError(
                f"{self.path}: the initial state of {function.uid} depends on its recurrence", field=function.uid
            )
        initial = now[start]
        done = history.get(operand[0])
        if done is None:  # the operand lies outside of the recurrence
            source = outer[operand]
            at = step - offset if function.op == PAST else step + offset
            inside = source.num_dynamic == 2 and 0 <= at < source.tensor.shape[1]
            earlier = Value(source.tensor[:, at], 1) if inside else None
        else:
            earlier = done[-offset] if offset <= len(done) else None
        if earlier is None:
            static = torch.broadcast_shapes(initial.static, self._declared(function))
            front = initial.tensor.shape[:1] if initial.num_dynamic else (num_rows,)
            return Value(initial.tensor.expand(*front, *static), 1)
        if function.op == FUTURE and lengths is not None:
            is_real = (step + offset < lengths).reshape(-1, *(1,) * len(earlier.static))
            fill = initial.tensor if initial.num_dynamic else initial.tensor[None]
            return Value(torch.where(is_real, earlier.tensor, fill), 1)
        return earlier


def _offset(function: Function) -> int:
    offset = function.settings.get("offset", 1)
    if not isinstance(offset, int) or not 1 <= offset <= MAX_STEPS:
        raise function.fail(f"offset={offset!r:.40} must be a positive integer")
    return offset


def _delay(function: Function, value: Value, initial: Value) -> Value:
    """A delay outside of any recurrence: the whole sequence shifted."""
    offset = _offset(function)
    if value.num_dynamic != 2:
        raise InputError("a delay of an operand without a sequence", field=function.uid)
    static = torch.broadcast_shapes(value.static, initial.static)
    tensor = value.tensor.expand(*value.tensor.shape[:2], *static)
    start = initial.tensor.expand(tensor.shape[0], *static)
    if function.op == PAST:
        return Value(shift(tensor, start, offset, 1), 2, value.lengths)
    shifted = shift(tensor, start, -offset, 1)
    if value.lengths is not None:
        time = torch.arange(tensor.shape[1], device=tensor.device)
        is_real = (time + offset < value.lengths[:, None]).reshape(*tensor.shape[:2], *(1,) * len(static))
        shifted = torch.where(is_real, shifted, start[:, None])
    return Value(shifted, 2, value.lengths)


def _operator(function: Function) -> str:
    return {PAST: "PastValue", FUTURE: "FutureValue"}.get(function.op) or CONVOLUTIONS[function.op][0]


def _apply(function: Function, num_inputs: int) -> Apply:
    attributes = Attributes(function, function.settings)
    apply: Apply
    if function.op in (PAST, FUTURE):
        _offset(function)
        attributes.get("offset", 1)
        least, apply = 2, _never
    elif function.op in CONVOLUTIONS:
        _, least, make = CONVOLUTIONS[function.op]
        apply = make(function, attributes)
    else:
        known = {str(number): name for number, (name, _, _) in CONVOLUTIONS.items()}
        raise function.fail(f"{unknown_name('operator number', str(function.op), known)[:160]}")
    if num_inputs < least:
        raise function.fail(f"has {num_inputs} inputs; {least} were expected")
    unread = attributes.unread(_HARMLESS)
    if unread:
        raise function.fail(f"attribute {unread[0]}={attributes.values[unread[0]]!r:.60} is not supported")
    return apply


def _never(inputs: Sequence[Value], training: bool) -> Value:
    raise AssertionError("delays are run by the network")


def _num_dynamic(variable: Variable) -> int:
    return min(len(variable.dynamic_axes), 2) if BATCH_AXIS in variable.dynamic_axes else len(variable.dynamic_axes)


def _unique(variable: Variable, inputs: list[Variable]) -> str:
    same = [other for other in inputs if other.name == variable.name]
    return variable.name if variable.name and len(same) == 1 else variable.uid


def _to_value(name: str, variable: Variable, given: Given) -> Value:
    """An input as a value; its static shape is held against the file's."""
    num_dynamic, shape = _num_dynamic(variable), tuple(variable.shape)[::-1]
    classes = shape[0] if variable.is_sparse and len(shape) == 1 else 0
    if not isinstance(given, Tensor):
        if num_dynamic != 2:
            raise InputError(f"input {name!r} has no sequence axis; give a tensor [B, *{list(shape)}]", field=name)
        sequences = unpack_sequence(given) if isinstance(given, PackedSequence) else list(given)
        is_index = bool(classes and sequences and sequences[0].ndim == 1 and not sequences[0].is_floating_point())
        value = from_sequences(sequences, classes if is_index else 0)
    else:
        is_index = bool(classes and given.ndim == num_dynamic and not given.is_floating_point())
        value = Value(given, num_dynamic, None, classes if is_index else 0)
    if value.num_classes:
        if bool(((value.tensor < 0) | (value.tensor >= value.num_classes)).any()):
            raise InputError(f"input {name!r}: indices must lie in [0, {value.num_classes})", field=name)
        return value
    fits = value.tensor.ndim == num_dynamic + len(shape) and all(
        dim < 0 or dim == got for dim, got in zip(shape, value.static, strict=False)
    )
    if not fits:
        axes = ["B", "T"][:num_dynamic]
        raise InputError(
            f"input {name!r} has shape {tuple(value.tensor.shape)}; {[*axes, *shape]} was expected", field=name
        )
    return value


def _like(value: Value, given: Mapping[str, Given]) -> object:
    """An output in the form of the sequence inputs."""
    value = value.dense()
    forms = [item for item in given.values() if not isinstance(item, Tensor)]
    if value.num_dynamic != 2 or not forms:
        return value.tensor
    sequences = to_sequences(value)
    return pack_sequence(sequences, enforce_sorted=False) if isinstance(forms[0], PackedSequence) else sequences


def load_cntk(path: str | Path) -> CNTKNetwork:
    """Load a `.model` or `.dnn` of CNTK 2 without CNTK; every parameter is trainable.

    Raises:
        FormatError: it is missing, damaged or not known; names file, function and operator, or offset.
    """
    return CNTKNetwork(path).eval()
