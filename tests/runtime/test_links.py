"""Links: a copy that delivers other bytes than were sent is found out, and gone around by way of the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from runtime.links import Links, copy_by_host, delivers, direct_copy
from runtime.virtual import virtual_gpus


@pytest.fixture
def gpus() -> Iterator[tuple[torch.device, ...]]:
    yield virtual_gpus([2**30] * 3).devices


class BadLink:
    """Direct copies that are wrong between two devices, in copies of more than `from_bytes`."""

    def __init__(self, source: torch.device, target: torch.device, from_bytes: int = 0) -> None:
        self.pair, self.from_bytes, self.num_copies = (source, target), from_bytes, 0

    def __call__(self, tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
        self.num_copies += 1
        copy = direct_copy(tensor, target)
        if (tensor.device, target) == self.pair and tensor.nbytes > self.from_bytes:
            return copy.zero_()
        return copy


def test_a_good_link_is_used_directly_and_tested_once(gpus: tuple[torch.device, ...]) -> None:
    direct = BadLink(gpus[2], gpus[0])
    links = Links(direct, checked_types=("vgpu",))
    tensor = torch.arange(8, device=gpus[0])
    assert links.send(tensor, gpus[1]).tolist() == list(range(8))
    after_test = direct.num_copies
    assert links.send(tensor, gpus[1]).device == gpus[1]
    assert direct.num_copies == after_test + 1
    assert links.routes == {(gpus[0], gpus[1]): "direct"}


@pytest.mark.parametrize("from_bytes", [0, 2**20], ids=["every copy", "long copies only"])
def test_a_link_that_corrupts_is_gone_around(gpus: tuple[torch.device, ...], from_bytes: int) -> None:
    links = Links(BadLink(gpus[0], gpus[1], from_bytes), checked_types=("vgpu",))
    tensor = torch.randn(2**19, device=gpus[0])
    assert torch.equal(links.send(tensor, gpus[1]).cpu(), tensor.cpu())
    assert torch.equal(links.send(tensor, gpus[2]).cpu(), tensor.cpu())
    assert links.routes == {(gpus[0], gpus[1]): "by host", (gpus[0], gpus[2]): "direct"}


def test_a_link_is_tested_one_way_at_a_time(gpus: tuple[torch.device, ...]) -> None:
    bad = BadLink(gpus[0], gpus[1])
    assert not delivers(gpus[0], gpus[1], bad)
    assert delivers(gpus[1], gpus[0], bad)


def test_copies_to_and_from_the_host_are_not_tested(gpus: tuple[torch.device, ...]) -> None:
    links = Links(checked_types=("vgpu",))
    assert links.send(torch.ones(2), gpus[1]).device == gpus[1]
    assert links.send(torch.ones(2, device=gpus[1]), torch.device("cpu")).device.type == "cpu"
    assert links.routes == {}


def test_what_is_there_is_not_copied(gpus: tuple[torch.device, ...]) -> None:
    tensor = torch.ones(2, device=gpus[1])
    assert Links().send(tensor, gpus[1]) is tensor


def test_the_way_by_the_host_keeps_type_shape_and_values(gpus: tuple[torch.device, ...]) -> None:
    tensor = torch.randn(3, 5, dtype=torch.bfloat16, device=gpus[0]).t()
    copy = copy_by_host(tensor, gpus[2])
    assert (copy.device, copy.dtype, copy.shape) == (gpus[2], torch.bfloat16, (5, 3))
    assert torch.equal(copy.cpu(), tensor.cpu())
