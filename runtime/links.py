"""How a tensor gets from one device to another: directly where a copy over that link was checked, else by the host.

Drivers grant peer access over links that then deliver other bytes than were sent (PCIe switches with ACS, some consumer
cards). So the first copy between two GPUs is a test pattern, read back and compared on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Literal

import torch

Copy = Callable[[torch.Tensor, torch.device], torch.Tensor]
Route = Literal["direct", "by host"]

PATTERN_NUMEL = (1, 4097, 2**20 + 3)
"""64-bit words of the test copies: one, one page and a bit, and 8 MiB; corruption has shown in long copies only."""
NUM_ROUNDS = 3


def direct_copy(tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for, unless it goes there: it could be read before it has arrived."""
    return tensor.to(target, non_blocking=target.type != "cpu")


def copy_by_host(tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
    """A copy through host memory, pinned where that speeds it up; the host waits for its first half."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    host.copy_(tensor)
    return host.to(target, non_blocking=True)


def delivers(source: torch.device, target: torch.device, copy: Copy) -> bool:
    """Whether `copy` brings test patterns from `source` to `target` unchanged, every time."""
    generator = torch.Generator().manual_seed(0)
    for numel in PATTERN_NUMEL * NUM_ROUNDS:
        pattern = torch.randint(-(2**62), 2**62, (numel,), generator=generator)
        if not torch.equal(copy(pattern.to(source), target).cpu(), pattern):
            return False
    return True


class Links:
    """Sends tensors between devices; links between devices of `checked_types` are trusted only after a test.

    `routes` is what was found of the links used so far.
    """

    def __init__(self, direct: Copy = direct_copy, checked_types: Collection[str] = ("cuda",)) -> None:
        self._direct = direct
        self._checked_types = frozenset(checked_types)
        self._routes: dict[tuple[torch.device, torch.device], Route] = {}

    @property
    def routes(self) -> Mapping[tuple[torch.device, torch.device], Route]:
        """The route of every link that was tested, by source and target."""
        return dict(self._routes)

    def send(self, tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
        """`tensor` on `target`; itself when it is there."""
        source = tensor.device
        if source == target:
            return tensor
        if not {source.type, target.type} <= self._checked_types:
            return self._direct(tensor, target)
        route = self._routes.get((source, target))
        if route is None:
            route = self._routes[source, target] = "direct" if delivers(source, target, self._direct) else "by host"
        return self._direct(tensor, target) if route == "direct" else copy_by_host(tensor, target)
