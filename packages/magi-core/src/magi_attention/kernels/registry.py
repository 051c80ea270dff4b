# SPDX-License-Identifier: Apache-2.0
"""Which attention kernel backends are installed, and which of them serves a request, in each direction.

Backends are found by entry points of the group ``magi_attention.kernels``; those of the core are listed there too.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from typing import NamedTuple

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.mask_class import mask_class
from magi_attention.kernels.protocol import (
    AttendsToIndices,
    AttentionRequest,
    DifferentiatesByIndices,
    KernelBackend,
    Support,
)
from magi_attention.kernels.speeds import ALIASES, measured_tflops

ENTRY_POINT_GROUP = "magi_attention.kernels"

# The extras of the distribution that bring backends, by the backends' names.
EXTRAS = {"hopper": "hopper", "blackwell": "blackwell", "fa4": "blackwell", "cudnn_flex": "blackwell"}

logger = logging.getLogger(__name__)
_logged: set[object] = set()


class UnloadableBackend:
    """Stands for an installed backend whose module fails to import, so that the others remain usable.

    Attributes:
        name: its entry point.
        reason: why it cannot be loaded.
    """

    def __init__(self, name: str, error: BaseException) -> None:
        self.name = name
        self.reason = f"its package is installed but cannot be loaded: {error!r}"

    def supports(self, request: AttentionRequest) -> Support:
        """No."""
        return Support(False, self.reason)

    def expected_tflops(self, request: AttentionRequest) -> float:
        """Nothing."""
        return 0.0

    def forward(self, *args: object) -> None:
        """Raise the ``RuntimeError`` that the answer of ``supports`` announces."""
        raise RuntimeError(f"backend {self.name!r}: {self.reason}")

    backward = forward


@cache
def installed_backends() -> dict[str, KernelBackend]:
    """Load every installed backend; returns them by the names of their entry points, sorted."""
    backends = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            backends[point.name] = point.load()
        except (Exception, SystemExit) as error:  # a plug-in's import may fail in any way
            logger.warning("The kernel backend %r cannot be loaded: %r", point.name, error)
            backends[point.name] = UnloadableBackend(point.name, error)
    return dict(sorted(backends.items()))


@dataclass(frozen=True)
class Choice:
    """The backend chosen for one direction, and why.

    Attributes:
        name: of the backend's entry point.
        backend: the backend.
        speeds: TFLOP/s expected of every backend that supports the request, by name, the fastest first.
        refusals: why the others do not, by name.
    """

    name: str
    backend: KernelBackend
    speeds: dict[str, float]
    refusals: dict[str, str]

    def __str__(self) -> str:
        slower = [f"{name} {speed:.4g}" for name, speed in self.speeds.items() if name != self.name]
        reasons = [*slower, *(f"not {name}: {reason}" for name, reason in self.refusals.items())]
        expected = f"{self.name!r} (expected {self.speeds[self.name]:.4g} TFLOP/s"
        return "; ".join([expected, *reasons]) + ")"


class BackendPair(NamedTuple):
    """What computes the two passes of one attention."""

    forward: KernelBackend
    backward: KernelBackend

    @property
    def name(self) -> str:
        """The backend's name, or ``forward/backward`` where they differ."""
        return "/".join(dict.fromkeys(backend.name for backend in self))


def choose_backend(request: AttentionRequest, name: str = "auto") -> KernelBackend:
    """Choose the backend for ``request``, in its direction.

    Args:
        request: what will be asked of the backend.
        name: an installed backend's name, one of the aliases ``ffa``, ``fa4``, ``sdpa``, ``sdpa_ol``, or ``auto`` for
            the one that is expected to be the fastest of those that support the request. Case does not matter.

    Raises:
        ValueError: If no backend of that name exists.
        RuntimeError: If its package is not installed, or if no backend can serve the request; with the reasons.
    """
    return explain_choice(request, name).backend


def choose_backends(request: AttentionRequest, name: str = "auto", backward_name: str = "same") -> BackendPair:
    """Choose the backends for both passes of an attention; each new choice is one line of the log.

    Args:
        request: the forward pass.
        name: as for :func:`choose_backend`.
        backward_name: the same for the backward pass; ``same`` for ``name``.

    Raises:
        ValueError: as :func:`choose_backend`.
        RuntimeError: as :func:`choose_backend`.
    """
    forward = explain_choice(request.toward("forward"), name)
    backward = explain_choice(request.toward("backward"), name if backward_name.lower() == "same" else backward_name)
    told = replace(request, num_pairs=None), forward.name, backward.name  # not a line for masks of each size
    if told not in _logged:
        _logged.add(told)
        logger.info("Kernel backends for %s: forward %s, backward %s", request, forward, backward)
    return BackendPair(forward.backend, backward.backend)


