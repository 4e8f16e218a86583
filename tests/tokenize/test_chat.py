from __future__ import annotations

import copy
from typing import Any

import pytest

from lockstep.core.errors import ConfigError, InputError
from lockstep.tokenize import sandbox
from lockstep.tokenize.chat import BUILT_IN, ChatTemplate
from tests.tokenize.vocabularies import load

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a <city> & its área",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi 龜 <b>"},
    {"role": "assistant", "content": " Hello! "},
    {"role": "user", "content": "And now?"},
]
WITH_TOOLS = [
    {"role": "user", "content": "Weather in Zürich?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
]
# Written after the forms these families use; every jinja feature that their templates need appears.
QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.revindex0 %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
    {%- if loop.index0 == ns.last and loop.last %}{{- '(asked last)' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA3 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
  {%- set system = messages[0]['content']|trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif -%}
<|start_header_id|>system<|end_header_id|>

{{ system }}{% if documents %}{% for d in documents %}[{{ d.title }}: {{ d.text }}]{% endfor %}{% endif %}<|eot_id|>
{%- for message in messages %}
  {%- if 'tool_calls' in message %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
    {%- for call in message.tool_calls %}
      {{- {'name': call.function.name, 'parameters': call.function.arguments} | tojson(indent=2) }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% macro said(text, end) %}[INST] {{ text }} [/INST]{{ end }}{% endmacro %}
{%- for message in messages if message.role != 'system' -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message['role'] == 'user' %}{{ said(message['content'], '') }}
{%- else %}{% generation %}{{ ' ' ~ message['content'] | trim ~ eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role }}
{% if message['content'] is string %}{{ message['content'] | trim }}
{%- elif message['content'] is iterable %}
{%- for item in message['content'] %}{{ item['text'] | trim | upper }}{% endfor %}
{%- endif %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model' }}
{% endif %}{{ [1, 2] | join('-') }}{{ {'a': 1}.items() | list }}"""


def theirs(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return render([copy.deepcopy(messages)], chat_template=source, **tokens, **options)[0][0]


def ours(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **options)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (BUILT_IN["chatml"], PLAIN),
        (BUILT_IN["llama-2"], PLAIN),
        (BUILT_IN["plain"], PLAIN),
        (QWEN, PLAIN),
        (QWEN, WITH_TOOLS),
        (LLAMA3, PLAIN),
        (LLAMA3, WITH_TOOLS),
        (MISTRAL, PLAIN[1:]),
        (GEMMA, PLAIN[1:]),
    ],
)
@pytest.mark.parametrize("prompt", [True, False])
def test_same_prompt_as_transformers(source: str, messages: list[dict[str, Any]], prompt: bool) -> None:
    documents = [{"title": "T", "text": "x"}]
    for tools in (None, TOOLS):
        options: dict[str, Any] = {"tools": tools, "documents": documents, "add_generation_prompt": prompt}
        assert ours(source, messages, **options) == theirs(source, messages, **options)


def test_extra_variables_and_continuing() -> None:
    got = ours(QWEN, PLAIN, extra={"enable_thinking": False})
    assert got == theirs(QWEN, PLAIN, add_generation_prompt=True, enable_thinking=False)
    assert got.endswith("<think>\n\n</think>\n\n")
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert ours(QWEN, PLAIN[:3], **options).endswith("<|im_start|>assistant\n Hello! ")
    with pytest.raises(InputError, match="choose one"):
        ours(QWEN, PLAIN, continue_final_message=True)


def test_messages_are_brought_to_the_form_that_the_template_wants() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "user\na\nb<|im_end|>" in ours("chatml", parts)
    assert "AB<end_of_turn>" in ours(GEMMA, parts)
    as_text = [
        {**WITH_TOOLS[1], "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}]}
    ]
    before = copy.deepcopy(as_text)
    assert '"arguments": {"city": "Zürich"}}' in ours(QWEN, as_text)
    assert as_text == before
    assert "assistant\n<|im_end|>" in ours("chatml", [{"role": "assistant", "content": None}])


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls",
        ),
    ],
)
def test_wrong_messages_are_named(messages: Any, field: str) -> None:
    with pytest.raises(InputError) as caught:
        ours("chatml", messages)
    assert caught.value.field == field


def test_template_of_a_tokenizer() -> None:
    assert ChatTemplate.of(load("phi-3")).render(PLAIN[1:2]) == "<s><|user|>\nHi 龜 <b><|end|>\n<|assistant|>\n"
    assert ChatTemplate.of(load("llama-spm"), "llama-2").render(PLAIN[1:2]) == "<s>[INST] Hi 龜 <b> [/INST]"
    with pytest.raises(ConfigError, match=r"brings no default chat template.*chatml"):
        ChatTemplate.of(load("gpt-2"))
    with pytest.raises(ConfigError, match="no chat template is called 'chatlm'"):
        ChatTemplate.of(load("gpt-2"), "chatlm")
    with pytest.raises(ConfigError, match="cannot be compiled"):
        ChatTemplate("{% for %}")
    with pytest.raises(InputError, match="roles must alternate"):
        ours(MISTRAL, [PLAIN[1], PLAIN[1]])


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{% macro g(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='a') %}"
        "{% for i in range(60) %}{% set n.x = g(n.x) %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ ('b' * 9999999).join(range(9999) | map('string') | list) }}",
        "{{ ('b' * 99999).replace('b', 'c' * 99999) }}",
        "{{ ('b' * 99999) | replace('b', 'c' * 99999) }}",
        "{{ 5 | tojson(indent=99999999) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum() }}",
    ],
)
def test_hostile_templates_end_in_an_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(sandbox, "MAX_PASSES", 1 << 17)
    with pytest.raises(InputError):
        ChatTemplate(source).render(PLAIN)


def test_unused_filters_are_not_there() -> None:
    for name in ("center", "batch", "slice", "random", "urlize", "attr"):
        with pytest.raises(ConfigError, match="No filter named"):
            ChatTemplate("{{ 'x' | " + name + "(3) }}")
