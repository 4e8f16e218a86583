"""The order in which a CNTK model runs: blocks resolved, functions sorted, recurrences found.

    functions, blocks, placeholders -> references of primitive operators -> strongly connected parts in order

A part with more than one function, or one that reads itself, is a recurrence over the steps of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.core.errors import FormatError
from lockstep.interop.cntk.reader import OUTPUT, PLACEHOLDER, Function, Model

BLOCK, COMBINE, PAST, FUTURE = 57, 44, 37, 38
Reference = tuple[str, int]
"""A function's or variable's uid with the number of the output."""


@dataclass(frozen=True)
class Part:
    """Functions in order; `direction` is 1 for a recurrence forward in time, -1 for one backward, 0 for none."""

    functions: tuple[Function, ...]
    direction: int


class Program:
    """A model's primitive functions in order, each with the references of its inputs."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._placeholders = {key: value for item in model.functions.values() for key, value in item.bound}
        self.inputs: dict[str, tuple[Reference, ...]] = {}
        self.outputs, self.output_names = self._outputs(model.root)
        self._collect()
        self.parts = tuple(self._part(names) for names in _components(self.inputs, self._successors()))

    def _outputs(self, root: str) -> tuple[tuple[Reference, ...], tuple[str, ...]]:
        """The model's outputs with their names: the function's where it has one, else its uid."""
        function = self.model.functions[root]
        name = function.name or function.uid
        for _ in self.model.functions:
            if function.op != BLOCK:
                break
            function = self._root_of(function)
        if function.op != COMBINE:
            return ((function.uid, 0),), (name,)
        names = []
        for source in function.inputs:
            owner = self.model.functions.get(_owner(source)[0])
            names.append(owner.name if owner is not None and owner.name else source.removesuffix("_Output_0"))
        return tuple(self.resolve(source, function) for source in function.inputs), tuple(names)

    def _root_of(self, block: Function) -> Function:
        if block.root not in self.model.functions:
            raise block.fail(f"its root function {block.root!r} does not exist")
        return self.model.functions[block.root]

    def resolve(self, name: str, reader: Function) -> Reference:
        """What a name stands for, through placeholders, blocks and combinations.

        Raises:
            FormatError: nothing defines it, or the definitions go round in a circle.
        """
        model = self.model
        start = name
        index = 0
        for _ in range(4 * len(model.functions) + 4):
            if name in self._placeholders:
                name, index = self._placeholders[name], 0
                continue
            variable = model.variables.get(name)
            if variable is not None and variable.kind not in (OUTPUT, PLACEHOLDER):
                return name, 0
            owner, index = _owner(name) if "_Output_" in name else (name, index)
            function = model.functions.get(owner)
            if function is None:
                raise reader.fail(f"input {start!r} is defined nowhere ({name!r})")
            if function.op == BLOCK:
                function = self._root_of(function)
                name = f"{function.uid}_Output_{index}"
                if function.op not in (BLOCK, COMBINE):
                    return function.uid, index
                continue
            if function.op == COMBINE:
                if index >= len(function.inputs):
                    raise reader.fail(
                        f"input {start!r} is output {index} of {function.uid}, which has {len(function.inputs)}"
                    )
                name, index = function.inputs[index], 0
                continue
            return function.uid, index
        raise reader.fail(f"input {start!r} is defined by itself")

    def _collect(self) -> None:
        waiting = [uid for uid, _ in self.outputs if uid in self.model.functions]
        while waiting:
            uid = waiting.pop()
            if uid in self.inputs:
                continue
            function = self.model.functions[uid]
            self.inputs[uid] = tuple(self.resolve(name, function) for name in function.inputs)
            waiting += [source for source, _ in self.inputs[uid] if source in self.model.functions]

    def _successors(self) -> dict[str, list[str]]:
        return {uid: [source for source, _ in refs if source in self.inputs] for uid, refs in self.inputs.items()}

    def _part(self, names: list[str]) -> Part:
        functions = [self.model.functions[name] for name in names]
        inside = set(names)
        loops = len(names) > 1 or any(source == names[0] for source, _ in self.inputs[names[0]])
        if not loops:
            return Part(tuple(functions), 0)
        delays = {function.op for function in functions} & {PAST, FUTURE}
        if len(delays) != 1:
            raise functions[0].fail(
                "is part of a circle "
                + ("without PastValue or FutureValue" if not delays else "with both PastValue and FutureValue")
            )
        cut = {
            name: [source for source, _ in self.inputs[name] if source in inside]
            for name in names
            if self.model.functions[name].op not in (PAST, FUTURE)
        }
        ordered = _components(cut, {name: [s for s in sources if s in cut] for name, sources in cut.items()})
        if any(len(group) > 1 for group in ordered):
            raise functions[0].fail("is part of a circle that no PastValue or FutureValue breaks")
        order = [self.model.functions[group[0]] for group in ordered]
        held = [function for function in functions if function.op in (PAST, FUTURE)]
        return Part((*held, *order), 1 if PAST in delays else -1)


def _owner(name: str) -> tuple[str, int]:
    uid, _, number = name.rpartition("_Output_")
    return (uid, int(number)) if number.isdigit() and len(number) < 6 else (name, 0)


def _components(names: Mapping[str, object], sources: Mapping[str, list[str]]) -> list[list[str]]:
    """Strongly connected components, each after those it reads (Tarjan 1972, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    found: list[list[str]] = []
    for start in names:
        if start in index:
            continue
        work = [(start, 0)]
        while work:
            name, position = work.pop()
            if position == 0:
                index[name] = low[name] = len(index)
                stack.append(name)
                on_stack.add(name)
            children = sources.get(name, [])
            if position > 0:
                low[name] = min(low[name], low[children[position - 1]])
            while position < len(children) and children[position] in index:
                if children[position] in on_stack:
                    low[name] = min(low[name], index[children[position]])
                position += 1
            if position < len(children):
                work += [(name, position + 1), (children[position], 0)]
                continue
            if low[name] == index[name]:
                group: list[str] = []
                while not group or group[-1] != name:
                    group.append(stack.pop())
                    on_stack.discard(group[-1])
                found.append(group[::-1])
    return found


def check_reachable(program: Program) -> None:
    """Refuse a model that computes nothing.

    Raises:
        FormatError: no function leads to an output.
    """
    if not program.inputs:
        raise FormatError("computes nothing: its outputs are inputs or constants", path=program.model.path)
