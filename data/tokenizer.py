"""Between text and token ids: a checkpoint's tokenizer and chat template, or a small tokenizer of our own.

A prompt is either `raw`, the text itself, or `chat`, a user's message in the template that the checkpoint brings
along, up to where the assistant begins to speak.
"""

from __future__ import annotations

import functools
import json
import os
import resource
from collections.abc import Callable, Iterable
from pathlib import Path
from reprlib import repr as shown  # cut short: a foreign file's value may be long

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .chat import ChatTemplate
from .isolated import Child, answer_requests

END = "<|endoftext|>"  # of the small tokenizer: ends every completion; its only special token, always id 0

# What belongs to the tokenizer in a checkpoint directory. A trained model is saved with copies of these.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
# What a chat template may call by its name.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Bytes of a tokenizer's file, and of the files beside it. Published ones have a fifth of it.
LARGE_FILE, SMALL_FILE = 200_000_000, 10_000_000

TRIAL = "".join(map(chr, range(32, 127))) + "\n\u00e9\u4e2d\U0001f600"  # each kind of character
TRIAL_MEMORY = 2**30  # bytes; a vocabulary of 262,000 needs half of it


class Codec:
    """Prompts and completions as token ids, and back, in one prompt format."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_token_ids: tuple[int, ...],
        *,
        chat: ChatTemplate | None = None,
        system: str = "",
        files: dict[str, bytes] | None = None,
    ):
        """stop_token_ids end a completion, and the first of them ends a demonstration. `chat`: None is raw text."""
        self.tokenizer, self.stop_token_ids = tokenizer, stop_token_ids
        self.chat, self.system = chat, system
        self.files = files if files is not None else files_of(tokenizer, stop_token_ids[0])
        self.opening = ""  # what the prompt has already put into the assistant's mouth: "<think>\n", for some
        if chat is not None:
            probe = "user-speaks-here"
            before, thought, after = self.render([{"role": "user", "content": probe}]).rpartition("<think>")
            if thought and probe in before and not special_tokens_in(after, tokenizer):  # not of an earlier turn
                self.opening = thought + after

    @classmethod
    def from_pretrained(cls, path: str | Path, *, prompt_format: str = "raw", system: str = "") -> Codec:
        """Of a checkpoint directory. prompt_format: raw, chat, or auto (chat where there is a template).

        Raises ValueError naming the file that is absent or wrong, or whose chat template is missing.
        """
        path = Path(path)
        tokenizer = read_tokenizer(path / "tokenizer.json")
        named = named_tokens(path)
        listed = stops = stop_tokens(path, tokenizer, named.get("eos_token"))
        chat = None
        if prompt_format != "raw":
            chat = read_template(path, named)
        if prompt_format == "chat" and chat is None:
            raise ValueError(f"--prompt-format chat: {path} has no chat template; use raw, or an instruct model")
        if chat is not None:  # the token that ends a turn ends a completion, and comes first
            stops = tuple(dict.fromkeys([*end_of_turn(chat, tokenizer), *stops]))
        elif system:
            raise ValueError(f"--system {system!r}: needs --prompt-format chat")
        if not stops:
            raise ValueError(
                f"{path}: no eos_token_id in generation_config.json or config.json; completions need an end"
            )
        known = read_settings(path / "config.json").get("vocab_size")
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        if isinstance(known, int) and size > known:
            raise ValueError(f"{path}: tokenizer.json has {size} tokens, the model knows {known}")
        contents = {name: read_file(path / name, LARGE_FILE) for name in FILES}
        files = {name: content for name, content in contents.items() if content is not None}
        if len(stops) > len(listed):  # a base model's list may lack the end of a turn; others must stop there too
            generation = read_settings(path / "generation_config.json") | {"eos_token_id": list(stops)}
            files["generation_config.json"] = (json.dumps(generation, indent=2) + "\n").encode()
        return cls(tokenizer, stops, chat=chat, system=system, files=files)

    @classmethod
    def trained_on(cls, texts: Iterable[str], vocab_size: int) -> Codec:
        tokenizer = train_tokenizer(texts, vocab_size)
        return cls(tokenizer, (tokenizer.token_to_id(END),))

    def render(self, messages: list[dict]) -> str:
        """The prompt after which the assistant answers these messages; raw: the last one's text."""
        return self._render_all([messages])[0]

    def _render_all(self, conversations: list[list[dict]]) -> list[str]:
        if self.chat is None:
            return [messages[-1]["content"] for messages in conversations]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.chat.render([system + messages for messages in conversations], add_generation_prompt=True)

    def encode(self, prompt: str) -> list[int]:
        """A rendered prompt. Raw text begins as the tokenizer says (BOS or not); a template writes its own BOS.

        Raises ValueError for half a surrogate pair, as a terminal makes of bytes that are no text.
        """
        prompt.encode()
        return self.tokenizer.encode(prompt, add_special_tokens=self.chat is None).ids

    def encode_prompts(self, texts: Iterable[str]) -> list[list[int]]:
        """Users' texts, each as the beginning of a sequence."""
        return self._encode_all(self._prompts(texts))

    def _prompts(self, texts: Iterable[str]) -> list[str]:
        return self._render_all([[{"role": "user", "content": text}] for text in texts])

    def _encode_all(self, rendered: list[str]) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch(rendered, add_special_tokens=self.chat is None)
        return [encoding.ids for encoding in encodings]

    def encode_demonstrations(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """(User's text, demonstration) -> (prompt, completion that ends in a stop token), as token ids.

        Both are encoded together, as one text. Where a token would straddle the border they are encoded apart: the
        prompt must be the one that samples get.
        """
        pairs = [(prompt, self._without_opening(demonstration)) for prompt, demonstration in pairs]
        rendered = self._prompts(prompt for prompt, _ in pairs)
        together = self._encode_all([text + said for text, (_, said) in zip(rendered, pairs, strict=True)])
        encoded = []
        for prompt, whole, (_, said) in zip(self._encode_all(rendered), together, pairs, strict=True):
            completion = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._encode_apart(said)
            encoded.append((prompt, [*completion, self.stop_token_ids[0]]))
        return encoded

    def _encode_apart(self, text: str) -> list[int]:
        """Behind a NUL, which no token shares with another character and which is then taken away: some tokenizers
        put a space before what comes first.
        """
        mark, ids, alone = (self.tokenizer.encode(t, add_special_tokens=False).ids for t in ("\0", "\0" + text, text))
        return ids[len(mark) :] if ids[: len(mark)] == mark else alone

    def _without_opening(self, demonstration: str) -> str:
        opening, text = self.opening.strip(), demonstration.lstrip()
        return text.removeprefix(opening).lstrip() if opening and text.startswith(opening) else demonstration

    def decode(self, completions: list[list[int]]) -> list[str]:
        """What the assistant said, special tokens aside, with what the prompt had already put into its mouth."""
        texts = self.tokenizer.decode_batch(completions, skip_special_tokens=True)
        return [self.opening + text for text in texts]

    def save(self, path: Path) -> None:
        """The tokenizer's files, as they came."""
        for name, content in self.files.items():
            (path / name).write_bytes(content)


# ----------------------------------------------------------------------------- files


def read_template(path: Path, special_tokens: dict[str, str]) -> ChatTemplate | None:
    """chat_template.jinja, or the entry (the `default` one of several) in tokenizer_config.json, or None."""
    file = path / "chat_template.jinja"
    content = read_file(file)
    if content is not None:
        try:
            return ChatTemplate(content.decode(), special_tokens, file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error})") from None
    file = path / "tokenizer_config.json"
    source = read_settings(file).get("chat_template")
    try:
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}
        if isinstance(source, dict):
            source = source.get("default")
        if not isinstance(source, str | None):
            raise TypeError
    except (TypeError, KeyError):
        raise ValueError(f"{file}: chat_template must be a text, or a list of named ones") from None
    return None if source is None else ChatTemplate(source, special_tokens, file)


