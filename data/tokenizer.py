"""Between text and token ids: a checkpoint's tokenizer and chat template, or a small tokenizer of our own.

A prompt is `raw`, the text itself, or `chat`, a user's message in the checkpoint's template, up to the reply.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .chat import ChatTemplate
from .files import one_line, parse_json, read_file, read_json, short_repr

END = "<|endoftext|>"  # of the small tokenizer: ends every completion; its only special token, always id 0

# What belongs to the tokenizer in a checkpoint directory. A trained model is saved with copies of these.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILES += ("chat_template.jinja", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model")
# What a chat template may use by its name.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_BYTES = 200_000_000  # of each of these files; published ones have a fifth


class Codec:
    """Prompts and completions as token ids, and back, in one prompt format."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_token_ids: tuple[int, ...],
        *,
        chat: ChatTemplate | None = None,
        system: str = "",
        stop_sequence: tuple[int, ...] = (),
        closing: str = "",
        pad_token: str = "",
        files: dict[str, bytes] | None = None,
    ):
        """stop_token_ids, and `stop_sequence` where a template ends a turn in plain text, end a completion.

        A demonstration ends in that sequence, else in the first of those tokens. chat: None is raw text. closing: what
        the template writes from the end of the assistant's turn on.
        """
        self.tokenizer, self.stop_token_ids, self.stop_sequence = tokenizer, stop_token_ids, stop_sequence
        self.chat, self.system, self.closing = chat, system, closing
        self.end = stop_sequence or stop_token_ids[:1]
        self.stops = {"stop_token_ids": stop_token_ids, "stop_sequences": (stop_sequence,) if stop_sequence else ()}
        self.silent = {*stop_token_ids, tokenizer.token_to_id(pad_token)}  # no text, where a completion ends in them
        self.notes: list[str] = []  # what is unusual about the template, and what is made of it: lines for the user
        if stop_sequence:
            text = f"{closing.strip()!r}, {len(stop_sequence)} tokens"
            self.notes.append(f"the chat template ends a turn with the text {text}: completions end there, too")
        # What the tokenizer puts before a text, such as BOS. What some put behind it, EOS, would end the prompt.
        alone, whole = (tokenizer.encode("x", add_special_tokens=special).ids for special in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        self.beginning = whole[:start] if chat is None else []
        if files is None:  # without a class named, transformers guesses one, with another way to split digits
            end = tokenizer.id_to_token(stop_token_ids[0])
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
            files = {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
            files["tokenizer_config.json"] = json.dumps(about, indent=2).encode()
        self.files = files
        self.opening = ""  # how the prompt already begins the assistant's text: "<think>\n", for some templates
        if chat is not None:
            probe = "user-speaks-here"
            behind = self.render([{"role": "user", "content": probe}]).rpartition(probe)[2]
            for token in tokenizer.get_added_tokens_decoder().values():
                if token.special and token.content not in ("<think>", "</think>"):  # it begins the assistant's turn
                    behind = behind.rpartition(token.content)[2]
            self.opening = "".join(behind.partition("<think>")[1:])

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        prompt_format: str = "raw",
        system: str = "",
        template_args: str = "",
        template_date: str = "",
    ) -> Self:
        """Of a checkpoint directory. prompt_format: raw, chat, or auto (chat where there is a template).

        template_args: a JSON object of further variables of the template, as in {"enable_thinking": false}.
        template_date: ISO 8601, for a template that prints the date ("": now). Raises ValueError naming the file that
        is absent or wrong, or whose chat template is missing.
        """
        path = Path(path)
        tokenizer = read_tokenizer(path / "tokenizer.json")
        named = named_tokens(path)
        listed = stops = stop_tokens(path, tokenizer, named.get("eos_token"))
        variables = named | read_template_args(template_args)
        chat = read_template(path, variables, template_date) if prompt_format != "raw" else None
        closing, end = end_of_turn(chat, tokenizer) if chat else ("", ())
        if len(end) == 1:  # it ends a completion, and comes first
            stops, end = tuple(dict.fromkeys([*end, *stops])), ()
        if chat is None and prompt_format == "chat":
            raise ValueError(f"--prompt-format chat: {path} has no chat template; use raw, or an instruct model")
        for flag, value in (("--system", system), ("--template-args", template_args)):
            if value and chat is None:
                raise ValueError(f"{flag} {value!r}: needs --prompt-format chat")
        if not stops and not end:
            raise ValueError(f"{path}: no eos_token_id in generation_config.json or config.json to end a completion")
        known = read_json(path / "config.json").get("vocab_size")
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        if isinstance(known, int) and size > known:
            raise ValueError(f"{path}: tokenizer.json has {size} tokens, the model knows {known}")
        files = {name: content for name in FILES if (content := read_file(path / name, MAX_BYTES)) is not None}
        if len(stops) > len(listed):  # a base model's list may lack the end of a turn; others must stop there too
            generation = read_json(path / "generation_config.json") | {"eos_token_id": list(stops)}
            files["generation_config.json"] = json.dumps(generation, indent=2).encode()
        ends = {"stop_sequence": end, "closing": closing, "pad_token": named.get("pad_token", "")}
        return cls(tokenizer, stops, chat=chat, system=system, **ends, files=files)

    @classmethod
    def trained_on(cls, texts: Iterable[str], vocab_size: int) -> Self:
        tokenizer = train_tokenizer(texts, vocab_size)
        return cls(tokenizer, (tokenizer.token_to_id(END),))

    def render(self, messages: list[dict]) -> str:
        """The prompt after which the assistant answers these messages; raw: the last one's text."""
        return self._render_all([messages])[0]

    def _render_all(self, conversations: list[list[dict]], *, prompt: bool = True) -> list[str]:
        if self.chat is None:
            return [messages[-1]["content"] for messages in conversations]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.chat.render([system + messages for messages in conversations], add_generation_prompt=prompt)

    def encode(self, prompt: str) -> list[int]:
        """A rendered prompt. Raw text begins with what the tokenizer adds (BOS or not); a template writes its own BOS.

        Raises ValueError for half a surrogate pair, which a terminal makes of bytes that are not UTF-8.
        """
        prompt.encode()
        return self._encode_all([prompt])[0]

    def encode_prompts(self, texts: Iterable[str]) -> list[list[int]]:
        """Users' texts, each as the beginning of a sequence."""
        return self._encode_all(self._render_all([[{"role": "user", "content": text}] for text in texts]))

    def _encode_all(self, rendered: list[str]) -> list[list[int]]:
        begin, encoded = self.beginning, self.tokenizer.encode_batch(rendered, add_special_tokens=False)
        return [coded.ids if coded.ids[: len(begin)] == begin else begin + coded.ids for coded in encoded]

    def encode_demonstrations(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """(User's text, demonstration) -> (prompt, completion up to the end of the turn), as token ids.

        They are encoded as one text, or apart where a token would straddle the border: sampling uses the same prompt.
        """
        pairs = list(pairs)
        rendered = self._render_all([[{"role": "user", "content": prompt}] for prompt, _ in pairs])
        targets = self._targets(rendered, pairs)
        together = self._encode_all([prompt + target for prompt, target in zip(rendered, targets, strict=True)])
        encoded = []
        for prompt, whole, target in zip(self._encode_all(rendered), together, targets, strict=True):
            joined = whole[: len(prompt)] == prompt
            completion = whole[len(prompt) :] if joined else encode_apart(target, self.tokenizer)
            encoded.append((prompt, [*completion, *self.end]))
        return encoded

    def _targets(self, rendered: list[str], pairs: list[tuple[str, str]]) -> list[str]:
        """What the template writes for the assistant behind each prompt, up to the end of the turn; raw: all there is.

        A demonstration that the template does not write behind the prompt, or not in full, is taken as it is.
        """
        if self.chat is None:
            return [demonstration for _, demonstration in pairs]
        turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": reply}] for text, reply in pairs]
        targets, notes = [], []
        for prompt, whole, (_, reply) in zip(rendered, self._render_all(turns, prompt=False), pairs, strict=True):
            target = whole.removeprefix(prompt).removesuffix(self.closing)
            in_place = whole.startswith(prompt) and whole.endswith(self.closing)
            asked, written = ("".join(text.split()) for text in (reply, self.opening + target))  # blanks may differ
            if not in_place or asked not in written:
                text, opening = reply.lstrip(), self.opening.strip()
                target = text.removeprefix(opening).lstrip() if opening and text.startswith(opening) else reply
                notes.append("the chat template cuts demonstrations, or puts them elsewhere: their own text is learnt")
            if self.opening and "</think>" not in self.opening + target:
                switchable = "enable_thinking" in self.chat.source
                fix = "--template-args '{\"enable_thinking\": false}'" if switchable else "--prompt-format raw"
                notes.append(f"prompts open a <think> that demonstrations do not close; {fix} opens none")
            targets.append(target)
        self.notes = list(dict.fromkeys(self.notes + notes))
        return targets

    def decode(self, completions: list[list[int]]) -> list[str]:
        """The assistant's text, after the opening that the prompt had written for it, up to what ends or pads it."""
        written = list(map(self._without_end, completions))
        return [self.opening + text for text in self.tokenizer.decode_batch(written, skip_special_tokens=False)]

    def _without_end(self, completion: list[int]) -> list[int]:
        length, sequence = len(completion), list(self.stop_sequence)
        while length and completion[length - 1] in self.silent:
            length -= 1
        ended = sequence and completion[:length][-len(sequence) :] == sequence
        return completion[: length - len(sequence) if ended else length]

    def save(self, path: Path) -> None:
        """The tokenizer's files, as they came."""
        for name, content in self.files.items():
            (path / name).write_bytes(content)


def read_template(path: Path, special_tokens: dict[str, str], date: str = "") -> ChatTemplate | None:
    """From chat_template.jinja, or from tokenizer_config.json: the `default` one of several. None: there is none."""
    file = path / "chat_template.jinja"
    source = read_file(file, MAX_BYTES)
    if source is None:
        file = path / "tokenizer_config.json"
        source = read_json(file).get("chat_template")
    try:
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}
        if isinstance(source, dict):
            source = source.get("default")
        source = source.decode() if isinstance(source, bytes) else source
        if not isinstance(source, str | None):
            raise TypeError
    except (TypeError, KeyError, UnicodeDecodeError):
        raise ValueError(f"{file}: chat_template must be a text in UTF-8, or a list of named ones") from None
    return None if source is None else ChatTemplate(source, special_tokens, file, date)


def end_of_turn(chat: ChatTemplate, tokenizer: Tokenizer) -> tuple[str, tuple[int, ...]]:
    """What the template writes from the end of the assistant's turn on, and the tokens of that end.

    The end is an added token, special or not, or else the text there, of one token or several; blanks end nothing.
    """
    probe = "assistant-speaks-here"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
    (text,) = chat.render([messages], add_generation_prompt=False)
    closing = text.rpartition(probe)[2]
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    end = min((token for token in added if token in closing), key=closing.index, default=closing.strip())
    ids = [added[end]] if end in added else encode_apart(end, tokenizer)
    return closing[closing.index(end) :] if end else closing, tuple(ids)


def encode_apart(text: str, tokenizer: Tokenizer) -> list[int]:
    """Behind a NUL, which no token shares and is then taken away: some tokenizers put a space before a text."""
    mark, ids, alone = (tokenizer.encode(t, add_special_tokens=False).ids for t in ("\0", "\0" + text, text))
    return ids[len(mark) :] if ids[: len(mark)] == mark else alone


def read_template_args(text: str) -> dict:
    """The JSON object of --template-args; {} for "". Raises ValueError naming the flag."""
    try:
        values = parse_json(text.encode()) if text else {}
        if not isinstance(values, dict) or {"messages", "add_generation_prompt"} & values.keys():
            raise ValueError("expected an object of variables other than messages and add_generation_prompt")
    except ValueError as error:
        example = '{"enable_thinking": false}'
        raise ValueError(f"--template-args {text}: not such a JSON object as {example} ({error})") from None
    return values


def read_tokenizer(file: Path) -> Tokenizer:
    """Raises ValueError where the file is absent, or is not a tokenizer.

    Its rules run inside the library: a file that was made to do harm can still fill the memory, or abort the process.
    """
    content = read_file(file, MAX_BYTES)
    if content is None:
        raise ValueError(f"{file}: no such file; the model's tokenizer belongs beside its weights, in this format")
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is not an Exception
        raise ValueError(f"{file}: not a tokenizer that works ({one_line(error)})") from None
    tokenizer.no_padding()  # lengths are ours to set
    tokenizer.no_truncation()
    return tokenizer


def named_tokens(path: Path) -> dict[str, str]:
    """The texts of `eos_token` and the like, of tokenizer_config.json and, in older exports, a file of their own."""
    settings = {"tokenizer_config.json": read_json(path / "tokenizer_config.json")}
    if "added_tokens_decoder" not in settings["tokenizer_config.json"]:
        settings["special_tokens_map.json"] = read_json(path / "special_tokens_map.json")
    named = {}
    for file, content in settings.items():
        for name in SPECIAL_TOKENS:
            token = content.get(name)
            if isinstance(token, dict):
                token = token.get("content", token)
            if not isinstance(token, str | None):
                raise ValueError(f"{path / file}: {name} must be a text, got {short_repr(token)}")
            if token:
                named[name] = token
    return named


def stop_tokens(path: Path, tokenizer: Tokenizer, end: str | None) -> tuple[int, ...]:
    """What ends a completion: the tokenizer's own end first, then those of generation_config.json, else config.json."""
    for file in (path / "generation_config.json", path / "config.json"):
        if (listed := read_json(file).get("eos_token_id")) is not None:
            break
    stops = listed if isinstance(listed, list) else [] if listed is None else [listed]
    own = tokenizer.token_to_id(end) if end else None
    if own in stops or (own is not None and not stops):
        stops = [own, *stops]
    known = set(tokenizer.get_vocab().values())
    for stop in stops:
        if type(stop) is not int or stop not in known:
            raise ValueError(f"{file}: eos_token_id {short_repr(stop)} is not a token of tokenizer.json")
    return tuple(dict.fromkeys(stops))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE from these texts: at most `vocab_size` tokens, but always 256 bytes and the end token.

    So every text can be encoded and decodes to itself. Merges never cross words: a terse wording has a token a word.
    """
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
