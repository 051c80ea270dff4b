# SPDX-License-Identifier: Apache-2.0
"""The environment variables that are set, the folder of compiled kernels, and a plan whose figures must add up."""

import time
from functools import partial

import numpy as np

from magi_attention.cli.doctor.findings import Check, attempt
from magi_attention.common import workloads
from magi_attention.config import DistAttnConfig, LocalityDispatchAlg
from magi_attention.env import VARIABLES, general
from magi_attention.env.build import kernel_cache_dir
from magi_attention.env.variables import read_variable, texts_set
from magi_attention.kernels.protocol import Precompiles
from magi_attention.kernels.registry import installed_backends
from magi_attention.kernels.speeds import read_speeds
from magi_attention.plan.build import build_plans
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.exchange import ExchangeTable
from magi_attention.plan.stages import StageOptions
from magi_attention.utils.folders import why_unwritable

PLANNED_TOKENS, PLANNED_RANKS, PLANNED_CHUNK = 1 << 16, 8, 1024


def variables_set() -> dict[str, dict[str, str]]:
    """The project's environment variables that are set, with what they mean."""
    found = {}
    for name, text in texts_set().items():
        known = VARIABLES.get(name)
        meaning = "unknown: no such variable" if known is None else known.meaning
        found[name] = {"text": text, "meaning": f"ignored: {meaning}" if known and known.ignored else meaning}
    return found


def check_variables() -> list[Check]:
    """Read every variable that is set, and the configuration that follows from all of them."""
    checks = []
    for name, text in texts_set().items():
        if name in VARIABLES:
            checks.append(attempt(name, partial(_read, name, text)))
        else:
            checks.append(Check(name, "failed", "there is no such variable; is it misspelled?"))
    return [*checks, attempt("configuration", _resolve)]


def check_kernel_folder() -> Check:
    """See whether kernels that backends compile can be kept on disk."""
    if not any(isinstance(backend, Precompiles) for backend in installed_backends().values()):
        return Check("compiled kernels", "skipped", "no installed backend compiles kernels that are kept on disk")
    return attempt("compiled kernels", _try_kernel_folder)


def check_planner() -> Check:
    """Plan packed documents for some ranks: all pairs must be computed, and all rows that are sent received."""
    return attempt("planner", _plan)


def _read(name: str, text: str) -> str:
    value = read_variable(name)
    if isinstance(value, bool) and text.strip() not in ("0", "1") and not VARIABLES[name].ignored:
        raise ValueError(f"{text!r} switches it off: a switch is on if its text is 1, and only then")
    if name == "MAGI_ATTENTION_KERNEL_SPEEDS":
        return f"{len(read_speeds(general.kernel_speeds()))} measured figures"
    return f"read as {value!r}"


def _try_kernel_folder() -> str:
    folder = kernel_cache_dir()
    if reason := why_unwritable(folder):
        raise RuntimeError(f"cannot be kept in {folder} ({reason}); MAGI_ATTENTION_FFA_FA4_CACHE_DIR names another")
    return f"are kept in {folder}"


def _resolve() -> str:
    DistAttnConfig().resolved()
    return "defaults and environment variables go together"


def _plan() -> str:
    mask = workloads.make("varlen_causal", PLANNED_TOKENS)
    start = time.perf_counter()
    layout = make_layout(
        mask,
        num_real=PLANNED_TOKENS,
        total=PLANNED_TOKENS,
        chunk_size=PLANNED_CHUNK,
        num_ranks=PLANNED_RANKS,
        algorithm=LocalityDispatchAlg(),
    )
    plans = build_plans(mask, layout, range(PLANNED_RANKS), StageOptions(degree=1))
    milliseconds = 1e3 * (time.perf_counter() - start)
    computed = np.array([sum(stage.slices.area() for stage in plan.stages) for plan in plans])
    tables = [[each.exchange for each in plan.stages if isinstance(each.exchange, ExchangeTable)] for plan in plans]
    sent = sum(sum(table.send_counts) for row in tables for table in row)
    received = sum(sum(table.recv_counts) for row in tables for table in row)
    if computed.sum() != mask.area() or sent != received:
        raise RuntimeError(
            f"the mask keeps {mask.area():,} pairs, the ranks compute {computed.sum():,}; they send {sent:,} rows and "
            f"receive {received:,}"
        )
    return (
        f"{PLANNED_TOKENS:,} tokens on {PLANNED_RANKS} ranks in {milliseconds:.1f} ms (all ranks); the busiest "
        f"computes {computed.max() * PLANNED_RANKS / computed.sum():.3f} of the mean; {received:,} rows travel"
    )
