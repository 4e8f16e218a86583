"""Routes that change a running server, as vLLM and SGLang name them. Only with `LanguageConfig.admin`.

POST /v1/load_lora_adapter, /v1/unload_lora_adapter                     (vLLM)
POST /update_weights_from_disk, GET /get_weight_version                 (SGLang)
POST /update_weights_from_shared_memory                                 (ours)
POST /pause, /resume, /sleep, /wake_up; GET /is_paused, /is_sleeping    (vLLM)
POST /pause_generation, /continue_generation, /flush_cache              (SGLang)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response

from lockstep.engine.engine import Gate, PauseMode
from lockstep.server.fields import Fields
from lockstep.server.limits import decoded, parse_json
from lockstep.server.replies import Refusal, json_reply
from lockstep.server.service import LanguageService
from lockstep.server.updates import Update, Updates

MODES = {
    "abort": PauseMode.ABORT,
    "wait": PauseMode.WAIT,
    "keep": PauseMode.KEEP,
    "recompute": PauseMode.RECOMPUTE,
    # SGLang's words for the last two.
    "in_place": PauseMode.KEEP,
    "retract": PauseMode.RECOMPUTE,
}
Handler = Callable[[Updates, Fields], Awaitable[Any]]


async def load_lora(updates: Updates, fields: Fields) -> str:
    """vLLM answers in words."""
    name, path = fields.needed_text("lora_name"), fields.needed_text("lora_path")
    await updates.load_adapter(name, path, in_place=fields.flag("load_inplace"))
    return f"Success: LoRA adapter '{name}' added successfully."


async def unload_lora(updates: Updates, fields: Fields) -> str:
    name = fields.needed_text("lora_name")
    await updates.unload_adapter(name)
    return f"Success: LoRA adapter '{name}' removed successfully."


async def update_from_disk(updates: Updates, fields: Fields) -> dict[str, Any]:
    return await _update(updates, fields, path=fields.needed_text("model_path"))


async def update_from_shared_memory(updates: Updates, fields: Fields) -> dict[str, Any]:
    return await _update(updates, fields, shared_memory=fields.needed_text("shared_memory"))


async def _update(updates: Updates, fields: Fields, **source: str) -> dict[str, Any]:
    update = Update(
        partial=fields.flag("partial"),
        version=_version(fields),
        digest=fields.text("digest", "") or "",
        mode=PauseMode.ABORT if fields.flag("abort_all_requests") else _mode(fields, "keep"),
        **source,
    )
    found = await updates.update(update)
    message = f"serving version {found['version']}, digest {found['digest']}"
    return {"success": True, "message": message, **found}


async def pause(updates: Updates, fields: Fields) -> dict[str, Any]:
    await updates.pause(_mode(fields, "abort"))
    return {"status": "paused"}


async def resume(updates: Updates, fields: Fields) -> dict[str, Any]:
    await updates.resume()
    return {"status": "resumed"}


async def sleep(updates: Updates, fields: Fields) -> dict[str, Any]:
    if str(fields.values.get("level", "1")) != "1":
        raise fields.refused("level", "only 1 is supported: keys and values are given back, the weights stay")
    await updates.sleep()
    return {"status": "asleep"}


async def flush_cache(updates: Updates, fields: Fields) -> dict[str, Any]:
    await updates.flush()
    return {"status": "flushed"}


POSTED: dict[str, Handler] = {
    "/v1/load_lora_adapter": load_lora,
    "/v1/unload_lora_adapter": unload_lora,
    "/update_weights_from_disk": update_from_disk,
    "/update_weights_from_shared_memory": update_from_shared_memory,
    "/pause": pause,
    "/pause_generation": pause,
    "/resume": resume,
    "/continue_generation": resume,
    "/sleep": sleep,
    "/wake_up": resume,
    "/flush_cache": flush_cache,
    "/reset_prefix_cache": flush_cache,
}


def add_admin_routes(app: FastAPI, service: LanguageService, updates: Updates) -> None:
    """The routes; without `admin` they answer 403 and say how to get them."""
    for path, handler in POSTED.items():
        app.add_api_route(path, _posted(service, updates, handler), methods=["POST"], response_class=Response)

    async def gate() -> Gate:
        _allow(service)
        return await updates.gate()

    @app.get("/is_paused")
    async def is_paused() -> dict[str, bool]:
        return {"is_paused": await gate() is not Gate.OPEN}

    @app.get("/is_sleeping")
    async def is_sleeping() -> dict[str, bool]:
        return {"is_sleeping": await gate() is Gate.ASLEEP}

    @app.get("/get_weight_version")
    async def get_weight_version() -> dict[str, Any]:
        service.check_open()
        return await updates.weights()


def _posted(service: LanguageService, updates: Updates, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        _allow(service)
        body = decoded(await request.body(), dict(request.headers.raw), service.config.max_body_bytes)
        # vLLM's routes take their few words in the query.
        values = {**request.query_params, **(parse_json(body) if body.strip() else {})}
        found = await handler(updates, Fields(values))
        if isinstance(found, str):
            return Response(found, media_type="text/plain")
        reply = json_reply(found)
        return Response(reply.body, reply.status, media_type="application/json")

    return answer


def _allow(service: LanguageService) -> None:
    if not service.config.admin:
        raise Refusal(403, "this server was started without --admin, so it cannot be changed while it runs")
    service.check_open()


def _mode(fields: Fields, default: str) -> PauseMode:
    name = "pause_mode" if "pause_mode" in fields else "mode"
    word = fields.one_of(name, tuple(MODES), default)
    assert word is not None
    return MODES[word]


def _version(fields: Fields) -> int | None:
    """SGLang's clients send it as a string."""
    value = fields.values.get("weight_version")
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 18:
        return int(value)
    return fields.integer("weight_version", None, low=0)
