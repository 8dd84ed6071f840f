"""What a run will need in memory: a plan from shapes alone, before a weight is loaded."""

import math

import torch

from data.batch import default_max_tokens
from data.files import read_json
from model import ModelConfig, Transformer
from rollout import free_memory

from . import parallel
from .evaluation import EVAL_ROWS
from .report import dropped_report
from .setup import Setup


def memory_plan(setup: Setup) -> dict[str, float]:
    """Bytes on the device by what they are for, and the `peak`: what stays, and an update or an evaluation on top.

    Of several processes each has its share of the rows; with --shard also of weights, gradients and moments.
    """
    config, shape, task, cuda = setup.config, setup.shape, setup.task, setup.device.type == "cuda"
    ranks, parts = parallel.RANKS, parallel.RANKS if config.shard else 1
    with torch.device("meta"):
        model = Transformer(shape)
        parameters, frozen = sum(p.numel() for p in model.parameters()), 0
        if config.lora_rank:
            model.add_adapters(config.lora_rank, config.lora_alpha, config.lora_targets)
            about = read_json(setup.checkpoint / "config.json")
            half = cuda or any(about.get(key) in ("bfloat16", "float16") for key in ("dtype", "torch_dtype"))
            frozen = 2 if half else 4  # bytes of a weight under adapters
    trained = sum(p.numel() for _, p in model.trained_parameters())
    copy_bytes = 2 if cuda else 4  # bf16 where it is used for arithmetic
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * copy_bytes  # of a cache
    completion = task.longest_prompt + task.max_new_tokens  # tokens
    prompts, demonstrations = (math.ceil(n / ranks) for n in (config.prompts_per_step, config.sft_batch_size))
    rows = prompts * config.group_size
    eval_rows = min(EVAL_ROWS, max(config.eval_samples, 1) * min(config.eval_examples, len(task.evaluated)))
    eval_rows = math.ceil(eval_rows / ranks)
    limit, row = 1e9 * config.rollout_memory or math.inf, -(-completion // 128) * 128 * per_token
    cache, eval_cache = min(rows * row, limit), min(eval_rows * row, limit)
    draws = 4 * 4 * shape.vocab_size  # logits, log-probs, probabilities and their sums, of a row

    sft_tokens = demonstrations * (task.longest_prompt + task.longest_demonstration)
    grpo_tokens = (rows if config.shard else prompts) * task.longest_prompt + rows * task.max_new_tokens
    policies = (config.kl_coef > 0) + config.keeps_warmed_up
    tokens = min(default_max_tokens(config.tokens_per_microbatch, setup.device), max(sft_tokens, grpo_tokens))
    plan = {
        "weights": (4 * trained + frozen * parameters) / parts,
        "optimizer": 8 * trained * (1 + config.separate_moments) / parts,
        "sampler's copy": copy_bytes * parameters if cuda or config.shard else 0,
        "reference": policies * copy_bytes * trained * (not (cuda and config.offload_reference)),
        "rollout cache": cache + rows * draws,
    }
    if config.shard:
        root = sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
        layer = (sum(p.numel() for p in model.parameters()) - root) / shape.num_hidden_layers
        plan["reference"] = policies * (4 * trained + frozen * parameters) / parts
        plan["put together"] = 8 * root + 2 * (copy_bytes + 4) * layer  # root and two layers, and their gradients
    stays = sum(plan.values())
    plan["gradients"] = 4 * trained / parts * (2 if ranks > 1 and not config.shard else 1)  # and what adds them up
    plan["activations"] = activation_bytes(shape, max(tokens, completion), config.gradient_checkpointing, cuda, frozen)
    plan["activations"] += attention_bias_bytes(shape, min(tokens, rows * task.max_new_tokens), completion, cuda)
    plan["evaluation"] = eval_cache + eval_rows * draws + 4 * parameters * (frozen > 0 and not cuda)  # merged weights
    return plan | {"peak": stays + max(plan["gradients"] + plan["activations"], plan["evaluation"])}


def activation_bytes(shape: ModelConfig, tokens: int, checkpointing: bool, cuda: bool, frozen: int = 0) -> float:
    """What backward needs of a micro-batch: what each layer saved (on CUDA in bf16), and the largest temporaries."""
    small, hidden, mlp = 2 if cuda else 4, shape.hidden_size, shape.intermediate_size
    queries, keys = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    norm = (4 + small) * hidden if cuda else 3 * 4 * hidden  # its input and output; a CPU keeps the step between them
    attention = small * (2 * queries + 2 * keys)  # q, k, v and what comes of them
    if shape.model_type == "qwen3":
        attention += 4 * (queries + keys) * (1 if cuda else 2)
    layer = 2 * norm + attention + small * 4 * mlp  # bytes a token; the MLP keeps gate, SiLU, up and product
    backward = small * 3 * mlp + 4 * 2 * hidden  # gradients on their way through a layer
    # Weights are cast for their products: trained ones on CUDA to bf16, `frozen` ones of 2 bytes on a CPU to fp32.
    cast_bytes = 2 * (frozen == 0) if cuda else 4 * (frozen == 2)
    cast_weights = cast_bytes * (2 * hidden * (queries + keys) + 3 * hidden * mlp)
    if checkpointing:
        # Backward has one layer's at a time, but autocast keeps its copies of all weights until forward ends.
        of_layers = max(tokens * layer + cast_weights, shape.num_hidden_layers * cast_weights * cuda)
        saved = tokens * 4 * hidden * shape.num_hidden_layers + of_layers
    else:
        saved = shape.num_hidden_layers * (tokens * layer + cast_weights)
    # The gradient of the output matrix, before it is added to the embedding's; and the matrix where it is cast.
    head = ((0 if frozen else 4) + cast_bytes) * shape.vocab_size * hidden
    wide = 2 if frozen and not cuda else 1  # the head's gradient is not there to make place for a second [N, V]
    logits = wide * min(tokens * shape.vocab_size, 2**26) * small + 4 * 3 * tokens * hidden
    return saved + max(tokens * backward, head + logits)


def attention_bias_bytes(shape: ModelConfig, completion_tokens: int, longest: int, cuda: bool) -> int:
    """The one that all layers share: where prompts are, every completion token has a row for prompt and completion."""
    rows = completion_tokens * (shape.num_attention_heads // shape.num_key_value_heads)
    return rows * -(-longest // 8) * 8 * (2 if cuda else 4)


def dry_run_report(setup: Setup) -> str:
    """The plan as a table, beside what the device has."""
    plan, total = memory_plan(setup), free_memory(setup.device)
    each = f" of each of {parallel.RANKS} processes" if parallel.RANKS > 1 else ""
    lines = [*dropped_report(setup), f"{'memory on ' + str(setup.device) + each:24}{'GB':>8}"]
    lines += [f"{name:24}{size / 1e9:8.2f}" for name, size in plan.items()]
    too_much = plan["peak"] >= total
    lines.append(f"{'does NOT fit' if too_much else 'fits'} into the {total / 1e9:.1f} GB that are free now")
    if too_much:
        less = "less: --gradient-checkpointing, --offload-reference, --tokens-per-microbatch, --max-new-tokens, "
        lines.append(less + "--rollout-memory, --prompts-per-step, --eval-samples")
    prompt, completion = setup.task.longest_prompt, setup.task.max_new_tokens
    tokens = default_max_tokens(setup.config.tokens_per_microbatch, setup.device)
    lines.append(f"prompts of up to {prompt} tokens, completions of up to {completion}; {tokens} tokens a micro-batch")
    return "\n".join(lines)
