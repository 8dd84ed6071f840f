"""Several processes, one run. With one process, which is the way in, nothing here does anything.

    torchrun --nproc-per-node 2 sasr.py ...            # the whole model in each process, which is called a rank
    torchrun --nproc-per-node 8 sasr.py --shard ...    # weights, gradients and moments are shared out (FSDP2)

Every rank goes through the whole program with the whole batch in hand, and so comes to the same decisions by itself.
Only what takes time is shared out: sampling, grading (`in_shares`), the model's work on a batch (`micro_batches`). What
comes of it goes to all (`gather`, `combine`) or is added up (`clip_gradients`): losses are divided by a denominator of
the whole batch, so nothing else is needed. Ranks meet there, and not between two pieces of a batch, so that unequal
shares leave none of them waiting. What one rank alone may meet, a signal or a lack of memory, all agree upon.

Rank 0 writes the files and speaks. A rank that fails says why, if it is the first, and torchrun ends the others, after
30 seconds (`--shutdown-timeout`) by force. Every machine needs the same files, which is checked, and for a resume the
run's folder; each rank reads the whole model into the CPU's memory first, with --shard, too.
"""

import contextlib
import functools
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import rollout
from data.batch import Batch, MicroBatch, collate
from data.batch import micro_batches as cut_into_pieces
from model import Transformer


class RankFailed(Exception):
    """A rank, or the link to it, is gone: what is going on cannot be brought to an end, and is not saved."""


# Torchrun sets these two, and how the ranks find each other.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if RANKS > 1:
    import torch.distributed as dist


def on_rank_0(write: Callable) -> Callable:
    """A function that does nothing on other ranks."""
    return functools.wraps(write)(lambda *args, **kwargs: write(*args, **kwargs) if RANK == 0 else None)


# ----------------------------------------------------------------------------- begin and end


def join():
    """Meet the other ranks: over NCCL where tensors are on CUDA, else over gloo. The store that all of them can ask."""
    if RANKS == 1:
        return None
    if RANK > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)
    with linked():
        store, _, _ = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=RANK, world_size=RANKS)
    return store


def leave(code: int) -> int:
    """The exit code. One of several processes ends here: PyTorch's threads may be at work yet, and would abort it."""
    if RANKS > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def fails_first(store) -> bool:
    """Whether this process is to say why: of several the first, which has the cause. It finds its voice again."""
    if RANKS > 1:
        sys.stderr = sys.__stderr__
    try:
        return store is None or store.add("sasr.py has failed", 1) == 1
    except RuntimeError:  # torchrun itself is gone
        return RANK == 0


def local_device(name: str) -> str:
    """Each of several processes on a machine has a GPU of its own."""
    if RANKS > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return name


@contextlib.contextmanager
def linked() -> Iterator[None]:
    """What fails on the way between ranks is a RankFailed: the others wait there, so that none can try again alone."""
    try:
        yield
    except RuntimeError as error:
        short = isinstance(error, torch.OutOfMemoryError)
        reason = "no memory to add up with" if short else "another rank is gone, or cannot be reached"
        raise RankFailed(f"{reason}: {error}") from None


# ----------------------------------------------------------------------------- what all ranks know


def gather(value: Any) -> list:
    """What each rank has, in order."""
    if RANKS == 1:
        return [value]
    values = [None] * RANKS
    with linked():
        dist.all_gather_object(values, value)
    return values


def check_alike(begun: dict[str, str]) -> None:
    """Raises ValueError, on all ranks, naming the first kind of thing that they do not all begin with alike."""
    for rank, of_rank in enumerate(every := gather(begun)):
        for kind in begun:
            if of_rank[kind] != every[0][kind]:
                raise ValueError(f"rank {rank} has another {kind} than rank 0: each machine needs the same files")


def combine(measures: dict[str, float]) -> dict[str, float]:
    """Of measures that each rank took of its share: sums; where a name says so maxima; norms are alike already."""
    of_ranks = gather(measures)
    found = {name: [m[name] for m in of_ranks if name in m] for name in dict.fromkeys(itertools.chain(*of_ranks))}
    return {name: max(of) if name.endswith("_max") or "norm" in name else sum(of) for name, of in found.items()}


def add_up(tensors: list[Tensor]) -> None:
    """Let each tensor be its sum over the ranks, in place and in one message. All are of one type and device."""
    if RANKS > 1:
        with linked():
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


