# SPDX-License-Identifier: Apache-2.0
"""Environment variables of communication. A switch is on if its text is ``1``."""

from magi_attention.env.variables import parse_choice, parse_flag, parse_int, variable


@variable("MAGI_ATTENTION_QO_COMM")
def is_qo_comm_enable(text: str) -> bool:
    """Let queries and outputs travel as well as keys and values; every overlap config becomes one of degree 1."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_HIERARCHICAL_COMM")
def is_hierarchical_comm_enable(text: str) -> bool:
    """Exchange rows in two hops, first between nodes, then inside each; needs a 2-D mesh."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_NATIVE_GRPCOLL")
def is_native_grpcoll_enable(text: str) -> bool:
    """Exchange rows by the native group collectives of the magi-comm-grpcoll wheel."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_FORWARD_HIGH_PRECISION_REDUCE")
def is_forward_high_precision_reduce_enable(text: str) -> bool:
    """Send partial outputs in at least float32; matters where queries and outputs travel."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_BACKWARD_HIGH_PRECISION_REDUCE")
def is_backward_high_precision_reduce_enable(text: str) -> bool:
    """Send partial gradients in at least float32 instead of the inputs' data type."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_DSINK_ALL_REDUCE_OP", "none")
def dsink_all_reduce_op(text: str) -> str:
    """How the ranks' gradients of the sink are combined: none, sum or avg."""
    return parse_choice(text, ("none", "sum", "avg"))


@variable("MAGI_ATTENTION_CHECK_PLAN", "1")
def is_plan_check_enable(text: str) -> bool:
    """Ranks compare their plans once for every new key, and raise on every rank where they differ."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_CHECK_PLAN_TIMEOUT", "600")
def plan_check_timeout(text: str) -> int:
    """Seconds after which a rank that does not come to the comparison of plans is an error on the others."""
    return parse_int(text, minimum=1)


@variable("MAGI_ATTENTION_KEEP_RECEIVED", "1")
def is_keep_received_enable(text: str) -> bool:
    """Keep received keys and values for the backward pass where they take little memory; else exchange them again."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_BWD_HIDE_TAIL_REDUCE", ignored=True)
def is_bwd_hide_tail_reduce_enable(text: str) -> bool:
    """Keep the last remote keys and values for the backward pass: see ``MAGI_ATTENTION_KEEP_RECEIVED``."""
    return parse_flag(text)


@variable("LOCAL_WORLD_SIZE", "")
def local_world_size(text: str) -> int | None:
    """The number of ranks on this node, as set by torchrun; unset, all ranks count as being on one node."""
    return parse_int(text, minimum=1) if text else None
