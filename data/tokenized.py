"""A task as a model sees it: token ids, what fits its context, and how long a completion may get."""

import math

from .task import Task
from .tokenizer import Codec


class TokenizedTask:
    """Prompts and demonstrations of a task for training, and prompts of one split for evaluation.

    A training prompt is dropped if it is longer than `max_prompt_tokens`, or leaves less than `max_new_tokens` of the
    model's `context`; a demonstration if it is longer than `max_demonstration_tokens`, or than what its prompt leaves
    of the context. 0 is no limit; without `max_new_tokens`, a completion may be a quarter longer than the longest
    demonstration. `dropped` counts both. Prompts to evaluate that do not fit are None, and count as wrong.
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

        worked, worked_test = ([e for e in split if e.demonstration is not None] for split in (task.train, task.test))
        demonstrations, of_test = (
            codec.encode_demonstrations((e.prompt, e.demonstration) for e in split) for split in (worked, worked_test)
        )
        short_enough = [pair for pair in demonstrations if fits(*pair)]
        lengths = [len(completion) for _, completion in short_enough + of_test]
        lengths = [length for length in lengths if length <= min(longest_demonstration, context)]
        self.max_new_tokens = max_new_tokens or max(lengths, default=0) * 5 // 4 or 512
        longest_prompt = min(longest_prompt, context - self.max_new_tokens)

        prompts = codec.encode_prompts(e.prompt for e in task.train)
        kept = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest_prompt]
        self.train = [task.train[i] for i in kept]
        self.train_prompts = [prompts[i] for i in kept]
        self.worked = [example for example, pair in zip(worked, demonstrations, strict=True) if fits(*pair)]
        self.demonstrations = [pair for pair in demonstrations if fits(*pair)]  # of these; the limit is lower by now
        by_example = {id(e): completion for e, (_, completion) in zip(self.worked, self.demonstrations, strict=True)}
        self.demonstration_of = [by_example.get(id(e)) for e in self.train]  # the completion, or None
        dropped = len(demonstrations) - len(self.demonstrations)
        self.dropped = {"prompts": len(prompts) - len(kept), "demonstrations": dropped}
        self._shortest_prompt = min(map(len, prompts), default=0)
        within = f", in a context of {context}" if context < math.inf else ""
        self._limit = f"{max(longest_prompt, 0)} allowed beside {self.max_new_tokens} new{within}); "
        self._limit += "raise --max-prompt-tokens or lower --max-new-tokens"
        self._shortest_demonstration = min(demonstrations, key=lambda pair: len(pair[1]), default=([], []))
        eval_prompts = codec.encode_prompts(e.prompt for e in self.evaluated)
        self.eval_prompts = [prompt if len(prompt) <= longest_prompt else None for prompt in eval_prompts]

        self.longest_prompt = max(map(len, filter(None, self.train_prompts + self.eval_prompts)), default=0)
        self.longest_demonstration = max((len(completion) for _, completion in self.demonstrations), default=0)
        self.context = self.longest_prompt + max(self.max_new_tokens, self.longest_demonstration)  # enough for all

    def check_prompts(self) -> None:
        """Raises ValueError where no training prompt is left."""
        if self.train:
            return
        reason = "there are no training examples, no train.jsonl (or .json) in --data; --eval-only does without"
        if self.source.train:
            reason = f"all {self.dropped['prompts']} training prompts are too long (the shortest has "
            reason += f"{self._shortest_prompt} tokens, {self._limit}"
        raise ValueError(f"task {self.source.name}: {reason}")

    def check_evaluated(self, examples: int) -> None:
        """Raises ValueError where all of the first so many prompts to evaluate are too long."""
        asked = self.eval_prompts[:examples]
        if asked and not any(asked):
            reason = f"all {len(asked)} prompts to evaluate are too long ({self._limit}"
            raise ValueError(f"task {self.source.name}: {reason}")

    def check_demonstrations(self) -> None:
        """Raises ValueError where no demonstration is left."""
        if self.demonstrations:
            return
        reason = "no example has a demonstration, so SFT has nothing to learn from; without them use "
        reason += "--controller grpo --warmup-steps 0, or another --warmup-task"
        if count := self.dropped["demonstrations"]:
            prompt, completion = self._shortest_demonstration
            reason = f"all {count} demonstrations or their prompts are too long (the shortest has {len(completion)} "
            reason += f"tokens, after a prompt of {len(prompt)}); raise --max-demonstration-tokens or "
            reason += "--max-prompt-tokens"
        raise ValueError(f"task {self.source.name}: {reason}")
