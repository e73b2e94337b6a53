"""Chat templates: a conversation becomes text, and it is known which of it the model is to learn.

A template is Jinja, by the convention of Hugging Face's `chat_template`: it sees `messages`, `add_generation_prompt`,
`bos_token` and `eos_token`, and encloses what the model is to say in {% generation %} ... {% endgeneration %}. It runs
in jinja2's immutable sandbox. No tokenizer here has a token for the beginning of a text, so `bos_token` is empty;
`eos_token`, and the text <|endoftext|> in the template itself, stand for the end-of-document token.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megagpt.corpus.records import BadRecordError
from megagpt.corpus.sources import one_line
from megagpt.errors import UsageError
from megagpt.tokenizer.tokenizer import END_OF_DOCUMENT

_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' }}"
_SAID = "{{ message['content'] + '<|im_end|>' }}"
_IF_ASSISTANT = "{% if message['role'] == 'assistant' %}"

TEMPLATES = {
    "chatml": (
        f"{{% for message in messages %}}{_TURN}{_IF_ASSISTANT}"
        f"{{% generation %}}{_SAID}{{% endgeneration %}}{{% else %}}{_SAID}{{% endif %}}"
        "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        f"{{% for message in messages %}}{_IF_ASSISTANT}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    ),
}
"""The built-in ones. chatml: every turn is <|im_start|>ROLE, a line end, the content, <|im_end|>, and a line end before
the next; what is learned ends with <|im_end|>. plain: the contents, one after another, and nothing else."""

# What a template's output is marked with. A content cannot forge it: one that has a NUL is no conversation.
_OPEN, _CLOSE, _END = "\0<", "\0>", "\0."
_MARKS = re.compile("(\0[<>.])")
_LONGEST_DETAIL = 200


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation, all of it learned or all of it not."""

    text: str | None
    """None: the end-of-document token."""
    learned: bool


class ChatTemplate:
    """Renders conversations; two of the same source render alike.

    Neither the clock nor a random number is to be had: the same conversation always gives the same text.
    """

    def __init__(self, source: str, name: str) -> None:
        """`name` is what messages call it. UsageError: it is no template, or nothing in it says what is learned."""
        self.source, self.name = source, name
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.globals.pop("lipsum")  # random
        environment.filters.pop("random")
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        if "\0" in source:
            raise UsageError(f"template {name}: has a NUL character; remove it")
        marked = source.replace(END_OF_DOCUMENT, _END)
        try:
            calls = [block.call.node for block in environment.parse(marked).find_all(nodes.CallBlock)]
            self._template = environment.from_string(marked)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"template {name}, line {error.lineno}: {_line(error)}") from None
        if not any(isinstance(call, nodes.ExtensionAttribute) for call in calls):
            raise UsageError(
                f"template {name}: does not say what is to be learned; enclose what the assistant says in "
                "{% generation %} and {% endgeneration %}"
            )

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> list[Segment]:
        """The text of a conversation, in segments of which no two neighbours are alike, but for end tokens.

        messages: each has `role` and `content`, texts without NUL. An end-of-document token is learned if it is in or
        directly behind what is. add_generation_prompt: end with what comes before an answer, for the model to go on.
        BadRecordError: the template fails, or refuses the conversation.
        """
        try:
            text = self._template.render(
                messages=messages, bos_token="", eos_token=_END, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # noqa: BLE001 - a template is the user's program, and may raise anything
            raise BadRecordError("template", _line(error)) from None
        return _joined(_segments(text))


def load_template(name_or_path: str) -> ChatTemplate:
    """The built-in template of this name, or that of this file. UsageError: there is neither, or it cannot be used."""
    if name_or_path in TEMPLATES:
        return ChatTemplate(TEMPLATES[name_or_path], name_or_path)
    where, names = one_line(name_or_path), " or ".join(TEMPLATES)
    try:
        source = Path(name_or_path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"template {where}: is not UTF-8 text; give {names}, or a file of Jinja") from None
    except OSError as error:
        raise UsageError(f"template {where}: {error.strerror}; give {names}, or a file of Jinja") from None
    return ChatTemplate(source, where)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: marks what it encloses, wherever that ends up in the output."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """See jinja2.ext.Extension."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _segments(text: str) -> Iterator[Segment]:
    """The stretches between the marks, and the end tokens."""
    learned, is_behind_learned = False, False
    for part in _MARKS.split(text):
        if part in (_OPEN, _CLOSE):
            if learned == (part == _OPEN):
                raise BadRecordError("template", "{% generation %} is within another, or was cut by the template")
            learned = part == _OPEN
            is_behind_learned = not learned
        elif part == _END:
            yield Segment(None, learned or is_behind_learned)
            is_behind_learned = False
        elif part:
            yield Segment(part, learned)
            is_behind_learned = False
    if learned:
        raise BadRecordError("template", "the end of {% generation %} was cut by the template")


def _joined(segments: Iterator[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and last.text is not None and segment.text is not None and last.learned == segment.learned:
            joined[-1] = Segment(last.text + segment.text, last.learned)
        else:
            joined.append(segment)
    return joined


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> NoReturn:
    raise jinja2.TemplateError("it asks for the date, and the same conversation must always give the same tokens")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_DETAIL else f"{text[:_LONGEST_DETAIL]}..."
