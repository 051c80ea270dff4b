# SPDX-License-Identifier: Apache-2.0
"""Whether the installed plug-ins got the versions that they require, of the core and of other projects."""

from collections.abc import Iterator
from functools import partial
from importlib import metadata

from packaging.requirements import Requirement

from magi_attention.cli.doctor.findings import Check, attempt
from magi_attention.comm.registry import ENTRY_POINT_GROUP as TRANSPORTS
from magi_attention.kernels.registry import ENTRY_POINT_GROUP as BACKENDS

CORE = "magi-attention"


def check_requirements() -> Iterator[Check]:
    """Look at every distribution that brings backends or transports, but the core's own.

    The core may rightly run with a PyTorch that pip takes for an older one, such as that of NVIDIA's containers.
    """
    points = (*metadata.entry_points(group=BACKENDS), *metadata.entry_points(group=TRANSPORTS))
    plugins = {point.dist.name: point.dist for point in points if point.dist is not None and point.dist.name != CORE}
    for name, plugin in sorted(plugins.items()):
        yield attempt(f"{name} {plugin.version}", partial(_check, plugin))


def _check(plugin: metadata.Distribution) -> str:
    requirements = [Requirement(text) for text in plugin.requires or ()]
    needed = [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    if unmet := [text for text in map(_why_unmet, needed) if text]:
        raise RuntimeError(f"it requires {'; '.join(unmet)}")
    return "all that it requires is installed"


def _why_unmet(needed: Requirement) -> str:
    """Say what is required and what is there instead; empty if that will do."""
    try:
        installed = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return f"{needed}, which is not installed"
    return "" if needed.specifier.contains(installed, prereleases=True) else f"{needed}, installed is {installed}"
