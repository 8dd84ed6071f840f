"""A checkpoint's chat template: a jinja2 program from a foreign file that turns messages into one string.

It is rendered in jinja2's sandbox, with the environment that `transformers` gives it, to the same string. The sandbox
keeps it away from our things; that it ends, and fits into memory, is seen to by rendering it in a process of its own.
"""

from __future__ import annotations

import functools
import json
import resource
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .isolated import Child, answer_requests

SECONDS = 10.0  # that a template may take for AT_ONCE conversations; an ordinary one takes a hundredth
AT_ONCE = 200
MEMORY = 2**29  # bytes of the process that renders
LONGEST = 100_000  # characters of a template; published ones have a tenth
# Characters that it may add to a conversation, and to each message of it; what was said it may repeat once.
MOST, MOST_A_MESSAGE = 20_000, 200


class ChatTemplate:
    def __init__(self, source: str, special_tokens: dict[str, str], origin: Path):
        """special_tokens: what the template may call by name, such as bos_token. `origin` is named in errors."""
        self.source, self.special_tokens, self.origin = source, special_tokens, origin
        if len(source) > LONGEST:
            raise ValueError(f"{origin}: the chat template has {len(source)} characters, more than {LONGEST}")

    def render(self, conversations: list[list[dict]], *, add_generation_prompt: bool) -> list[str]:
        """One string a conversation. Raises ValueError naming the file whose template fails, or does not end."""
        given = self.special_tokens | {"add_generation_prompt": add_generation_prompt}
        now = datetime.now().isoformat()  # one moment for all
        texts = []
        for start in range(0, len(conversations), AT_ONCE):
            part = conversations[start : start + AT_ONCE]
            answer = renderer().ask({"source": self.source, "given": given, "now": now, "conversations": part})
            if "error" in answer:
                raise ValueError(f"{self.origin}: the chat template {answer['error']}")
            texts += answer["texts"]
        return texts


@functools.cache
def renderer() -> Child:
    """One process serves all templates."""
    return Child("data.chat", "serve", "", seconds=SECONDS)


# ----------------------------------------------------------------------------- in the other process


def serve(_: str) -> None:
    answer_requests(make_renderer)


def make_renderer():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    compiled = functools.lru_cache(maxsize=16)(environment.from_string)

    def texts_of(request: dict) -> dict:
        template, now = compiled(request["source"]), datetime.fromisoformat(request["now"])
        given = request["given"] | {"strftime_now": lambda pattern: now.strftime(pattern)}
        texts = [template.render(messages=m, tools=None, documents=None, **given) for m in request["conversations"]]
        for text, messages in zip(texts, request["conversations"], strict=True):
            said = sum(len(message["content"]) for message in messages)
            if len(text) > MOST + MOST_A_MESSAGE * len(messages) + 2 * said:
                raise OverflowError(f"makes {len(text)} characters of a conversation of {said}")
            text.encode()  # half a surrogate pair, which JSON can spell, is nothing that a tokenizer takes
        return {"texts": texts}

    return texts_of


class GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training elsewhere; here it is text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own convention)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)  # as elsewhere, what is set inside is not seen outside


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Unlike jinja2's own, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str):
    raise jinja2.TemplateError(message)
