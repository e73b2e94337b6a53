"""What a template makes of a conversation, and what of it is learned: as transformers says, and whatever is said."""

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from megagpt.corpus.chat_template import TEMPLATES, ChatTemplate, Segment, load_template
from megagpt.corpus.records import BadRecordError
from megagpt.errors import UsageError

ZEPHYR = """\
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
        {{- '<|assistant|>\n' }}
        {%- generation %}
{{ message['content'] | trim }}
        {%- endgeneration %}
    {% else %}
{{ '<|' ~ message.role ~ '|>' }}
{{ message.content }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""
MACRO = """\
{%- macro turn(message) -%}
[{{ message.role }}] {% generation %}{{ message.content }}{% endgeneration %};{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role != 'assistant' %}{{ message.content }}|{% continue %}{% endif -%}
{{ turn(message) }}{%- endfor -%}"""
WITH_END = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{{ eos_token }}{% else %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["<|endoftext|>", "<|im_end|>\n<|im_start|>assistant\nI", "{% generation %}", "{{ eos_token }}", " a ", "<>."]
)
conversations = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}),
    min_size=1,
    max_size=5,
)


def spans(segments: list[Segment]) -> tuple[str, list[bool]]:
    """The text, and of each character whether it is learned."""
    assert all(segment.text for segment in segments)
    learned = [segment.learned for segment in segments for _ in segment.text or ""]
    return "".join(segment.text or "" for segment in segments), learned


@pytest.mark.parametrize("source", [*TEMPLATES.values(), ZEPHYR], ids=[*TEMPLATES, "zephyr"])
@settings(max_examples=50)
@given(messages=conversations)
def test_text_and_learned_characters_are_those_of_transformers(source, messages):
    (text,), (learned,) = render_jinja_template([messages], chat_template=source, return_assistant_tokens_mask=True)
    expected = [False] * len(text)
    for start, end in learned:
        expected[start:end] = [True] * (end - start)
    assert spans(ChatTemplate(source, "test").render(messages)) == (text, expected)


@settings(max_examples=50)
@given(messages=conversations)
def test_what_a_macro_encloses_is_found_where_the_macro_is_used(messages):
    # transformers looks for it where the output had come to when the macro ran, so it is no reference here.
    text, learned = spans(ChatTemplate(MACRO, "test").render(messages))
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    assert "".join(character for character, is_learned in zip(text, learned, strict=True) if is_learned) == "".join(
        said
    )
    assert sum(learned) == sum(map(len, said))


@settings(max_examples=50)
@given(messages=conversations)
def test_neighbouring_segments_differ_so_that_a_prompt_is_encoded_as_a_whole(messages):
    segments = ChatTemplate(TEMPLATES["chatml"], "test").render(messages)
    assert all(left.learned != right.learned for left, right in itertools.pairwise(segments))


@settings(max_examples=50)
@given(messages=conversations)
def test_only_the_template_writes_end_tokens_and_those_behind_an_answer_are_learned(messages):
    segments = ChatTemplate(WITH_END, "test").render(messages)
    ends = [segment.learned for segment in segments if segment.text is None]
    assert ends == [message["role"] == "assistant" for message in messages]
    assert "".join(segment.text or "" for segment in segments) == "".join(message["content"] for message in messages)


def test_the_end_token_spelled_out_in_a_template_is_that_token():
    template = ChatTemplate(WITH_END.replace("eos_token", "'<|endoftext|>'") + "<|endoftext|>", "test")
    messages = [{"role": "assistant", "content": "<|endoftext|>"}]
    assert template.render(messages) == [Segment("<|endoftext|>", True), Segment(None, True), Segment(None, False)]


def test_chatml_offers_the_assistants_turn_where_a_sample_is_to_begin():
    messages = [{"role": "user", "content": "Hi"}]
    text = render_jinja_template([messages], chat_template=TEMPLATES["chatml"], add_generation_prompt=True)[0][0]
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    answered = ChatTemplate(TEMPLATES["chatml"], "test").render([*messages, {"role": "assistant", "content": "Ho"}])
    assert answered == [Segment(text, False), Segment("Ho<|im_end|>", True)]


def test_the_documented_template_ends_answers_by_the_end_token():
    page = (Path(__file__).parents[3] / "docs/finetuning.md").read_text(encoding="utf-8")
    source = "".join(line[8:] + "\n" for line in page.splitlines() if line.startswith(" " * 8))
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, ("a", "b", "c", "d"), strict=True)
    ]
    assert ChatTemplate(source, "documented").render(messages) == [
        *(Segment("user:\na\nassistant:\n", False), Segment("b", True), Segment(None, True)),
        *(Segment("user:\nc\nassistant:\n", False), Segment("d", True), Segment(None, True)),
    ]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ strftime_now('%Y') }}", "asks for the date"),
        ("{{ lipsum() }}", "undefined"),
        ("{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}", "within another"),
        ("{% set x %}{% generation %}abc{% endgeneration %}{% endset %}{{ x[:3] }}", "was cut"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_a_template_that_fails_refuses_the_conversation_and_says_why(body, detail):
    template = ChatTemplate("{% generation %}{% endgeneration %}" + body, "test")
    with pytest.raises(BadRecordError) as caught:
        template.render([{"role": "user", "content": "x"}])
    reason, found = caught.value.args
    assert reason == "template"
    assert re.search(detail, found)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not say what is to be learned"),
        ("{% filter upper %}{% endfilter %}{# {% generation %} #}", "does not say what is to be learned"),
        ("\n\n{% if %}", "line 3: "),
        ("{% generation %}", "line 1: .*endgeneration"),
        ("{{ messages | random }}", "line 1: No filter named 'random'"),
        ("a\0<{% generation %}{% endgeneration %}", "NUL"),
    ],
)
def test_what_is_no_template_is_refused_before_any_work(tmp_path: Path, source, message):
    path = tmp_path / "own.jinja"
    path.write_text(source)
    with pytest.raises(UsageError, match=f"template {path}.*{message}") as caught:
        load_template(str(path))
    assert "\n" not in str(caught.value)


def test_a_misspelt_name_is_told_with_the_names_that_there_are():
    with pytest.raises(
        UsageError, match="template chat-ml: No such file or directory; give chatml or plain, or a file"
    ):
        load_template("chat-ml")
