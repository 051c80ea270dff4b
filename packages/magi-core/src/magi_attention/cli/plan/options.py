# SPDX-License-Identifier: Apache-2.0
"""What the user of ``magi plan`` can choose; light to import, since the help text needs it."""

from dataclasses import dataclass
from pathlib import Path

from magi_attention.common.slices import MOST_ROWS

RANKS_PER_NODE = 8


@dataclass(frozen=True)
class PlanOptions:
    """All choices of one plan, checked. Exactly one of ``mask``, ``cu_seqlens`` and ``slices`` is given.

    Attributes:
        mask: name of a mask of :mod:`magi_attention.common.workloads`.
        tokens: length of the sequence; needed with ``mask``, and no shorter than the slices' ends with ``slices``.
        cu_seqlens: file of the documents' cumulative lengths.
        cu_seqlens_k: the same for keys of another sequence, to which the documents' queries attend.
        causal: whether documents are causal or, if False, see all of themselves; None for causal, with
            ``cu_seqlens_k`` for all, unless ``window`` says more.
        window: keys that a token of a document sees to its left and right; -1 for all.
        slices: file of a JSON list of slices.
        tokens_k: length of the sequence of keys, where the keys of ``slices`` are of another sequence.
        ranks: size of the group.
        nodes: machines that the ranks are spread over evenly; None for as many as 8 ranks to a node take.
        simulate: whether to compare overlap degrees.
        chunk_size: the most rows of a chunk; None for the planner's choice.
        algorithm: name of the dispatch algorithm; None for the default.
        overlap_degree: remote stages; None for automatic.
        hierarchical: whether rows cross between nodes once, to be spread there (two hops).
        qo: whether queries travel to the keys, and outputs back, where that moves fewer bytes.
        uneven: whether ranks may hold unequal numbers of tokens, instead of padding.
        heads_q: query heads.
        heads_kv: key/value heads.
        head_dim: size of a head.
        rates: file of measured rates, or ``"measured"`` for those measured last; None for round numbers.
        link: GB/s that a rank can send, and receive, from other nodes; None to leave it to ``rates``.
        nvlink: the same within its node.
        tflops: rate of the forward kernel, in Tflop/s, and by it that of the backward kernel; None likewise.
    """

    mask: str | None = None
    tokens: int | None = None
    cu_seqlens: Path | None = None
    cu_seqlens_k: Path | None = None
    causal: bool | None = None
    window: tuple[int, int] | None = None
    slices: Path | None = None
    tokens_k: int | None = None
    ranks: int = 8
    nodes: int | None = None
    simulate: bool = False
    chunk_size: int | None = None
    algorithm: str | None = None
    overlap_degree: int | None = 1
    hierarchical: bool = False
    qo: bool = False
    uneven: bool = False
    heads_q: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    rates: str | None = None
    link: float | None = None
    nvlink: float | None = None
    tflops: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work, in the words of the command line."""
        self._check_mask()
        for name in ("ranks", "nodes", "tokens", "tokens_k", "chunk_size", "heads_q", "heads_kv", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(name)} must be at least 1, not {value}")
        for name in ("tokens", "tokens_k"):
            value = getattr(self, name)
            if value is not None and value > MOST_ROWS:
                raise ValueError(f"{_flag(name)} must be at most {MOST_ROWS}, not {value}")
        for name in ("link", "nvlink", "tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{_flag(name)} must be a number above 0, not {value:g}")
        if self.heads_q % self.heads_kv:
            raise ValueError(f"--heads-q {self.heads_q} must be a multiple of --heads-kv {self.heads_kv}")
        if self.nodes is not None and self.ranks % self.nodes:
            raise ValueError(f"--nodes {self.nodes} must divide the {self.ranks} ranks: every node has as many")
        self._check_exchanges()

    def _check_exchanges(self) -> None:
        if self.hierarchical and self.qo:
            raise ValueError("--hierarchical and --qo cannot be combined: queries travel in one hop only")
        if self.hierarchical and (self.ranks <= self.ranks_per_node or self.ranks % self.ranks_per_node):
            raise ValueError(
                f"--hierarchical needs several nodes of equally many ranks, unlike {self.ranks} ranks in nodes of "
                f"{self.ranks_per_node}; give --nodes"
            )
        if self.qo and self.overlap_degree != 1:
            degree = "auto" if self.overlap_degree is None else self.overlap_degree
            raise ValueError(f"--qo has one stage for each direction; leave --overlap-degree {degree} away")

    def _check_mask(self) -> None:
        inputs = {"--mask": self.mask, "--cu-seqlens": self.cu_seqlens, "--slices": self.slices}
        given = [flag for flag, value in inputs.items() if value is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} were" if given else "none was"
            raise ValueError(f"give one of --mask NAME --tokens N, --cu-seqlens FILE and --slices FILE; {found} given")
        if self.mask is not None and self.tokens is None:
            raise ValueError(f"--mask {self.mask} needs --tokens N, the length of the sequence")
        if self.cu_seqlens is None:
            flags = (("--causal/--full", self.causal), ("--window", self.window), ("--cu-seqlens-k", self.cu_seqlens_k))
            for flag, value in flags:
                if value is not None:
                    raise ValueError(f"{flag} goes with --cu-seqlens; {given[0]} says itself what is seen")
        elif self.tokens is not None:
            raise ValueError("--tokens goes with --mask or --slices; the last number of --cu-seqlens is the length")
        if self.tokens_k is not None and self.slices is None:
            raise ValueError(
                "--tokens-k goes with --slices; --cu-seqlens has --cu-seqlens-k for keys of another sequence"
            )
        if self.window is not None:
            if self.causal is not None:
                raise ValueError("--window says what is seen on both sides; leave --causal/--full away")
            if min(self.window) < -1:
                raise ValueError(
                    f"--window takes numbers of keys, or -1 for all, not {self.window[0]} {self.window[1]}"
                )

    @property
    def ranks_per_node(self) -> int:
        """Ranks that share a node."""
        return RANKS_PER_NODE if self.nodes is None else self.ranks // self.nodes


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
