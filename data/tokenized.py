"""A task as a model sees it: token ids, what fits its context, and how long a completion may get."""

from __future__ import annotations

import math

from .task import Example, Task
from .tokenizer import Codec


class TokenizedTask:
    """Prompts and demonstrations of a task for training, and prompts of one split for evaluation.

    A training prompt is dropped if it is longer than `max_prompt_tokens`, or leaves less than `max_new_tokens` of the
    model's `context`; a demonstration if it is longer than `max_demonstration_tokens`, or than what its prompt leaves
    of the context. 0 is no limit of its own; without `max_new_tokens`, a completion may be a quarter longer than the
    longest demonstration. `dropped` counts both. Prompts of the evaluation are never dropped: those that do not fit
    are None, and a wrong answer.
    """

    def __init__(
        self,
        task: Task,
        codec: Codec,
        *,
        context: float = math.inf,  # tokens
        max_new_tokens: int = 0,
        max_prompt_tokens: int = 0,
        max_demonstration_tokens: int = 0,
        eval_split: str = "test",
    ):
        self.source = task
        self.evaluated = task.test if eval_split == "test" else task.train
        longest_prompt = max_prompt_tokens or math.inf
        longest_demonstration = max_demonstration_tokens or math.inf

        def fits(prompt: list[int], completion: list[int]) -> bool:
            short = len(prompt) <= longest_prompt and len(completion) <= longest_demonstration
            return short and len(prompt) + len(completion) <= context

        def demonstrations(examples: list[Example]) -> list[tuple[list[int], list[int]]]:
            shown = [(e.prompt, e.demonstration) for e in examples if e.demonstration is not None]
            return codec.encode_demonstrations(shown)

        shown = demonstrations(task.train)
        fitting = [pair for pair in shown if fits(*pair)]
        lengths = [len(completion) for pair in (fitting, demonstrations(task.test)) for _, completion in pair]
        lengths = [length for length in lengths if length <= min(longest_demonstration, context)]
        self.max_new_tokens = max_new_tokens or max(lengths, default=0) * 5 // 4 or 512
        longest_prompt = min(longest_prompt, context - self.max_new_tokens)

        prompts = codec.encode_prompts(e.prompt for e in task.train)
        kept = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest_prompt]
        self.train = [task.train[i] for i in kept]
        self.train_prompts = [prompts[i] for i in kept]
        self.demonstrations = [(prompt, completion) for prompt, completion in fitting if len(prompt) <= longest_prompt]
        self.dropped = {"prompts": len(prompts) - len(kept), "demonstrations": len(shown) - len(self.demonstrations)}
        self._shortest_prompt = min(map(len, prompts), default=0)
        self._prompt_limit = f"{max(longest_prompt, 0)} allowed beside {self.max_new_tokens} new"
        if context < math.inf:
            self._prompt_limit += f", in a context of {context}"
        self._shortest_demonstration = min(shown, key=lambda pair: len(pair[1]), default=([], []))
        eval_prompts = codec.encode_prompts(e.prompt for e in self.evaluated)
        self.eval_prompts = [prompt if len(prompt) <= longest_prompt else None for prompt in eval_prompts]

    def check_prompts(self) -> None:
        """Raises ValueError where no training prompt is left."""
        if not self.source.train:
            raise ValueError(
                f"task {self.source.name}: there are no training examples, no train.jsonl (or .json) in --data; "
                "--eval-only does without"
            )
        if not self.train:
            raise ValueError(
                f"task {self.source.name}: all {self.dropped['prompts']} training prompts are too long (the shortest "
                f"has {self._shortest_prompt} tokens, {self._prompt_limit}); raise --max-prompt-tokens or lower "
                "--max-new-tokens"
            )

    def check_evaluated(self, examples: int) -> None:
        """Raises ValueError where of the first so many prompts to evaluate none fits."""
        asked = self.eval_prompts[:examples]
        if asked and not any(asked):
            raise ValueError(
                f"task {self.source.name}: all {len(asked)} prompts to evaluate are too long "
                f"({self._prompt_limit}); raise --max-prompt-tokens or lower --max-new-tokens"
            )

    def check_demonstrations(self) -> None:
        """Raises ValueError where no demonstration is left."""
        if not self.demonstrations and not self.dropped["demonstrations"]:
            raise ValueError(
                f"task {self.source.name}: no example has a demonstration, so SFT has nothing to learn from; "
                "without them use --controller grpo --warmup-steps 0, or another --warmup-task"
            )
        if not self.demonstrations:
            prompt, completion = self._shortest_demonstration
            raise ValueError(
                f"task {self.source.name}: all {self.dropped['demonstrations']} demonstrations or their prompts are "
                f"too long (the shortest has {len(completion)} tokens, after a prompt of {len(prompt)}); raise "
                "--max-demonstration-tokens or --max-prompt-tokens"
            )

    @property
    def longest_prompt(self) -> int:
        return max(map(len, filter(None, self.train_prompts + self.eval_prompts)), default=0)

    @property
    def longest_demonstration(self) -> int:
        return max((len(completion) for _, completion in self.demonstrations), default=0)

    @property
    def context(self) -> int:
        """Positions that hold every prompt with its completion."""
        return self.longest_prompt + max(self.max_new_tokens, self.longest_demonstration)
