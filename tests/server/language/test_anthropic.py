"""Anthropic's own client with strict validation against a live server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.language.tiny import LiveServer

pytestmark = pytest.mark.slow


def anthropic() -> Any:
    """The package, imported by the first test that uses it: the other process of the suite never needs its seconds."""
    return pytest.importorskip("anthropic")


USER = [{"role": "user", "content": "hello the world"}]
TOOL = {
    "name": "weather",
    "description": "the weather of a place",
    "input_schema": {
        "type": "object",
        "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["days"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Any]:
    with anthropic().Anthropic(
        base_url=server.url, api_key="none", _strict_response_validation=True, max_retries=0
    ) as client:
        yield client


def wishes(**changes: Any) -> dict[str, Any]:
    """A request; the client's own arguments no longer have the sampling fields, which the protocol still has."""
    extra = {"temperature": changes.pop("temperature", 0.0)} | changes.pop("extra_body", {})
    return {"model": "tiny", "messages": USER, "max_tokens": 16, "extra_body": extra, **changes}


def test_text(client: Any, http: httpx.Client) -> None:
    blocks = [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]
    reply = client.messages.create(**wishes(system=blocks))
    chat = [{"role": "system", "content": "be\nbrief"}, *USER]
    same = http.post("/v1/chat/completions", json={"messages": chat, "max_tokens": 16, "temperature": 0}).json()
    assert reply.content[0].text == same["choices"][0]["message"]["content"]
    usage = reply.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == same["usage"]["prompt_tokens"]
    assert usage.output_tokens == same["usage"]["completion_tokens"]
    assert (
        client.messages.count_tokens(model="tiny", messages=USER, system=blocks).input_tokens
        == (same["usage"]["prompt_tokens"])
    )


def test_events_come_in_order(client: Any, http: httpx.Client) -> None:
    whole = client.messages.create(**wishes())
    events = list(client.messages.create(**wishes(), stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event.delta.text for event in events[2:-3]) == whole.content[0].text
    assert events[-2].delta.stop_reason == whole.stop_reason
    assert events[-2].usage.output_tokens == whole.usage.output_tokens
    with http.stream(
        "POST",
        "/v1/messages",
        json={"model": "tiny", "messages": USER, "max_tokens": 16, "temperature": 0, "stream": True},
    ) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert [line.partition(": ")[0] for line in lines] == ["event", "data"] * len(events)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_tools(client: Any, choice: Any) -> None:
    ask = wishes(tools=[TOOL], tool_choice=choice, max_tokens=600)
    reply = client.messages.create(**ask)
    assert reply.stop_reason == "tool_use"
    (call,) = reply.content
    assert call.name == "weather"
    assert 1 <= call.input["days"] <= 9
    with client.messages.stream(**ask) as stream:
        (streamed,) = stream.get_final_message().content
    assert (streamed.type, streamed.input) == ("tool_use", call.input)
    turn = {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": call.id, "name": call.name, "input": call.input}],
    }
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    back = [*USER, turn, {"role": "user", "content": [result, {"type": "text", "text": "so?"}]}]
    assert client.messages.create(**wishes(messages=back, tools=[TOOL])).usage.output_tokens > 0


def test_thinking(client: Any) -> None:
    ask = wishes(thinking={"type": "enabled", "budget_tokens": 1024}, temperature=1.0, extra_body={"seed": 2})
    reply = client.messages.create(**ask)
    assert reply.content[0].type == "thinking"
    with client.messages.stream(**ask) as stream:
        assert stream.get_final_message().content[0].thinking == reply.content[0].thinking


def test_stop_sequences_and_models(client: Any) -> None:
    bias = {"logit_bias": {"119": 100}}
    text = client.messages.create(**wishes(extra_body=bias)).content[0].text
    reply = client.messages.create(**wishes(extra_body=bias, stop_sequences=[text[:3]]))
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", text[:3])
    assert (reply.content[0].text, reply.usage.output_tokens) == ("", 3)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_errors(client: Any, http: httpx.Client) -> None:
    for bad, match in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3.0}, "temperature"),
        ({"messages": []}, "messages"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content\[0\].type"),
    ):
        with pytest.raises(anthropic().BadRequestError, match=match):
            client.messages.create(**wishes(**bad))
    with pytest.raises(anthropic().NotFoundError):
        client.messages.create(**wishes(model="other"))
    error = http.post("/v1/messages", content=b"{").json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"


def test_output_follows_a_schema(client: Any) -> None:
    form = {"type": "json_schema", "schema": TOOL["input_schema"]}
    for extra in ({"output_config": {"format": form, "effort": "low"}}, {"output_format": form}):
        reply = client.messages.create(**wishes(extra_body=extra, max_tokens=60))
        assert 1 <= json.loads(reply.content[0].text)["days"] <= 9


def test_the_answer_goes_on_with_what_was_begun(client: Any, http: httpx.Client) -> None:
    messages = [*USER, {"role": "assistant", "content": "well"}]
    reply = client.messages.create(**wishes(messages=messages))
    prompt = "<|im_start|>user\nhello the world<|im_end|>\n<|im_start|>assistant\nwell"
    body = {"prompt": prompt, "add_special_tokens": False, "max_tokens": 16, "temperature": 0}
    assert reply.content[0].text == http.post("/v1/completions", json=body).json()["choices"][0]["text"]


def test_what_is_not_served_is_said_and_requests_have_ids(client: Any, http: httpx.Client) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    result = {"type": "tool_result", "tool_use_id": "x", "content": [image]}
    for part in (image, result):
        with pytest.raises(anthropic().BadRequestError, match="text only") as caught:
            client.messages.create(**wishes(messages=[{"role": "user", "content": [part]}]))
        assert caught.value.request_id
    told = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hello the world"}}
    reply = client.messages.create(**wishes(messages=[{"role": "user", "content": [told]}]))
    assert reply.content[0].text == client.messages.create(**wishes()).content[0].text
    replies = [
        client.messages.create(**wishes(messages=[{"role": "user", "content": [{**result, "content": [part]}]}]))
        for part in (told, {"type": "text", "text": "hello the world"})
    ]
    assert replies[0].content[0].text == replies[1].content[0].text
    with pytest.raises(anthropic().BadRequestError, match=r"thinking\.type"):
        client.messages.create(**wishes(extra_body={"thinking": {"type": "some"}}))
    assert client.messages.create(**wishes())._request_id
    given = http.post("/v1/messages", json={}, headers={"x-request-id": "mine"}).headers["request-id"]
    assert given == "mine"
