"""A checkpoint's chat template: a jinja2 program from a foreign file that turns messages into one string.

It is rendered to the same string as by `transformers`. jinja2's sandbox keeps it away from everything else; a process
of its own makes sure that it ends, and fits into memory.
"""

import functools
import json
import resource
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .isolated import Child

BATCH = 200  # conversations that are rendered at once
SECONDS = 10.0  # that a template may take for them; an ordinary one takes a hundredth
MAX_MEMORY = 2**29  # bytes of the process that renders
MAX_TEMPLATE = 100_000  # characters of a template; published ones have a tenth
MAX_ADDED, MAX_ADDED_PER_MESSAGE = 20_000, 200  # characters around the messages, which it may also repeat once


class ChatTemplate:
    def __init__(self, source: str, special_tokens: dict[str, str], origin: Path, date: str = ""):
        """special_tokens: usable by name, such as bos_token. origin: named in errors. date: of today, in ISO 8601."""
        self.source, self.special_tokens, self.origin = source, special_tokens, origin
        self.date = date or datetime.now().isoformat()  # the same for all that is rendered
        if len(source) > MAX_TEMPLATE:
            raise ValueError(f"{origin}: the chat template has {len(source)} characters, more than {MAX_TEMPLATE}")

    def render(self, conversations: list[list[dict]], *, add_generation_prompt: bool) -> list[str]:
        """One string a conversation. Raises ValueError naming the file whose template fails, or does not end."""
        variables = self.special_tokens | {"add_generation_prompt": add_generation_prompt}
        same = {"source": self.source, "variables": variables, "now": self.date}
        parts = [conversations[start : start + BATCH] for start in range(0, len(conversations), BATCH)]
        try:
            return [text for part in parts for text in renderer().ask(conversations=part, **same)["texts"]]
        except ValueError as error:
            raise ValueError(f"{self.origin}: the chat template {error}") from None


@functools.cache
def renderer() -> Child:
    """One process serves all templates."""
    return Child("data.chat", "make_renderer()", seconds=SECONDS)


def make_renderer() -> Callable[..., dict]:  # in the other process
    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    extensions = [GenerationBlock, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(extensions=extensions, trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # jinja2's own escapes HTML
    environment.globals |= {"raise_exception": raise_exception, "tools": None, "documents": None}

    def render(conversations: list[list[dict]], source: str, variables: dict[str, str], now: str) -> dict:
        template = environment.from_string(source, {"strftime_now": datetime.fromisoformat(now).strftime})
        texts = [template.render(messages=messages, **variables) for messages in conversations]
        for text, messages in zip(texts, conversations, strict=True):
            length = sum(len(message["content"]) for message in messages)
            if len(text) > MAX_ADDED + MAX_ADDED_PER_MESSAGE * len(messages) + 2 * length:
                raise OverflowError(f"makes {len(text)} characters of a conversation of {length}")
            text.encode()  # raises for half a surrogate pair: JSON can spell it, and no tokenizer takes it
        return {"texts": texts}

    return render


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training elsewhere; here it is text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own convention)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)  # as elsewhere, what is set inside is not seen outside
