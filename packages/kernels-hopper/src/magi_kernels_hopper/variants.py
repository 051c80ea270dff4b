# SPDX-License-Identifier: Apache-2.0
"""Every kernel of this package, and its sizes: what is compiled when the wheel is built, and launched from it.

The build hook reads this file alone, so it imports nothing but the standard library.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Literal, NamedTuple

Element = Literal["bf16", "fp16"]
ELEMENTS: dict[Element, str] = {"bf16": "__nv_bfloat16", "fp16": "__half"}
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
"""Head dims of queries and keys, and of values."""

ARCH = "sm_90a"


@dataclass(frozen=True)
class _Variant:
    """What all kernels have.

    Attributes:
        head_dim: of queries and keys.
        head_dim_v: of values.
        element: ``"bf16"`` or ``"fp16"``, the type of queries, keys and values.
        softcap: whether scores are capped.
    """

    head_dim: int
    head_dim_v: int
    element: Element
    softcap: bool = False

    kind: ClassVar[str]
    """What the name begins with."""

    @property
    def dims(self) -> tuple[int, int]:
        """Head dims of queries and keys, and of values."""
        return self.head_dim, self.head_dim_v

    @property
    def name(self) -> str:
        """What its cubin is called."""
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}_v{self.head_dim_v}"
        return f"{self.kind}_{dims}_{self.element}{'_softcap' * self.softcap}"

    @property
    def defines(self) -> dict[str, object]:
        """What the compiler is told."""
        return {
            "MAGI_HEAD_DIM": self.head_dim,
            "MAGI_HEAD_DIM_V": self.head_dim_v,
            "MAGI_ELEMENT": ELEMENTS[self.element],
            "MAGI_SOFTCAP": int(self.softcap),
        }


@dataclass(frozen=True)
class ForwardSizes:
    """Sizes of a forward kernel, chosen by measurement; see ``csrc/forward/traits.cuh``.

    Attributes:
        consumers: warpgroups that compute, each with 64 rows of scores.
        box_n: keys of a box, which the copy engine loads at once; a tile of keys is two boxes.
        stages: tiles of keys, and as many of values, in shared memory.
        stages_out: whether outputs go through shared memory.
        shrinks_rarely: whether what was summed up is scaled only where a row's largest score has grown by much.
        consumer_registers: of each consumer's thread.
        producer_registers: of each thread of the warpgroup that loads.
    """

    consumers: int
    box_n: int
    stages: int
    stages_out: bool
    shrinks_rarely: bool
    consumer_registers: int
    producer_registers: int

    consumer_rows = 64
    """Rows of scores of a consumer."""

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (self.consumers + 1)

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory of a block: tiles, and room for barriers and alignment, which the compiler checks."""
        queries = self.consumer_rows * self.consumers * (head_dim + self.stages_out * head_dim_v)
        tiles = queries + 2 * self.box_n * self.stages * (head_dim + head_dim_v)
        return 2 * tiles + 2048


FORWARD_SIZES = {
    (64, 64): ForwardSizes(3, 64, 2, False, False, 160, 32),
    (96, 96): ForwardSizes(2, 64, 2, False, False, 232, 40),
    (128, 128): ForwardSizes(2, 64, 2, False, False, 240, 24),
    (192, 128): ForwardSizes(2, 64, 2, False, False, 240, 24),
    (192, 192): ForwardSizes(2, 56, 2, False, False, 232, 40),
    (256, 256): ForwardSizes(2, 40, 2, False, False, 232, 40),
}
"""By head dims."""

TALL_SIZES = {(128, 128): ForwardSizes(3, 40, 3, True, True, 160, 32)}
"""The same with one more consumer, without softcap: faster for each pair, and worse where queries of a tile see
different keys, or short spans of them."""


@dataclass(frozen=True)
class ForwardVariant(_Variant):
    """One forward kernel.

    Attributes:
        tall: whether its sizes are of ``TALL_SIZES``.
    """

    tall: bool = False

    kind = "forward"
    source = "forward/forward.cu"
    entry = "magi_forward"
    combine_entry = "magi_forward_combine"

    @property
    def name(self) -> str:
        """See the base."""
        return super().name + "_tall" * self.tall

    @property
    def sizes(self) -> ForwardSizes:
        """Its sizes."""
        return (TALL_SIZES if self.tall else FORWARD_SIZES)[self.dims]

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.sizes.shared_bytes(*self.dims)

    @property
    def defines(self) -> dict[str, object]:
        """What the compiler is told."""
        return super().defines | {
            "MAGI_CONSUMERS": self.sizes.consumers,
            "MAGI_BOX_N": self.sizes.box_n,
            "MAGI_STAGES": self.sizes.stages,
            "MAGI_STAGES_OUT": int(self.sizes.stages_out),
            "MAGI_SHRINKS_RARELY": int(self.sizes.shrinks_rarely),
            "MAGI_CONSUMER_REGISTERS": self.sizes.consumer_registers,
            "MAGI_PRODUCER_REGISTERS": self.sizes.producer_registers,
            "MAGI_SHARED_BYTES": self.shared_bytes,
        }


