"""`torch.vgpu`: what torch, transformers and accelerate ask of a device module, answered for virtual GPUs.

Random numbers come from the CPU's generator, so seeds are torch.manual_seed's business. Nothing is asynchronous.
"""

import torch

from runtime.virtual.process import PROCESS


def is_available() -> bool:
    """Whether this process has virtual GPUs now."""
    return PROCESS.ledger.num_devices > 0


def is_initialized() -> bool:
    """Always; there is nothing to start."""
    return True


def device_count() -> int:
    """How many virtual GPUs there are."""
    return PROCESS.ledger.num_devices


def current_device() -> int:
    """The device meant by `vgpu` without an index: always 0."""
    return 0


def synchronize(device: torch.device | str | int | None = None) -> None:
    """Wait for nothing: every operation has finished when it returns."""


def empty_cache() -> None:
    """Free nothing: there is no cache."""


def mem_get_info(device: torch.device | str | int | None = None) -> tuple[int, int]:
    """Free and total bytes of a device, as torch.cuda.mem_get_info."""
    index = _index(device)
    return PROCESS.ledger.free_bytes(index), PROCESS.ledger.capacity_bytes(index)


def memory_allocated(device: torch.device | str | int | None = None) -> int:
    """Bytes alive on a device."""
    return PROCESS.ledger.allocated_bytes(_index(device))


def max_memory_allocated(device: torch.device | str | int | None = None) -> int:
    """The most bytes alive at once on a device."""
    return PROCESS.ledger.peak_bytes(_index(device))


def reset_peak_memory_stats(device: torch.device | str | int | None = None) -> None:
    """Start every device's peak again; the ledger keeps them together."""
    PROCESS.ledger.reset_peak()


def manual_seed(seed: int) -> None:
    """Nothing: the CPU's generator, which torch.manual_seed has just seeded, serves these devices."""


def manual_seed_all(seed: int) -> None:
    """Nothing, as `manual_seed`."""


def _is_in_bad_fork() -> bool:
    return False


def get_amp_supported_dtype() -> list[torch.dtype]:
    """What torch.autocast needs to be entered at all, were it only to be switched off."""
    return [torch.bfloat16, torch.float16]


def get_rng_state(device: torch.device | str | int = "vgpu") -> torch.Tensor:
    """The state of the generator that serves every virtual GPU: the CPU's."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: torch.device | str | int = "vgpu") -> None:
    """Set the CPU's generator, which serves every virtual GPU."""
    torch.set_rng_state(state)


def _index(device: torch.device | str | int | None) -> int:
    if device is None:
        return 0
    named = torch.device("vgpu", device) if isinstance(device, int) else torch.device(device)
    return PROCESS.checked_index(named)
