"""Chat templates, rendered in a sandbox from the checkpoint's own source; clients never send one.

The environment is the one that `apply_chat_template` of transformers documents (trimmed blocks, loop controls,
`raise_exception`, `tojson`), less `strftime_now`: a template that writes today's date gives scores that change
overnight, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .contract import Template
from .errors import ContractError, ItemError
from .records import Message

CHATML = (
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor -%}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)
"""ChatML, for a decoder that brings no chat template of its own."""

PAIR_PROMPT = (
    "{%- for message in messages -%}{%- if messages|length > 1 -%}{{ message['role'] }}: {% endif -%}"
    "{{ message['content'] }}{%- if not loop.last -%}{{ '\\n\\n' }}{%- endif -%}{%- endfor -%}"
)
"""The prompt side of a text pair: the message alone, or the turns with their roles."""

_SENTINEL_DATE = "plaudit-date-sentinel"


class ChatTemplate:
    """A compiled template with the tokenizer's special tokens as variables."""

    def __init__(self, template: Template, special_tokens: Mapping[str, str]) -> None:
        self._compiled = compile_source(template.source)
        self._variables = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text. Raises ItemError when the template refuses it."""
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self._compiled.render(
                messages=turns,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ItemError("template_error", f"the model's chat template refused the conversation: {error}") from error


def compile_source(source: str) -> jinja2.Template:
    """The template, compiled. Raises ContractError if it is not valid Jinja."""
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise ContractError(f"the chat template does not compile: {error}") from error
    template.globals = dict(template.globals)  # a ChainMap otherwise, which each render copies key by key: most of it
    return template


def writes_date(source: str) -> bool:
    """Whether the template writes today's date when it is given the chance."""
    if "strftime_now" not in source:
        return False
    environment = _environment()
    environment.globals["strftime_now"] = lambda _format: _SENTINEL_DATE
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        return _SENTINEL_DATE in environment.from_string(source).render(messages=turns, tools=None)
    except jinja2.TemplateError:
        return True  # it asks for the date and could not be tried: not safe to serve


def pin_date(source: str, date: str) -> str:
    """The template with `date_string` fixed, as Llama 3's templates provide for."""
    return "{%- set date_string = " + json.dumps(date) + " -%}" + source


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], autoescape=False
    )
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = _to_json
    return environment


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for loss masks; for rendering it is transparent."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
