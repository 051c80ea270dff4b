# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks/kernels.py`` is to reach, and whether its figures do.

The bars, forward and backward. For the backend that ``auto`` chooses:

- FlashAttention-4: at least 0.97 of its own dense kernels on full and causal masks from 16k tokens on.
- original: at least MagiAttention's FFA kernel, once measured on an H100 80GB, at 8k and 32k tokens. To compare across
  runs, both are taken relative to cuDNN's causal attention (PyTorch's SDPA) at as many tokens, of their own run.
- cudnn_flex: at least 1.05 of that backend alone, backward at 32k tokens, on causal documents and on a sliding window;
  and at least 1.3 of it at 32k tokens where 5 % of 64 by 64 blocks count.

For the kernels of ``hopper``, all measured in the same run:

- FlashAttention-4: at least 0.95 of its own dense kernels forward, and 0.92 backward, on full and causal masks from 16k
  tokens on.
- best peer: at least 1.10 of the fastest of ``cudnn_flex``, FlashAttention-4's own kernels and ``blackwell``, which are
  those with a mask class of ours, on all other masks at 8k, 16k and 32k tokens.
- cudnn_flex and FlexAttention: at least 1.3 at 32k tokens where 5 % of 64 by 64 blocks count.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from magi_attention.kernels.protocol import Direction

Cell = dict[str, Any]
"""A figure of the benchmark: ``mask``, ``tokens``, ``contender``, and TFLOP/s ``forward`` and ``backward``, if any."""

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

# TFLOP/s forward and backward: 64/8 heads of 128, bfloat16.
ORIGINAL_FFA = {
    ("full", 8192): (633, 563),
    ("causal", 8192): (511, 479),
    ("varlen_full", 8192): (353, 432),
    ("varlen_causal", 8192): (242, 300),
    ("swa_causal_1024", 8192): (274, 322),
    ("varlen_block_causal_4k", 8192): (379, 412),
    ("full", 32768): (651, 557),
    ("causal", 32768): (618, 544),
    ("varlen_full", 32768): (523, 486),
    ("varlen_causal", 32768): (441, 435),
    ("swa_causal_1024", 32768): (332, 328),
    ("varlen_block_causal_4k", 32768): (481, 467),
}
# Of the same card; where it was measured several times, the best figure, which other load disturbed the least.
ORIGINAL_SDPA_CAUSAL = {8192: (606, 499), 32768: (616, 518)}

FA4_SHARE, FA4_MASKS, FA4_TOKENS = 0.97, ("full", "causal"), 16384
CUDNN_FLEX_TOKENS = 32768
CUDNN_FLEX_SHARES = {
    ("varlen_causal", "backward"): 1.05,
    ("swa_causal_1024", "backward"): 1.05,
    ("blocks_5", "forward"): 1.3,
    ("blocks_5", "backward"): 1.3,
}

HOPPER_DENSE_SHARES = {"forward": 0.95, "backward": 0.92}
HOPPER_SHARE, HOPPER_TOKENS = 1.10, (8192, 16384, 32768)
IRREGULAR_PEERS = ("cudnn_flex", "fa4-native", "blackwell")
BLOCKS, BLOCKS_SHARE, BLOCKS_TOKENS = "blocks_", 1.3, 32768
BEST = "best peer "


class Bar(NamedTuple):
    """One comparison.

    Attributes:
        mask, tokens, direction: of what.
        peer: whom it is held against: ``"fa4-native"``, ``"original"``, ``"cudnn_flex"``, ``"flex-attention"``, or the
            best peer's name after ``"best peer "``.
        ratio: the speed of ``ours`` over the peer's.
        needed: the least ratio that is good enough.
        ours: what is held against it.
    """

    mask: str
    tokens: int
    direction: str
    peer: str
    ratio: float
    needed: float
    ours: str = "auto"

    @property
    def holds(self) -> bool:
        """Whether it is reached."""
        return self.ratio >= self.needed

    def __str__(self) -> str:
        says = "holds" if self.holds else "MISSED"
        ours = "" if self.ours == "auto" else f"{self.ours} "
        return (
            f"{ours}{self.mask} {self.tokens} {self.direction}: {self.ratio:.3f} of {self.peer}, {self.needed} {says}"
        )


