# SPDX-License-Identifier: Apache-2.0
"""What stands where something else should, so that a failure on GPUs tells its cause."""

import torch
from torch import Tensor


class LastWrong:
    """The last time that values were wrong, kept on the GPU without a host synchronization.

    Args:
        like: a tensor of the same size.
        num_terms: of how many equal terms a value is the sum; they are 100 more in each epoch.
    """

    def __init__(self, like: Tensor, num_terms: int = 1) -> None:
        self._got = self._wanted = torch.zeros_like(like)
        self._later = torch.full_like(self._got, torch.nan)
        self._num_terms = num_terms

    def look(self, got: Tensor, wanted: Tensor) -> None:
        self._is_wrong = (got != wanted).any()
        self._got = torch.where(self._is_wrong, got, self._got)
        self._wanted = torch.where(self._is_wrong, wanted, self._wanted)

    def look_again(self, got: Tensor) -> None:
        self._later = torch.where(self._is_wrong, got, self._later)

    def told(self) -> str:
        """What stands there instead; nothing if nothing was wrong."""
        wrong = self._got != self._wanted
        if not wrong.any():
            return ""
        got, wanted, later = (each[wrong] for each in (self._got, self._wanted, self._later))
        ahead, is_there = got - wanted, torch.fmod(got - wanted, wanted / self._num_terms) != 0
        is_other = is_there & (torch.fmod(ahead, 100) == 0)
        kinds = {
            "not there": ~is_there,
            "of an earlier epoch": is_other & (ahead < 0),
            "of a later epoch": is_other & (ahead > 0),
            "something else": is_there & ~is_other,
            "right a little later": later == wanted,
        }
        told = [f"{count} {kind}" for kind, each in kinds.items() if (count := each.sum().item())]
        told.append(f"of {wrong.numel()}, in rows {wrong.any(1).nonzero().flatten().tolist()}")
        return f"{', '.join(told)}: {got[:4].tolist()} instead of {wanted[:4].tolist()}"


def tell_apart(kind: str, found: dict[str | None, Tensor], before: Tensor) -> str:
    """Which transports' results are alike, and how the others differ."""
    told, (base, first) = [], next(iter(found.items()))
    for transport, out in found.items():
        like = next((other for other, earlier in found.items() if torch.equal(earlier, out)), transport)
        if like == transport:
            apart = out != first
            where = apart.flatten(1).any(1).nonzero().flatten().tolist()
            same = (out == before)[apart].sum().item()
            told.append(
                f"{transport} has {apart.sum().item()} other values of {kind} than {base}, in rows {where}, "
                f"{same} of them as before"
            )
        else:
            told.append(f"{transport} is like {like}")
    return "; ".join(told)
