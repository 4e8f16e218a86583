"""A turn is appended behind the tokens that are there, and what results is what the template would have written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.core.errors import ConfigError, InputError
from lockstep.tokenize.chat import BUILT_IN, ChatTemplate
from lockstep.tokenize.turns import Turns, rewrites_history, turn_suffix
from tests.tokenize.vocabularies import load

# Written after the forms that these families use.
QWEN25 = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for t in tools %}{{- t | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN3 = QWEN25.replace(
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content",
    "{%- else %}{%- set c = m.content.split('</think>')[-1].lstrip('\\n') "
    "if m.role == 'assistant' and not loop.last else m.content %}"
    "{{- '<|im_start|>' + m.role + '\\n' + c",
)
LLAMA3 = """{{- bos_token }}{%- for m in messages %}
{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) }}
{{- '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
TEMPLATES = {"qwen2.5": QWEN25, "qwen3": QWEN3, "llama-3": LLAMA3, **BUILT_IN}
LEADS = {"plain": " ", "llama-2": " "}  # what a model writes before its words, since the prompt ends without it
WORDS = (
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Co")), min_size=1, max_size=20)
    .map(str.strip)
    .filter(bool)
)
TURN = st.lists(st.tuples(st.sampled_from(["user", "tool"]), WORDS), min_size=1, max_size=2)


def of(name: str) -> tuple[ChatTemplate, Turns, str]:
    """(template, turns, the text that ends an assistant's turn)."""
    tokenizer = load("llama-bpe" if name == "llama-3" else "qwen2")
    end = {"llama-3": "<|eot_id|>", "plain": "", "llama-2": " <|im_end|>"}.get(name, "<|im_end|>")
    bos = "<|begin_of_text|>" if name == "llama-3" else ""
    chat = ChatTemplate(TEMPLATES[name], bos_token=bos, eos_token="<|im_end|>" if name == "llama-2" else "")
    return chat, Turns(chat, tokenizer), end


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(WORDS, TURN), min_size=1, max_size=3), st.booleans())
def test_every_turn_is_a_pure_suffix(
    name: str, dialogue: list[tuple[str, list[tuple[str, str]]]], is_cut: bool
) -> None:
    chat, turns, end = of(name)
    tokenizer = load("llama-bpe" if name == "llama-3" else "qwen2")
    messages = [{"role": "user", "content": "Begin."}]
    tokens = turns.first(messages)
    for words, others in dialogue:
        # A model may write its words in other tokens than an encoder would: here one character at a time.
        written = [
            token
            for c in LEADS.get(name, "") + words
            for token in tokenizer.encode(c, add_special=False, parse_special=False)
        ]
        written += [] if is_cut else tokenizer.encode(end, add_special=False, parse_special=True)
        turn = [{"role": "user" if name == "llama-2" else role, "content": text} for role, text in others]
        before = [*tokens, *written]
        tokens = before + turns.next(written, turn)
        messages += [{"role": "assistant", "content": words}, *turn]
        assert tokens[: len(before)] == before
    assert turns.rewrites == ("changes the thinking of earlier turns" if name == "qwen3" else "")
    assert tokenizer.decode(tokens, skip_special=False) == chat.render(messages)


def test_a_template_that_strips_thinking_is_detected_and_kept_or_refused() -> None:
    chat, turns, _ = of("qwen3")
    thought = "<think>\nhm\n</think>\n\nYes."
    tokenizer = load("qwen2")
    sampled = tokenizer.encode(thought + "<|im_end|>", add_special=False, parse_special=True)
    kept = [*turns.first([{"role": "user", "content": "?"}]), *sampled]
    kept += turns.next(sampled, [{"role": "user", "content": "Sure?"}])
    assert "hm" in tokenizer.decode(kept, skip_special=False)
    again = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "Sure?"},
    ]
    assert "hm" not in chat.render(again)
    with pytest.raises(ConfigError, match=r"changes the thinking .* on_rewrite='append'"):
        Turns(chat, tokenizer, on_rewrite="refuse")
    assert not Turns(of("llama-3")[0], tokenizer, on_rewrite="refuse").rewrites


def test_templates_and_messages_that_cannot_be_appended_are_told() -> None:
    twice = ChatTemplate("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match="once and whole"):
        turn_suffix(twice, [{"role": "user", "content": "x"}])
    upper = ChatTemplate("{% for m in messages %}<{{ m.content if loop.last else m.content | upper }}>{% endfor %}")
    with pytest.raises(ConfigError, match="once and whole"):
        rewrites_history(upper)
    chat = ChatTemplate("plain")
    for messages in ([], [{"role": "assistant", "content": "mine"}]):
        with pytest.raises(InputError, match="none of the assistant's"):
            turn_suffix(chat, messages)
