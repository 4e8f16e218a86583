"""OpenAI's own client, which validates every object it is handed, against a live server."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from lockstep.core.sampling import SamplingParams
from lockstep.engine.llm import LLM
from tests.server.language.tiny import LiveServer


def openai() -> Any:
    """The package, imported by the first test that uses it: the other process of the suite never needs its seconds."""
    return pytest.importorskip("openai")


USER = [{"role": "user", "content": "hello the world"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}, "hot": {"type": "boolean"}},
            "required": ["days", "hot"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"days": 3, "hot": true}}</tool_call>'
CALL_REGEX = r'<tool_call>\{"name": "weather", "arguments": \{"days": 3, "hot": true\}\}</tool_call>'


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Any]:
    with openai().OpenAI(
        base_url=server.url + "/v1", api_key="none", _strict_response_validation=True, max_retries=0
    ) as client:
        yield client


@pytest.fixture(scope="module")
def lenient(server: LiveServer) -> Iterator[Any]:
    """For the two replies that the client's own types do not know: a streamed completion's chunks, whose finish_reason
    is null until the last, and embeddings in base64, which it decodes after validation."""
    with openai().OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm(server: LiveServer) -> LLM:
    return LLM(server.folder, memory_bytes=1 << 24, num_threads=1)


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lockstep"
    with pytest.raises(openai().NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_that_of_offline_generation(client: Any, lenient: Any, llm: LLM, temperature: float) -> None:
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=5, n=2)
    expected = [sample.text for sample in llm.generate("hello", params)[0]]
    wishes: dict[str, Any] = {
        "model": "tiny",
        "prompt": "hello",
        "max_tokens": 24,
        "temperature": temperature,
        "seed": 5,
    }
    reply = client.completions.create(**wishes, n=2)
    assert [choice.text for choice in reply.choices] == expected
    texts = ["", ""]
    for chunk in lenient.completions.create(**wishes, n=2, stream=True):
        for choice in chunk.choices:
            assert "\ufffd" not in choice.text or "\ufffd" in expected[choice.index]
            texts[choice.index] += choice.text
    assert texts == expected


def test_chat_streams_what_it_says_whole(client: Any, llm: LLM) -> None:
    wishes: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 30, "seed": 1, "temperature": 0.8}
    reply = client.chat.completions.create(**wishes)
    prompt = "<|im_start|>user\nhello the world<|im_end|>\n<|im_start|>assistant\n"
    sample = llm.generate(prompt, SamplingParams(max_tokens=30, seed=1, temperature=0.8))[0][0]
    assert reply.choices[0].message.content == sample.text
    assert reply.usage.prompt_tokens == len(sample.prompt)
    assert reply.usage.completion_tokens == len(sample.tokens)
    text, reasons, counts = "", [], []
    for chunk in client.chat.completions.create(**wishes, stream=True, stream_options={"include_usage": True}):
        if chunk.usage is not None:
            counts.append(chunk.usage)
            assert chunk.choices == []
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == sample.text
    assert reasons == [reply.choices[0].finish_reason]
    assert [count.completion_tokens for count in counts] == [len(sample.tokens)]
    # The prompt was there before: whole pages of it come from the cache.
    assert counts[0].prompt_tokens_details.cached_tokens == (len(sample.prompt) - 1) // 16 * 16 > 0


def test_logprobs_of_chat(client: Any, llm: LLM) -> None:
    wishes: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 8, "temperature": 0, "top_logprobs": 3}
    reply = client.chat.completions.create(**wishes, logprobs=True)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == reply.usage.completion_tokens
    for entry in entries:
        assert [entry.top_logprobs[0].token, entry.top_logprobs[0].logprob] == [entry.token, entry.logprob]
        assert len(entry.top_logprobs) == 3
    streamed = [
        entry
        for chunk in client.chat.completions.create(**wishes, logprobs=True, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content
    ]
    assert streamed == entries


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}, "auto"])
def test_tools(client: Any, choice: Any, stream: bool) -> None:
    # A random model calls nothing by itself: a grammar lets it write what a trained one would.
    extra = {"guided_regex": CALL_REGEX} if choice == "auto" else {}
    wishes: dict[str, Any] = {
        "model": "tiny", "messages": USER, "tools": [WEATHER], "tool_choice": choice, "extra_body": extra, "seed": 3,
    }  # fmt: skip
    if not stream:
        reply = client.chat.completions.create(**wishes).choices[0]
        assert reply.finish_reason == "tool_calls"
        assert reply.message.content is None
        (call,) = reply.message.tool_calls
        name, arguments, call_id = call.function.name, call.function.arguments, call.id
    else:
        name, arguments, call_id, pieces, reason = "", "", "", 0, None
        for chunk in client.chat.completions.create(**wishes, stream=True):
            delta = chunk.choices[0].delta
            assert not delta.content
            reason = chunk.choices[0].finish_reason or reason
            for part in delta.tool_calls or []:
                assert part.index == 0
                name += part.function.name or ""
                call_id += part.id or ""
                arguments += part.function.arguments or ""
                pieces += bool(part.function.arguments)
        assert reason == "tool_calls"
        assert pieces >= 3
    assert name == "weather"
    assert call_id.startswith("call_")
    values = json.loads(arguments)
    assert set(values) == {"days", "hot"}
    assert 1 <= values["days"] <= 9


def test_a_conversation_with_tool_results_goes_on(client: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 3, "hot": true}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    reply = client.chat.completions.create(
        model="tiny", messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=4
    )
    assert reply.usage.completion_tokens == 4
    assert not reply.choices[0].message.tool_calls


def test_reasoning_is_told_apart(client: Any) -> None:
    wishes: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 20, "seed": 2}
    extra = {"chat_template_kwargs": {"enable_thinking": True}}
    message = client.chat.completions.create(**wishes, extra_body=extra).choices[0].message
    assert message.reasoning_content
    assert message.content == ""
    pieces = [
        chunk.choices[0].delta.model_extra.get("reasoning_content", "")
        for chunk in client.chat.completions.create(**wishes, extra_body=extra, stream=True)
    ]
    assert "".join(pieces) == message.reasoning_content


@pytest.mark.parametrize(
    "form",
    [
        {
            "type": "json_schema",
            "json_schema": {"name": "x", "strict": True, "schema": WEATHER["function"]["parameters"]},
        },  # type: ignore[index]
        {"type": "json_object", "schema": WEATHER["function"]["parameters"]},  # type: ignore[index]
    ],
)
def test_response_format(client: Any, form: Any) -> None:
    reply = client.chat.completions.create(model="tiny", messages=USER, response_format=form, seed=1)
    assert set(json.loads(reply.choices[0].message.content)) == {"days", "hot"}
    assert reply.choices[0].finish_reason == "stop"


def test_guided_fields(client: Any) -> None:
    for extra, allowed in (
        ({"guided_choice": ["yes", "no"]}, ["yes", "no"]),
        ({"structured_outputs": {"regex": "a{3}"}}, ["aaa"]),
        ({"guided_json": {"const": 7}}, ["7"]),
    ):
        reply = client.completions.create(model="tiny", prompt="hello", extra_body=extra)
        assert reply.choices[0].text in allowed


def test_completions_of_several_prompts_with_scores(client: Any, http: httpx.Client, llm: LLM) -> None:
    ids = [list(llm.encode(text)) for text in ("hello the world", "hello")]
    body = {"model": "tiny", "prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    reply = http.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    for choice, prompt in zip(reply["choices"], ids, strict=True):
        sample = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, num_logprobs=1))[
            0
        ][0]
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert np.array_equal(logprobs["token_logprobs"][1:], sample.prompt_logprobs[1:] + sample.logprobs)
        assert "".join(logprobs["tokens"][: len(prompt)]) == llm.tokenizer.decode(prompt, skip_special=False)  # type: ignore[union-attr]
        last = logprobs["top_logprobs"][-1]
        assert max(last.values()) == logprobs["token_logprobs"][-1]
        assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])
    nothing = http.post("/v1/completions", json=body | {"max_tokens": 0, "prompt": ids[0]}).json()
    assert nothing["choices"][0]["text"] == "hello the world"
    assert nothing["usage"]["completion_tokens"] == 0
    assert nothing["choices"][0]["logprobs"]["tokens"] == reply["choices"][0]["logprobs"]["tokens"][:-1]


def test_stop_strings_bias_and_bounds(client: Any) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "hello", "temperature": 0}
    reply = client.completions.create(**ask, logit_bias={"120": 100}, stop=["xxx"], max_tokens=9)
    assert (reply.choices[0].text, reply.choices[0].finish_reason, reply.usage.completion_tokens) != ("", "stop", 9)
    letter = client.completions.create(**ask, logit_bias={"120": 100}, max_tokens=3).choices[0].text
    stopped = client.completions.create(**ask, logit_bias={"120": 100}, max_tokens=9, stop=letter[:2])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    kept = {"include_stop_str_in_output": True, "min_tokens": 1, "top_k": -1, "ignore_eos": True}
    assert (
        client.completions.create(**ask, logit_bias={"120": 100}, stop=letter[:2], extra_body=kept).choices[0].text
        == letter[:2]
    )


def test_bad_words_are_not_written(client: Any) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "hello", "temperature": 0, "max_tokens": 6}
    liked = client.completions.create(**ask, logit_bias={"120": 100}).choices[0].text
    assert liked == 6 * liked[0]
    for words, most in (([liked[0]], 0), ([2 * liked[0]], 1)):
        text = (
            client.completions.create(**ask, logit_bias={"120": 100}, extra_body={"bad_words": words}).choices[0].text
        )
        assert max(map(len, re.findall(f"{re.escape(liked[0])}+", text)), default=0) <= most
        assert liked[0] not in text or most


def test_best_of_and_beam_search(client: Any, http: httpx.Client, llm: LLM) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 9}
    reply = client.completions.create(**ask, n=2, best_of=5, seed=3)
    assert [choice.index for choice in reply.choices] == [0, 1]
    (drawn,) = llm.generate("hello", SamplingParams(max_tokens=9, n=5, seed=3))
    drawn.sort(key=lambda sample: -sum(sample.logprobs) / len(sample.logprobs))
    assert [choice.text for choice in reply.choices] == [sample.text for sample in drawn[:2]]
    (found,) = llm.generate("hello", SamplingParams(max_tokens=9, n=2, beam_width=4, length_penalty=0.5))
    wish = {"beam_width": 4, "use_beam_search": True, "length_penalty": 0.5}
    beams = client.completions.create(**ask, n=2, extra_body=wish)
    assert [choice.text for choice in beams.choices] == [sample.text for sample in found]
    chunks = client.completions.create(**ask, stream=True, extra_body=wish)
    assert "".join(chunk.choices[0].text for chunk in chunks) == found[0].text


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({"prompt": "a", "temperature": "hot"}, "temperature", 400),
        ({"prompt": "a", "temperature": -1}, "temperature", 400),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", 400),
        ({"prompt": "a", "max_tokens": 5000}, "max_tokens", 400),
        ({"prompt": []}, "prompt", 400),
        ({"prompt": [[1], "a", {}]}, "prompt", 400),
        ({"prompt": [100000]}, "prompt", 400),
        ({"prompt": "a", "suffix": "b"}, "suffix", 400),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of", 400),
        ({"prompt": "a", "use_beam_search": True, "top_p": 0.5}, "top_p", 400),
        ({"prompt": "a", "beam_width": 1}, "beam_width", 400),
        ({"prompt": "a", "n": 0}, "n", 400),
        ({"prompt": "a", "max_tokens": 4, "min_tokens": 5}, "min_tokens", 400),
        ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids", 400),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", 400),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias", 400),
        ({"prompt": "a", "stop": [1]}, "stop", 400),
        ({"prompt": "a", "top_p": 0}, "top_p", 400),
        ({"prompt": "a", "stream": "yes"}, "stream", 400),
        ({"prompt": "a", "stream": True, "max_tokens": 5000}, "max_tokens", 400),
        ({"prompt": "a", "guided_regex": "("}, "guided_regex", 400),
        ({"prompt": "a", "model": "other"}, "model", 404),
        ({"prompt": "a\ud800"}, "text", 400),
    ],
)
def test_errors_name_the_field(http: httpx.Client, body: dict[str, Any], param: str, status: int) -> None:
    reply = http.post("/v1/completions", content=json.dumps(body))
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["param"] == param or param == "text"
    assert error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_the_clients_errors(client: Any) -> None:
    with pytest.raises(openai().BadRequestError, match="top_logprobs"):
        client.chat.completions.create(model="tiny", messages=USER, top_logprobs=3)
    with pytest.raises(openai().BadRequestError, match="tool_choice"):
        client.chat.completions.create(model="tiny", messages=USER, tool_choice="required")
    with pytest.raises(openai().BadRequestError, match="messages"):
        client.chat.completions.create(model="tiny", messages=[])
    for wishes, param in (
        ({"messages": [{"role": "user", "content": "a" * 2000}]}, "messages"),
        (
            {
                "messages": USER,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "y"}}},
            },
            "response_format",
        ),
        (
            {
                "messages": USER,
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": 1}}}],
            },
            "tools",
        ),
    ):
        with pytest.raises(openai().BadRequestError) as caught:
            client.chat.completions.create(model="tiny", **wishes)
        assert caught.value.param == param
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    with pytest.raises(openai().BadRequestError, match="text parts"):
        client.chat.completions.create(model="tiny", messages=image)


TWO_CALLS = (
    r'<tool_call>\{"name": "weather", "arguments": \{"days": 3, "hot": true\}\}</tool_call>'
    r'<tool_call>\{"name": "weather", "arguments": \{"days": 4, "hot": true\}\}</tool_call>'
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_one_call_where_no_more_are_wanted(http: httpx.Client, parallel: bool, stream: bool) -> None:
    body = {"messages": USER, "tools": [WEATHER], "parallel_tool_calls": parallel, "guided_regex": TWO_CALLS}
    reply = http.post("/v1/chat/completions", json=body | {"stream": stream})
    days = (3, 4) if parallel else (3,)
    if not stream:
        calls = reply.json()["choices"][0]["message"]["tool_calls"]
        told = [call["function"]["arguments"] for call in calls]
    else:
        told = [""] * len(days)
        frames = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        for frame in frames:
            for call in frame["choices"][0]["delta"].get("tool_calls", ()):
                told[call["index"]] += call["function"]["arguments"]
    assert [json.loads(text)["days"] for text in told] == list(days)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "refusal", "refusal": "no"}, ""),
        ({"type": "texty", "text": "a"}, "of type 'texty'"),
        ({"type": "text"}, r"content[0].text is NoneType; expected a text"),
    ],
)
def test_parts_of_a_message(http: httpx.Client, part: dict[str, Any], message: str) -> None:
    messages = [*USER, {"role": "assistant", "content": [part]}, *USER]
    reply = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert reply.status_code == (400 if message else 200)
    assert message in reply.text


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("chat/completions", {"messages": USER, "prompt_logprobs": 1}, "prompt_logprobs"),
        ("chat/completions", {"messages": USER, "modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"messages": USER, "chat_template": "{{ messages }}"}, "chat_template"),
        ("responses", {"input": "a", "truncation": "some"}, "truncation"),
        ("responses", {"input": "a", "include": ["message.output_text.logprobs"]}, "include"),
        ("responses", {"input": 3}, "input"),
        (
            "responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
            "input[0].content[0].type",
        ),
        ("nowhere", {}, None),
    ],
)
def test_what_is_not_served_is_said(http: httpx.Client, route: str, body: dict[str, Any], param: str | None) -> None:
    reply = http.post(f"/v1/{route}", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == ((404 if param is None else 400), param)
    assert ("text only" in error["message"]) == ("content" in str(param) or param == "modalities")
    assert param is not None or "there is no route POST /v1/nowhere" in error["message"]


def test_usage_while_a_completion_streams(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "hello", "max_tokens": 3, "stream": True, "stream_options": options, "ignore_eos": True}
    lines = http.post("/v1/completions", json=body).text.splitlines()
    counts = [json.loads(line[6:])["usage"]["completion_tokens"] for line in lines if line.startswith("data: {")]
    assert counts[-1] == 3
    assert counts == sorted(counts)


def test_embeddings(client: Any, lenient: Any, http: httpx.Client, llm: LLM) -> None:
    texts = ["hello", "the world"]
    expected = llm.embed(texts).numpy()
    # Without a wish the client asks for base64 and decodes it.
    for which, extra in ((client, {"encoding_format": "float"}), (lenient, {})):
        reply = which.embeddings.create(model="tiny", input=texts, **extra)
        assert np.array_equal(np.array([item.embedding for item in reply.data], np.float32), expected)
    raw = http.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"}).json()["data"]
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in raw]
    assert np.array_equal(np.array(decoded), expected)
    with pytest.raises(openai().BadRequestError, match="dimensions"):
        client.embeddings.create(model="tiny", input="a", dimensions=3)


def test_scores_are_cosines_of_embeddings(http: httpx.Client, llm: LLM) -> None:
    texts = ["hello", "the world", "hello the"]
    vectors = llm.embed(texts)
    cosines = (vectors @ vectors[0]).tolist()
    reply = http.post("/score", json={"model": "tiny", "text_1": "hello", "text_2": texts}).json()
    assert [item["index"] for item in reply["data"]] == [0, 1, 2]
    assert [item["score"] for item in reply["data"]] == pytest.approx(cosines, abs=1e-6)
    ranked = http.post("/v1/rerank", json={"query": "hello", "documents": texts, "top_n": 2}).json()
    best = sorted(range(3), key=lambda index: -cosines[index])[:2]
    assert [(item["index"], item["document"]["text"]) for item in ranked["results"]] == [(n, texts[n]) for n in best]
    assert ranked["results"][0]["relevance_score"] == pytest.approx(1.0, abs=1e-6)
    assert ranked["usage"]["total_tokens"] > 4
    for route, body, param in (
        ("/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
        ("/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/rerank", {"documents": ["a"]}, "query"),
    ):
        refused = http.post(route, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_responses(client: Any) -> None:
    wishes: dict[str, Any] = {"model": "tiny", "input": "hello the world", "max_output_tokens": 20, "temperature": 0}
    reply = client.responses.create(**wishes, instructions="be brief")
    assert reply.store is False
    assert reply.output[0].status == reply.status
    assert reply.status == "incomplete" or reply.output_text is not None
    chat = client.chat.completions.create(
        model="tiny", max_tokens=20, temperature=0,
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello the world"}],
    )  # fmt: skip
    assert reply.output_text == chat.choices[0].message.content
    events = list(client.responses.create(**wishes, instructions="be brief", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events if "delta" not in event.type] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{reply.status}",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == reply.output_text
    assert events[-1].response.output_text == reply.output_text
    assert events[-1].response.output[0].status == events[-2].item.status == reply.status
    with pytest.raises(openai().BadRequestError, match="previous_response_id"):
        client.responses.create(**wishes, previous_response_id="resp_1")


def test_responses_call_functions(client: Any) -> None:
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    wishes: dict[str, Any] = {
        "model": "tiny",
        "input": USER,
        "tools": [tool],
        "tool_choice": "required",
        "temperature": 0,
    }
    (call,) = client.responses.create(**wishes).output
    assert (call.type, call.name) == ("function_call", "weather")
    with client.responses.stream(**wishes) as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.arguments == call.arguments
    # Under a name of ours: the server's are random, and after some of them the model ends its answer at once.
    said = call.model_dump() | {"call_id": "call_1"}
    back = [*USER, said, {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}]
    assert (
        client.responses.create(model="tiny", input=back, max_output_tokens=3, temperature=0).usage.output_tokens == 3
    )