def clip_gradients(model: Transformer, max_norm: float, *, more: bool = False) -> Tensor:
    """Add up the gradients of the ranks, and scale the sum down to an L2 norm of max_norm. Returns the norm before.

    more: others are to follow, so that only rank 0 keeps the sum.
    """
    apart = RANKS > 1 and not is_sharded(model)  # FSDP has added them up in backward
    if apart:
        trained = [p for _, p in model.trained_parameters()]
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # of a rank without a share
        add_up([p.grad for p in trained])
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    if apart and more and RANK > 0:
        model.zero_grad(set_to_none=True)
    return norm


@contextlib.contextmanager
def together(*models: Transformer) -> Iterator[None]:
    """All ranks get through this, or none: where one runs out of memory, all do, and can try again with less."""
    short = False
    try:
        yield
    except torch.OutOfMemoryError:
        if RANKS == 1:
            raise
        short = True  # and its traceback, which holds the memory, is let go
    sharded = [model for model in models if is_sharded(model)]
    if short and sharded:  # the others wait for this rank in the middle of a model
        raise RankFailed("out of memory; with --shard it cannot try again: lower --tokens-per-microbatch")
    if RANKS > 1 and not sharded and max(gather(short)):
        raise torch.OutOfMemoryError("on one of the ranks")
    for model in sharded:
        model.reshard()


# ----------------------------------------------------------------------------- shares


def share(items):
    """The part of this rank: consecutive items, in numbers that differ by one at most."""
    start, end = (len(items) * n // RANKS for n in (RANK, RANK + 1))
    return items[start:end]


def in_shares(function: Callable[[list], list], items: list) -> list:
    """function(items), of which each rank does its share. The function takes a list, maybe an empty one, to a list."""
    return list(itertools.chain(*gather(function(share(items)))))


def generate(model: Transformer, prompts: list[list[int]], params: rollout.SamplingParams, **options):
    """`rollout.generate`, each rank for some of the prompts: the same Rollout, however many ranks there are."""
    of_ranks = gather(rollout.generate(model, prompts, params, only=share(range(len(prompts))), **options))
    every = {name: [x for r in of_ranks for x in getattr(r, name)] for name in ("completions", "logprobs", "finished")}
    return rollout.Rollout(**every, chunks=max(r.chunks for r in of_ranks))


def micro_batches(batch: Batch, max_tokens: int, model: Transformer) -> list[MicroBatch]:
    """This rank's pieces of a batch, in whole groups. Under --shard each is one call of the model, and all ranks have
    equally many: a call there needs every rank."""
    mine = set(share([*dict.fromkeys(map(tuple, batch.prompts))]))
    rows = [i for i, prompt in enumerate(batch.prompts) if tuple(prompt) in mine]
    pieces = cut_into_pieces(batch, max_tokens, model.device, rows, share_prompts=not is_sharded(model))
    missing = max(gather(len(pieces))) - len(pieces) if is_sharded(model) else 0
    return pieces + [collate(Batch([[0]], [[]]), [0], [0, 0], model.device) for _ in range(missing)]


# ----------------------------------------------------------------------------- a model in shards


def shard(model: Transformer, device: torch.device) -> Transformer:
    """Give each rank its part of every parameter; a layer is put together while it is at work.

    On CUDA the layers compute in bf16; embedding and head stay fp32, and with them the sum that layers add to.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # keys, which nothing changes in place
    mesh, half = init_device_mesh(device.type, (RANKS,)), torch.bfloat16 if device.type == "cuda" else None
    for module in (*model.model["layers"], model):
        policy = MixedPrecisionPolicy(None if module is model else half, torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # sums: the denominators are those of the whole batch
        module.set_force_sum_reduction_for_comms(True)
    return model


def is_sharded(model: Transformer) -> bool:
    return hasattr(model, "reshard")


def whole(tensor: Tensor) -> Tensor:
    """Of a tensor in shards all of it, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def collect(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in CPU memory, for rank 0 to write; the others only help to put them together."""
    return {name: whole(tensor).to("cpu" if RANK == 0 else "meta") for name, tensor in named.items()}


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor; into one in shards each rank its own."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        mesh, values = tensor.device_mesh, values.to(tensor.device, tensor.dtype)
        values = distribute_tensor(values, mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