def bars(row: Sequence[Cell], sdpa_causal: Cell | None) -> Iterator[Bar]:
    """Compare the cells of one mask and length.

    Args:
        row: the cells; that of the chosen backend has the contender ``"auto"``.
        sdpa_causal: the cell of cuDNN's SDPA with a causal mask, at as many tokens.
    """
    by_name = {cell["contender"]: cell for cell in row}
    chosen = by_name.get("auto", {})
    for at, direction in enumerate(DIRECTIONS):
        if direction not in chosen:
            continue
        mask, tokens, speed = chosen["mask"], chosen["tokens"], chosen[direction]
        if mask in FA4_MASKS and tokens >= FA4_TOKENS and (peer := by_name.get("fa4-native", {}).get(direction)):
            yield Bar(mask, tokens, direction, "fa4-native", speed / peer, FA4_SHARE)
        if (mask, tokens) in ORIGINAL_FFA and (peer := (sdpa_causal or {}).get(direction)):
            original = ORIGINAL_FFA[mask, tokens][at] / ORIGINAL_SDPA_CAUSAL[tokens][at]
            yield Bar(mask, tokens, direction, "original", speed / peer / original, 1.0)
        share = CUDNN_FLEX_SHARES.get((mask, direction)) if tokens == CUDNN_FLEX_TOKENS else None
        if share and (peer := by_name.get("cudnn_flex", {}).get(direction)):
            yield Bar(mask, tokens, direction, "cudnn_flex", speed / peer, share)


def hopper_bars(row: Sequence[Cell]) -> Iterator[Bar]:
    """Compare the kernels of ``hopper`` with their peers.

    Args:
        row: the cells of one mask and length.
    """
    by_name = {cell["contender"]: cell for cell in row}
    ours = by_name.get("hopper", {})
    for direction in DIRECTIONS:
        if direction not in ours:
            continue
        mask, tokens, speed = ours["mask"], ours["tokens"], ours[direction]
        of_peers = {name: cell[direction] for name, cell in by_name.items() if direction in cell}
        if mask in FA4_MASKS:
            needed = {"fa4-native": HOPPER_DENSE_SHARES[direction]} if tokens >= FA4_TOKENS else {}
        elif mask.startswith(BLOCKS):
            has_bar = tokens == BLOCKS_TOKENS and mask == "blocks_5"
            needed = dict.fromkeys(("cudnn_flex", "flex-attention"), BLOCKS_SHARE) if has_bar else {}
        else:
            needed = {}
            peers = [name for name in IRREGULAR_PEERS if name in of_peers]
            if peers and tokens in HOPPER_TOKENS:
                best = max(peers, key=lambda name: of_peers[name])
                yield Bar(mask, tokens, direction, BEST + best, speed / of_peers[best], HOPPER_SHARE, "hopper")
        for peer, share in needed.items():
            if peer in of_peers:
                yield Bar(mask, tokens, direction, peer, speed / of_peers[peer], share, "hopper")


def summary(found: Sequence[Bar]) -> Iterator[str]:
    """Say for each peer in how many comparisons the bar holds, and which of them is the closest."""
    for ours, peer, needed in dict.fromkeys((bar.ours, _kind(bar), bar.needed) for bar in found):
        of_peer = [bar for bar in found if (bar.ours, _kind(bar), bar.needed) == (ours, peer, needed)]
        least = min(of_peer, key=lambda bar: bar.ratio)
        verdict = "HOLDS" if all(bar.holds for bar in of_peer) else "MISSED"
        count = f"{sum(bar.holds for bar in of_peer)} of {len(of_peer)}"
        where = f"{least.mask} {least.tokens} {least.direction}"
        name = "" if ours == "auto" else f"{ours} "
        yield f"{verdict}: {name}at least {needed} of {peer}: {count}, least {least.ratio:.3f} ({where})"


def _kind(bar: Bar) -> str:
    return BEST.strip() if bar.peer.startswith(BEST) else bar.peer
