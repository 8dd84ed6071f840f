"""One tile of logits, hidden @ weight.T, made on chip and never stored: what `logprob.py` and `kl.py` share.

A tile is as large as the registers allow, since each of its rows and columns is then loaded less often: a program
that makes [128, 256] logits reads 128 + 256 vectors for 128 * 256 dot products. The features D are walked through
in pieces, and the piece after next is on its way from memory while the tensor cores multiply this one (`stages`).

On Hopper and later the pieces are fetched by the tensor memory accelerator (TMA), which wants a descriptor of the
matrix and rows that begin at a multiple of 16 bytes; elsewhere by pointer arithmetic. Both are in `load_piece`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def load_piece(matrix, row, column, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """matrix[row : row + ROWS, column : column + COLUMNS], with zeros outside [height, width]."""
    if TMA:
        piece = matrix.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)[:, None]
        columns = column + tl.arange(0, COLUMNS)[None, :]
        inside = (rows < height) & (columns < width)
        # 64 bits: row * width passes 2^31 at a million tokens of 2,048 features
        piece = tl.load(matrix + rows.to(tl.int64) * width + columns, mask=inside, other=0.0)
    return piece


@triton.jit
def logits_tile(
    hidden, weight, row, column, N, V, D,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(hidden @ weight.T)[row : row + BLOCK_N, column : column + BLOCK_V], summed in fp32; zero outside [N, V]."""
    tile = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for feature in range(0, D, BLOCK_D):
        h = load_piece(hidden, row, feature, N, D, BLOCK_N, BLOCK_D, TMA)
        w = load_piece(weight, column, feature, V, D, BLOCK_V, BLOCK_D, TMA)
        tile = tl.dot(h, w.T, tile, input_precision=PRECISION)
    return tile


class Tile(NamedTuple):
    """The shape of a program's work, and how it is carried out."""

    tokens: int
    vocabulary: int
    features: int  # loaded at once
    warps: int
    stages: int  # pieces of features in flight


def candidates(architecture: int, dtype: torch.dtype, accumulators: int = 1) -> list[Tile]:
    """Tiles that fit the registers and the shared memory of CUDA `architecture` (80, 90, 100, ...; 0: AMD).

    The first is the one in use. `triton.autotune` would pick by stopwatch: another process, another tile, another
    order of summation, and a resumed run that no longer repeats the uninterrupted one bit for bit. So the choice is
    made once, from what `python benchmarks/kernels.py --tune` prints, and written down here.
    `accumulators` is how many tiles of logits a program holds at once.
    """
    if dtype == torch.float32:
        return [Tile(64, 64 // accumulators, 32, 4, 3)]
    if accumulators == 2:
        return [Tile(128, 128, 64, 8, 3)] * (architecture >= 90) + [Tile(64, 128, 64, 8, 3)]
    if architecture // 10 == 9:
        return [Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 4, 3)]
    return [Tile(128, 128, 64, 8, 3)]


def architecture(device: torch.device) -> int:
    """90 for a Hopper; 0 for an AMD GPU, and for the interpreter on a CPU."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Launch:
    """How to launch a kernel that makes logits of this dtype on this device."""

    def __init__(self, hidden: Tensor, accumulators: int = 1):
        arch = architecture(hidden.device)
        self.tile = candidates(arch, hidden.dtype, accumulators)[0]
        self.tma = arch >= 90
        # fp32 operands: three TF32 products a dot keep about 22 bits of each factor. One would keep 11; exact
        # products ("ieee") leave the tensor cores idle on NVIDIA. 16-bit operands are multiplied exactly anyway.
        self.options = {
            "BLOCK_N": self.tile.tokens,
            "BLOCK_V": self.tile.vocabulary,
            "BLOCK_D": self.tile.features,
            "TMA": self.tma,
            "PRECISION": "tf32x3" if arch else "ieee",
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
        }

    def rows(self, hidden: Tensor):
        """hidden [N, D], as the kernel takes it."""
        return self._operand(hidden, self.tile.tokens)

    def columns(self, weight: Tensor):
        """weight [V, D], as the kernel takes it."""
        return self._operand(weight, self.tile.vocabulary)

    def split_width(self, vocabulary: int, splits: int) -> int:
        """Words that one block reads, in whole tiles, when at most so many blocks share the vocabulary."""
        return triton.cdiv(triton.cdiv(vocabulary, splits), self.tile.vocabulary) * self.tile.vocabulary

    def _operand(self, matrix: Tensor, block: int):
        matrix = matrix.contiguous()
        if not self.tma:
            return matrix
        uneven = -matrix.shape[1] % (16 // matrix.element_size())
        if uneven or matrix.data_ptr() % 16:
            matrix = F.pad(matrix, (0, uneven))  # a copy, also where nothing is added
        # Not from_tensor(): a matrix of one row counts as contiguous whatever its stride, and TMA checks all strides.
        return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], [block, self.tile.features])


def operand_dtype(hidden: Tensor, weight: Tensor, names: str = "hidden and weight") -> torch.dtype:
    """The dtype to multiply in: that of both, or autocast's. ValueError naming what does not fit together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{names} {list(hidden.shape)} and {list(weight.shape)}: expected [N, D] and [V, D]")
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{names} are {hidden.dtype} and {weight.dtype}: expected both in bf16, fp16 or fp32")
    return hidden.dtype