def backends_for_slices(
    slices: SliceTable, request: AttentionRequest, name: str = "auto", backward_name: str = "same"
) -> BackendPair:
    """Choose as :func:`choose_backends` does, by this mask's class and size; once per request, kept with the table."""
    return slices.derived(
        ("kernel backends", request, name, backward_name),
        lambda: choose_backends(
            replace(request, mask_class=mask_class(slices), num_pairs=slices.area()), name, backward_name
        ),
    )


class IndexBackends(NamedTuple):
    """What computes the two passes of index attention: a backend with a kernel for it, or None for plain torch."""

    forward: AttendsToIndices | None
    backward: DifferentiatesByIndices | None


def choose_for_indices(request: AttentionRequest, name: str = "auto", backward_name: str = "same") -> IndexBackends:
    """Choose the backends that have kernels for index attention and serve ``request``; each new choice is logged.

    Args:
        request: the forward pass.
        name: as for :func:`choose_backend`.
        backward_name: as for :func:`choose_backends`.

    Raises:
        ValueError: as :func:`choose_backend`.
        RuntimeError: If its package is not installed.
    """
    forward, backward = request.toward("forward"), request.toward("backward")
    candidates = _candidates(name)
    others = candidates if backward_name.lower() == "same" else _candidates(backward_name)
    attends = {label: x for label, x in candidates.items() if isinstance(x, AttendsToIndices)}
    differentiates = {label: x for label, x in others.items() if isinstance(x, DifferentiatesByIndices)}
    chosen = IndexBackends(
        next((x for x in attends.values() if x.supports_indices(forward)), None),
        next((x for x in differentiates.values() if x.supports_indices(backward)), None),
    )
    if (request, name, backward_name, IndexBackends) not in _logged:
        _logged.add((request, name, backward_name, IndexBackends))
        told = _told(chosen.forward, attends, forward), _told(chosen.backward, differentiates, backward)
        logger.info("Index attention for %s: forward %s, backward %s", request, *told)
    return chosen


def _told(chosen: AttendsToIndices | None, able: Mapping[str, AttendsToIndices], request: AttentionRequest) -> str:
    """What computes a pass of index attention; if it is no kernel, why not."""
    for label, backend in able.items():
        if backend is chosen:
            return repr(label)
    refusals = (f"not {label}: {backend.supports_indices(request).reason}" for label, backend in able.items())
    return f"plain PyTorch ({'; '.join(refusals) or 'no backend in question has a kernel'})"


def explain_choice(request: AttentionRequest, name: str = "auto") -> Choice:
    """Choose as :func:`choose_backend` does, and say what was considered."""
    backends = _candidates(name)
    speeds: dict[str, float] = {}
    refusals: dict[str, str] = {}
    for label, backend in backends.items():
        support = backend.supports(request)
        if support:
            measured = measured_tflops(label, request)
            speeds[label] = backend.expected_tflops(request) if measured is None else measured
        else:
            refusals[label] = support.reason
    if not speeds:
        reasons = "".join(f"\n  {label}: {reason}" for label, reason in refusals.items())
        reasons = reasons or " none is found, so install magi-attention by pip; its folder on the path is not enough"
        raise RuntimeError(f"No kernel backend can serve {request}:{reasons}")
    fastest_first = dict(sorted(speeds.items(), key=lambda item: -item[1]))
    chosen = next(iter(fastest_first))
    return Choice(chosen, backends[chosen], fastest_first, refusals)


def _candidates(name: str) -> dict[str, KernelBackend]:
    """All backends for ``auto``, else the one of that name."""
    backends = installed_backends()
    if name.lower() == "auto":
        return backends
    wanted = name.lower() if name.lower() in backends else ALIASES.get(name.lower(), name.lower())
    return {wanted: _named(wanted, name, backends)}


def _named(wanted: str, given: str, backends: dict[str, KernelBackend]) -> KernelBackend:
    if wanted in backends:
        return backends[wanted]
    if wanted in EXTRAS:
        raise RuntimeError(
            f"The kernel backend {given!r} is not installed: pip install 'magi-attention[{EXTRAS[wanted]}]'"
        )
    known = ", ".join(["auto", *ALIASES, *backends])
    raise ValueError(f"There is no kernel backend {given!r}; known are {known}")