@dataclass(frozen=True)
class BackwardSizes:
    """Sizes of a backward kernel, chosen by measurement; see ``csrc/backward/traits.cuh``.

    Attributes:
        tile_m: rows of queries of a tile.
        tile_n: keys of a tile: 64 for each warpgroup that computes, or for both together where heads are wide.
        stages: tiles of queries, and as many of gradients of outputs, in shared memory.
        dq_parts: into how many parts the sums of a tile's gradients of queries are cut.
        shared_bytes: of a block, which the compiler checks.
    """

    tile_m: int
    tile_n: int
    stages: int
    dq_parts: int
    shared_bytes: int

    threads = 384
    row_threads = 256
    """Threads of a block of the kernel that comes before."""


BACKWARD_SIZES = {
    (64, 64): BackwardSizes(64, 128, 2, 1, 134 << 10),
    (96, 96): BackwardSizes(64, 128, 2, 1, 180 << 10),
    (128, 128): BackwardSizes(80, 128, 2, 2, 227 << 10),
    (192, 128): BackwardSizes(64, 64, 2, 2, 203 << 10),
    (192, 192): BackwardSizes(64, 64, 2, 2, 227 << 10),
    (256, 256): BackwardSizes(64, 64, 2, 2, 227 << 10),
}
"""By head dims."""

FINE_SIZES = {
    (64, 64): BackwardSizes(64, 64, 4, 1, 104 << 10),
    (96, 96): BackwardSizes(64, 64, 4, 1, 152 << 10),
    (128, 128): BackwardSizes(64, 64, 4, 2, 202 << 10),
}
"""The same of kernels for masks of small blocks, without softcap. Another kernel computes gradients of queries: a pair
takes both together longer, and they meet fewer that the mask hides."""


class QueryKernel(NamedTuple):
    """A kernel that computes gradients of queries alone; see ``csrc/backward/backward.cu``.

    Attributes:
        entry: its name.
        rows: of queries of a tile, 64 for each warpgroup that computes.
        box_n: keys of a box, two of which are a tile.
        threads: of a block.
        blocks: that share a multiprocessor.
    """

    entry: str
    rows: int
    box_n: int
    threads: int
    blocks: int


@dataclass(frozen=True)
class BackwardVariant(_Variant):
    """One backward kernel, and the one that comes before it.

    Attributes:
        fine: whether its sizes are of ``FINE_SIZES``.
    """

    fine: bool = False

    kind = "backward"
    source = "backward/backward.cu"
    entry = "magi_backward"
    prepare_entry = "magi_backward_prepare"
    query_kernels = (
        QueryKernel("magi_backward_queries", 128, 64, 384, 1),
        QueryKernel("magi_backward_queries_of_heads", 64, 32, 256, 2),
    )
    """Of fine kernels, those that compute gradients of queries: where heads share tiles, and where they do not."""

    @property
    def name(self) -> str:
        """See the base."""
        return super().name + "_fine" * self.fine

    @property
    def sizes(self) -> BackwardSizes:
        """Its sizes."""
        return (FINE_SIZES if self.fine else BACKWARD_SIZES)[self.dims]

    @property
    def splits(self) -> bool:
        """Whether the gradients of a tile of keys may be the sum of several blocks' work."""
        return self.head_dim <= 128

    @property
    def defines(self) -> dict[str, object]:
        """What the compiler is told."""
        return super().defines | {
            "MAGI_TILE_M": self.sizes.tile_m,
            "MAGI_TILE_N": self.sizes.tile_n,
            "MAGI_STAGES": self.sizes.stages,
            "MAGI_DQ_PARTS": self.sizes.dq_parts,
            "MAGI_FINE": int(self.fine),
            **{
                f"MAGI_{kind}_{size}": value
                for kind, each in zip(("PACKS", "HEADS"), self.query_kernels, strict=True)
                for size, value in (("ROWS", each.rows), ("BOX", each.box_n), ("THREADS", each.threads))
            },
            "MAGI_SHARED_BYTES": self.sizes.shared_bytes,
        }


