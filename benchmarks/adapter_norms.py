"""Which norm should equation (1) take under adapters? SFT gradient norms of one batch of demonstrations along a run.

    python benchmarks/adapter_norms.py --model DIR --lora-rank 8 --warmup-steps 20 --steps 40 [flags of sasr.py]

B starts at zero, so A has no gradient at first, and what it gets grows with B whatever the loss does. Each row has the
loss, and the norms of A and B together, of B alone, and of all weights of the merged model, which is what SASR would
compare without adapters; a ratio that stays the same cancels in p_t. The run itself is one of sasr.py, in this process.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import sasr
from data.batch import Batch
from model import Transformer
from run.config import parse_command_line


def norm(gradients) -> float:
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))


def measure(trainer: sasr.Trainer, full: Transformer, batch: Batch) -> dict[str, float]:
    """Loss and SFT gradient norms of a batch at the present weights; `full` is overwritten with the merged ones."""
    part, budget, config = sasr.Part(batch, sasr.sft_objective), trainer.budget, trainer.config
    with torch.no_grad():
        for copied, (_, merged) in zip(full.parameters(), trainer.model.merged_parameters(), strict=True):
            copied.copy_(merged)
    of_full = budget.retry_on_oom(sasr.accumulate_gradient, full, [part], config)["grad_norm"]  # before clipping
    full.zero_grad(set_to_none=True)
    stats = budget.retry_on_oom(sasr.accumulate_gradient, trainer.model, [part], config)
    trained = dict(trainer.model.trained_parameters())
    of_b = norm(p.grad for name, p in trained.items() if name.endswith("lora_B"))
    both = norm(p.grad for p in trained.values())
    size = norm(p.detach() for name, p in trained.items() if name.endswith("lora_B"))
    b = stats["grad_norm"] * of_b / both  # .grad itself is clipped
    return {"loss": stats["loss"], "adapter": stats["grad_norm"], "B": b, "all weights": of_full, "size of B": size}


def main(argv: list[str] | None = None) -> int:
    mode, values = parse_command_line(sasr.Config, argv)
    if mode != "train" or not (values.get("lora_rank") or values.get("adapter")):
        print(
            "adapter_norms.py: give the flags of a new run of sasr.py, with --lora-rank or --adapter", file=sys.stderr
        )
        return 2
    try:
        config = sasr.Config(**values)
        trainer = sasr.Trainer(config)
    except (ValueError, OSError) as error:
        print(f"adapter_norms.py: {error}", file=sys.stderr)
        return 2
    batch = Batch.of(sasr.demonstrations(trainer, trainer.task, 0, "probe"))
    full = Transformer(trainer.shape).to(trainer.device)
    columns = ("loss", "adapter", "B", "all weights", "size of B", "adapter / all", "B / all")
    print(f"{'step':>5}{'':>6}" + "".join(f"{column:>14}" for column in columns), file=sys.stderr)
    for step in range(config.total_steps + 1):
        sasr.after_step(trainer)
        row = {"step": step, "next": ""} | measure(trainer, full, batch)
        row |= {f"{key} / all": row[key] / row["all weights"] for key in ("adapter", "B")}
        if step < config.total_steps:
            record = trainer.step()
            trainer.state.finish_step(record, 0.0)
            row |= {"next": record["kind"]} | {key: record[key] for key in ("p_sft", "sft_norm") if key in record}
        print(f"{step:5}{row['next']:>6}" + "".join(f"{row[column]:14.3f}" for column in columns), file=sys.stderr)
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
