# SPDX-License-Identifier: Apache-2.0
"""Which attention kernel backends are installed, and which of them serves a request.

Backends are found by entry points of the group ``magi_attention.kernels``; those of the core are listed there too.
"""

import logging
from functools import cache
from importlib.metadata import entry_points

from magi_attention.kernels.protocol import AttentionRequest, KernelBackend, Support

ENTRY_POINT_GROUP = "magi_attention.kernels"

# Names that callers of the original use. `sdpa` and `sdpa_ol` were its two plain torch backends.
ALIASES = {"ffa": "hopper", "fa4": "blackwell", "sdpa": "reference", "sdpa_ol": "reference"}

# The extras of the distribution that bring backends.
EXTRAS = ("hopper", "blackwell")

logger = logging.getLogger(__name__)
_logged: set[tuple[AttentionRequest, str]] = set()


class _Unloadable:
    """Stands for an installed backend whose module fails to import, so that the others remain usable."""

    priority = 0

    def __init__(self, name: str, error: Exception) -> None:
        self.name = name
        self._support = Support(False, f"its package is installed but cannot be loaded: {error!r}")

    def supports(self, request: AttentionRequest) -> Support:
        return self._support

    def forward(self, *args: object) -> None:
        raise RuntimeError(f"backend {self.name!r}: {self._support.reason}")

    backward = forward


@cache
def installed_backends() -> dict[str, KernelBackend]:
    """Load every installed backend; returns them by the names of their entry points, best first."""
    backends = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            backends[point.name] = point.load()
        except Exception as error:  # a plug-in's import may fail in any way
            logger.warning("The kernel backend %r cannot be loaded: %r", point.name, error)
            backends[point.name] = _Unloadable(point.name, error)
    return dict(sorted(backends.items(), key=lambda item: (-item[1].priority, item[0])))


def choose_backend(request: AttentionRequest, name: str = "auto") -> KernelBackend:
    """Choose the backend for ``request``.

    Args:
        request: what will be asked of the backend.
        name: an installed backend's name, one of the aliases ``ffa``, ``fa4``, ``sdpa``, ``sdpa_ol``, or ``auto`` for
            the backend of greatest priority that supports the request. Case does not matter.

    Raises:
        ValueError: If no backend of that name exists.
        RuntimeError: If its package is not installed, or if no backend can serve the request; with the reasons.
    """
    backends = installed_backends()
    wanted = ALIASES.get(name.lower(), name.lower())
    if wanted != "auto":
        backends = {wanted: _named(wanted, name, backends)}
    refusals: dict[str, str] = {}
    for label, backend in backends.items():
        support = backend.supports(request)
        if support:
            _log_once(request, label, refusals)
            return backend
        refusals[label] = support.reason
    reasons = "".join(f"\n  {label}: {reason}" for label, reason in refusals.items())
    raise RuntimeError(f"No kernel backend can serve {request}:{reasons or ' none is installed'}")


def _named(wanted: str, given: str, backends: dict[str, KernelBackend]) -> KernelBackend:
    if wanted in backends:
        return backends[wanted]
    if wanted in EXTRAS:
        raise RuntimeError(f"The kernel backend {given!r} is not installed: pip install 'magi-attention[{wanted}]'")
    known = ", ".join(["auto", *ALIASES, *backends])
    raise ValueError(f"There is no kernel backend {given!r}; known are {known}")


def _log_once(request: AttentionRequest, label: str, refusals: dict[str, str]) -> None:
    if (request, label) not in _logged:
        _logged.add((request, label))
        passed = "; ".join(f"not {other}: {reason}" for other, reason in refusals.items())
        logger.info("Kernel backend %r serves %s%s", label, request, f" ({passed})" if passed else "")