@dataclass(frozen=True)
class IndexSizes:
    """Sizes of a kernel of index attention; see ``csrc/index/traits.cuh``.

    Attributes:
        stages: tiles of 64 keys and values in shared memory.
        blocks: that share a multiprocessor.
        consumer_registers: of each thread that computes.
        producer_registers: of each thread that gathers.
    """

    stages: int
    blocks: int
    consumer_registers: int
    producer_registers: int

    threads = 256
    rows = 64
    """Rows of scores of a block: query heads of one token."""
    keys = 64
    """Of a tile."""

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory of a block: tiles, and a kilobyte for barriers, which the compiler checks."""
        tiles = self.rows * head_dim + self.keys * self.stages * (head_dim + head_dim_v)
        return 2 * tiles + 1024


INDEX_SIZES = {
    (64, 64): IndexSizes(4, 2, 200, 56),
    (96, 96): IndexSizes(3, 2, 200, 56),
    (128, 128): IndexSizes(3, 2, 200, 56),
    (192, 128): IndexSizes(4, 1, 240, 64),
    (192, 192): IndexSizes(4, 1, 240, 64),
    (256, 256): IndexSizes(3, 1, 240, 64),
}
"""By head dims."""


@dataclass(frozen=True)
class IndexVariant(_Variant):
    """One kernel of index attention, and the one that comes before it."""

    kind = "index"
    source = "index/index.cu"
    entry = "magi_index"
    unite_entry = "magi_index_unite"

    @property
    def sizes(self) -> IndexSizes:
        """Its sizes."""
        return INDEX_SIZES[self.dims]

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.sizes.shared_bytes(*self.dims)

    @property
    def defines(self) -> dict[str, object]:
        """What the compiler is told."""
        return super().defines | {
            "MAGI_STAGES": self.sizes.stages,
            "MAGI_BLOCKS": self.sizes.blocks,
            "MAGI_CONSUMER_REGISTERS": self.sizes.consumer_registers,
            "MAGI_PRODUCER_REGISTERS": self.sizes.producer_registers,
            "MAGI_SHARED_BYTES": self.shared_bytes,
        }


@dataclass(frozen=True)
class IndexBackwardSizes(IndexSizes):
    """Sizes of a backward kernel of index attention; see ``csrc/index/backward_traits.cuh``."""

    row_threads = 256
    """Threads of a block of the kernels before and after it."""

    def rows_of_block(self, head_dim_v: int) -> int:
        """Rows of queries whose terms a block computes."""
        vectors = head_dim_v // 8
        return self.row_threads // (8 if vectors <= 8 else 16 if vectors <= 16 else 32)

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory of a block: tiles, and three kilobytes for what is of rows, which the compiler checks."""
        tiles = (self.rows + self.keys * self.stages) * (head_dim + head_dim_v) + self.rows * self.keys
        return 2 * tiles + 3072


INDEX_BACKWARD_SIZES = {
    (64, 64): IndexBackwardSizes(4, 2, 200, 56),
    (96, 96): IndexBackwardSizes(3, 2, 200, 56),
    (128, 128): IndexBackwardSizes(2, 2, 200, 56),
    (192, 128): IndexBackwardSizes(4, 1, 240, 64),
    (192, 192): IndexBackwardSizes(3, 1, 240, 64),
    (256, 256): IndexBackwardSizes(2, 1, 248, 64),
}
"""By head dims."""


@dataclass(frozen=True)
class IndexBackwardVariant(IndexVariant):
    """One backward kernel of index attention, and those that come before and after it."""

    kind = "index_backward"
    source = "index/backward.cu"
    entry = "magi_index_backward"
    prepare_entry = "magi_index_backward_prepare"
    sum_entry = "magi_index_backward_sum"
    finish_entry = "magi_index_backward_finish"

    @property
    def sizes(self) -> IndexBackwardSizes:
        """Its sizes."""
        return INDEX_BACKWARD_SIZES[self.dims]


Variant = ForwardVariant | BackwardVariant | IndexVariant | IndexBackwardVariant


def forward_variants(dims: tuple[int, int], element: Element, softcap: bool) -> list[ForwardVariant]:
    """The kernels that serve head dims: one, or two of which the mask decides, the tall one last."""
    low = ForwardVariant(*dims, element, softcap)
    return [low, replace(low, tall=True)] if dims in TALL_SIZES and not softcap else [low]


def backward_variants(dims: tuple[int, int], element: Element, softcap: bool) -> list[BackwardVariant]:
    """The same backward, the fine one last."""
    coarse = BackwardVariant(*dims, element, softcap)
    return [coarse, replace(coarse, fine=True)] if dims in FINE_SIZES and not softcap else [coarse]


def all_variants() -> list[Variant]:
    """Every kernel, in the order in which they are compiled."""
    scores = list(product(ELEMENTS, (False, True)))
    return [
        *(
            each
            for dims, (element, softcap) in product(HEAD_DIMS, scores)
            for each in forward_variants(dims, element, softcap)
        ),
        *(
            each
            for dims, (element, softcap) in product(BACKWARD_SIZES, scores)
            for each in backward_variants(dims, element, softcap)
        ),
        *(
            kind(*dims, element, softcap)
            for kind, dims, (element, softcap) in product((IndexVariant, IndexBackwardVariant), INDEX_SIZES, scores)
        ),
    ]


def compiler_options(variant: Variant) -> list[str]:
    """What nvcc is told besides the paths."""
    defines = [f"-D{name}={value}" for name, value in variant.defines.items()]
    return ["-std=c++17", "-O3", f"-gencode=arch=compute_{ARCH[3:]},code={ARCH}", "-cubin", *defines]
