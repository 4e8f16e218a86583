"""Changing what a running server serves: its weights, its adapters, whether it steps.

    update --thread: read, check, build a second model, digest--> worker: Engine.publish swaps --> the old model is freed

Until the swap nothing of the served model is touched: an update that does not fit leaves it as it is. One update at a time;
a second is refused at once. A wait for samples to end has a deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lockstep.core.errors import ConfigError, FormatError, InputError
from lockstep.core.request import WeightsVersion
from lockstep.core.tensors import TensorSource
from lockstep.engine.adapters import served_weights
from lockstep.engine.engine import Engine, Gate, PauseMode, replace_model
from lockstep.interop.hf.peft import load_adapter
from lockstep.interop.shared_tensors import read_shared
from lockstep.interop.weights import open_weights
from lockstep.models.dict_source import DictSource
from lockstep.models.digest import adapter_digest, weights_digest
from lockstep.models.families import current_tensors, model_like
from lockstep.models.language import LanguageModel
from lockstep.server.replies import Refusal
from lockstep.server.service import LanguageService

DRAIN_S = 600.0
POLL_S = 0.02
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Update:
    """New numbers for the model."""

    path: str = ""
    """A model folder, GGUF file or safetensors file on this machine."""
    shared_memory: str = ""
    """Instead: a segment as `interop.shared_tensors` writes it."""
    partial: bool = False
    """It holds some of the tensors; the others stay."""
    version: int | None = None
    """None: the next."""
    digest: str = ""
    """What `weights_digest` of the new model must be; empty: not compared."""
    mode: PauseMode = PauseMode.KEEP


class Updates:
    """What the admin routes do."""

    def __init__(self, service: LanguageService) -> None:
        self._service = service
        self._lock = asyncio.Lock()

    async def weights(self) -> dict[str, Any]:
        """Version and digest of the model and of every adapter."""
        await self._service.digest_known()
        return await self._service.engine.call(_weights)

    async def update(self, update: Update) -> dict[str, Any]:
        """Serve new weights; what `weights` says afterwards.

        Raises:
            Refusal: 400 it does not fit, 409 another update runs, 504 samples did not end in time.
        """
        async with self._alone():
            await self._service.digest_known()
            old = await self._service.engine.call(lambda engine: engine.model)
            assert isinstance(old, LanguageModel)
            model, digest = await _checked(lambda: _build(old, update))
            if update.digest and update.digest != digest:
                raise Refusal(
                    400,
                    f"the new weights have digest {digest}, not {update.digest}; the old ones serve on",
                    field="digest",
                )

            def publish(engine: Engine) -> int:
                version = engine.weights.version + 1 if update.version is None else update.version
                engine.publish(version, digest, mode=update.mode, update=lambda: replace_model(engine, model))
                return version

            version = await self._told(publish)
            await self._until(lambda engine: engine.weights.version == version, "the update is served once they have")
            return await self.weights()

    async def load_adapter(self, name: str, path: str, *, in_place: bool) -> None:
        """Clients may name it from now on.

        Raises:
            Refusal: 400 the name is taken (unless `in_place`), or the adapter does not fit; 404 no such folder.
        """
        async with self._alone():
            service = self._service
            if name == service.name or (name in service.adapters and not in_place):
                raise Refusal(
                    400, f"the name {name!r} is taken; unload it first, or load_inplace: true", field="lora_name"
                )
            if not Path(path).is_dir():
                raise Refusal(404, f"there is no adapter folder {path!r}", field="lora_path")
            model = await service.engine.call(lambda engine: engine.model)
            assert isinstance(model, LanguageModel)

            def read() -> tuple[Any, str]:
                adapter = load_adapter(model, path)
                return adapter, adapter_digest(adapter)

            adapter, digest = await _checked(read)

            def load(engine: Engine) -> None:
                version = engine.adapters.get(name).weights.version + 1 if name in engine.adapters else 0
                engine.adapters.load(name, adapter, WeightsVersion(version, digest))

            await self._told(load)
            service.adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        """New requests may not name it.

        Raises:
            Refusal: 404, it is not loaded.
        """
        if name not in self._service.adapters:
            known = ", ".join(map(repr, self._service.adapters)) or "none"
            raise Refusal(404, f"the adapter {name[:80]!r} is not loaded; loaded: {known}", field="lora_name")
        async with self._alone():
            await self._told(lambda engine: engine.adapters.unload(name))
            del self._service.adapters[name]

    async def pause(self, mode: PauseMode) -> None:
        """No steps until `resume`; under WAIT when what runs has ended."""

        def ask(engine: Engine) -> None:
            if engine.gate is not Gate.PAUSED:
                engine.pause(mode)

        await self._told(ask)
        await self._until(lambda engine: engine.gate is not Gate.DRAINING, "the engine pauses once they have")

    async def resume(self) -> None:
        """After `pause` or `sleep`."""
        await self._told(lambda engine: None if engine.gate is Gate.OPEN else engine.resume())

    async def sleep(self) -> None:
        """Gives the memory of keys and values back; samples go on after `resume`."""
        await self._told(lambda engine: None if engine.gate is Gate.ASLEEP else engine.sleep())

    async def flush(self) -> None:
        """Forgets the prefix cache."""
        await self._told(lambda engine: engine.flush_prefixes())

    async def gate(self) -> Gate:
        """What the engine may do now."""
        return await self._service.engine.call(lambda engine: engine.gate)

    def _alone(self) -> asyncio.Lock:
        if self._lock.locked():
            raise Refusal(409, "another update of this server runs; try again when it has ended", retry_after_s=1)
        return self._lock

    async def _told(self, function: Callable[[Engine], T]) -> T:
        try:
            return await self._service.engine.call(function)
        except (ConfigError, InputError) as error:
            raise Refusal(400, str(error)) from error

    async def _until(self, done: Callable[[Engine], bool], later: str) -> None:
        deadline = time.monotonic() + DRAIN_S
        while not await self._service.engine.call(done):
            if time.monotonic() > deadline:
                raise Refusal(504, f"samples still run after {DRAIN_S:.0f} s; {later}")
            await asyncio.sleep(POLL_S)


def _weights(engine: Engine) -> dict[str, Any]:
    base = engine.weights
    adapters = {}
    for loaded in engine.adapters:
        weights = served_weights(base, loaded)
        adapters[loaded.name] = {"version": weights.version, "digest": weights.digest}
    return {"version": base.version, "digest": base.digest, "weight_version": str(base.version), "adapters": adapters}


async def _checked(function: Callable[[], T]) -> T:
    """Run in a thread; what does not fit is the client's error."""
    try:
        return await asyncio.to_thread(function)
    except (ConfigError, InputError, FormatError) as error:
        raise Refusal(400, f"{error}; what was served before serves on") from error


def _build(old: LanguageModel, update: Update) -> tuple[LanguageModel, str]:
    source: TensorSource
    if update.shared_memory:
        source = DictSource(read_shared(update.shared_memory))
    else:
        source = open_weights(update.path, single_file=True)
    if update.partial:
        tensors = current_tensors(old)
        for name in source.names():
            if name not in tensors:
                raise FormatError(f"the update's tensor {name!r} is not one of this model")
            tensors[name] = source.tensor(name)
        source = DictSource(tensors)
    model = model_like(old, source)
    return model, weights_digest(model)