def end_of_turn(chat: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The special token that follows what the assistant said, or nothing where there is none."""
    probe = "assistant-speaks-here"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
    (text,) = chat.render([messages], add_generation_prompt=False)
    return special_tokens_in(text.rpartition(probe)[2], tokenizer)[:1]


def read_tokenizer(file: Path) -> Tokenizer:
    """Raises ValueError where the file is absent or none."""
    content = read_file(file, LARGE_FILE)
    if content is None:
        raise ValueError(f"{file}: no such file; the model's tokenizer belongs beside its weights, in this format")
    tried = trials().ask({"file": str(file.resolve())})
    if "error" in tried:
        raise ValueError(f"{file}: not a tokenizer that works ({tried['error']})")
    return without_lengths(Tokenizer.from_buffer(content))


def without_lengths(tokenizer: Tokenizer) -> Tokenizer:
    """Padding and truncation, which a file may set, are ours to keep."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_file(file: Path, most: int = SMALL_FILE) -> bytes | None:
    """None where there is none. Raises ValueError for more bytes, and for a link out of the file's directory.

    In the hub's cache, where snapshots/COMMIT/ has links into blobs/, that is the directory of the model.
    """
    if not file.is_file():
        return None
    home, target = file.parent.resolve(), file.resolve()
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        home = home.parents[1]
    if not target.is_relative_to(home):
        raise ValueError(f"{file}: a link that leads out of its directory, to {target}")
    if file.stat().st_size > most:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, more than {most}")
    return file.read_bytes()


def read_settings(file: Path) -> dict:
    """A JSON object; an absent file is an empty one."""
    content = read_file(file)
    if content is None:
        return {}
    try:
        settings = json.loads(content.decode())
        if not isinstance(settings, dict):
            raise ValueError(f"expected an object, got {type(settings).__name__}")
        json.dumps(settings, ensure_ascii=False).encode()  # "\ud800" is half a character, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON object ({error})") from None
    return settings


def named_tokens(path: Path) -> dict[str, str]:
    """The texts of `eos_token` and the like, of tokenizer_config.json and, in older exports, a file of their own."""
    settings = {"tokenizer_config.json": read_settings(path / "tokenizer_config.json")}
    if "added_tokens_decoder" not in settings["tokenizer_config.json"]:
        settings["special_tokens_map.json"] = read_settings(path / "special_tokens_map.json")
    named = {}
    for file, content in settings.items():
        for name in SPECIAL_TOKENS:
            token = content.get(name)
            if isinstance(token, dict):
                token = token.get("content", token)
            if not isinstance(token, str | None):
                raise ValueError(f"{path / file}: {name} must be a text, got {shown(token)}")
            if token:
                named[name] = token
    return named


def special_tokens_in(text: str, tokenizer: Tokenizer) -> list[int]:
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return [i for i in tokenizer.encode(text, add_special_tokens=False).ids if i in special]


def stop_tokens(path: Path, tokenizer: Tokenizer, end: str | None) -> tuple[int, ...]:
    """What ends a completion: the tokenizer's own end first, then those of generation_config.json, else config.json."""
    file = path / "generation_config.json"
    if read_settings(file).get("eos_token_id") is None:
        file = path / "config.json"
    listed = read_settings(file).get("eos_token_id")
    stops = [] if listed is None else listed if isinstance(listed, list) else [listed]
    own = tokenizer.token_to_id(end) if end else None
    if own in stops or (own is not None and not stops):
        stops = [own, *stops]
    known = set(tokenizer.get_vocab().values())
    for stop in stops:
        if type(stop) is not int or stop not in known:
            raise ValueError(f"{file}: eos_token_id {shown(stop)} is not a token of tokenizer.json")
    return tuple(dict.fromkeys(stops))


# The rules of a tokenizer's file are a program of a kind. They may make the library abort, which no `except` sees, or
# fill the memory; so they are tried out in a process of its own first.


@functools.cache
def trials() -> Child:
    return Child("data.tokenizer", "serve_trials", "", seconds=20.0)


def serve_trials(_: str) -> None:
    answer_requests(make_trial)


def make_trial() -> Callable[[dict], dict]:
    resource.setrlimit(resource.RLIMIT_AS, (TRIAL_MEMORY, TRIAL_MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the library's panics come with thousands of lines

    def trial(request: dict) -> dict:
        tokenizer = without_lengths(Tokenizer.from_file(request["file"]))
        ids = [i for text in ("", "a", TRIAL) for i in tokenizer.encode(text).ids]
        tokenizer.decode(ids, skip_special_tokens=False)
        if len(ids) > 10 * len(TRIAL):  # a character of four bytes may take four tokens
            raise ValueError(f"it makes {len(ids)} tokens of {len(TRIAL)} characters")
        unknown = set(ids) - set(tokenizer.get_vocab().values())
        if unknown:
            raise ValueError(f"it makes the token {min(unknown)}, which it does not have")
        return {}

    return trial


def files_of(tokenizer: Tokenizer, end_token_id: int) -> dict[str, bytes]:
    """The files of a tokenizer that did not come from any."""
    # Without a class named, transformers guesses one from config.json, with another way to split digits.
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.id_to_token(end_token_id)}
    written = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(named, indent=2) + "\n",
    }
    return {name: text.encode() for name, text in written.items()}


# ----------------------------------------------------------------------------- a tokenizer from scratch


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: at most `vocab_size` tokens (256 bytes and the end token among them) from these texts.

    Byte-level, so that every text can be encoded and decodes to itself; merges never cross words, so in the terse
    wordings each word ends up as one token.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END}), not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
