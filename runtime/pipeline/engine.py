"""The loop that every stage runs: groups of requests in a fixed number of slots, one step of each in turn.

All stages take the same turns in the same order, and learn from the token ids alone when a group is finished and the
next one takes its slot. The first stage says who that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from runtime.pipeline.clock import Clock
from runtime.pipeline.generation import Group
from runtime.pipeline.stage import StageModel
from runtime.pipeline.transport import Transport, without_values
from runtime.relocate import relocate


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests that go together: their numbers, a forward's inputs for all of them, and each one's seed."""

    indexes: tuple[int, ...]
    inputs: Mapping[str, Any]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The new token ids of a batch's requests, padded after their ends."""

    batch: Batch
    answers: Sequence[Sequence[int]]


@dataclass(slots=True)
class _Slot:
    """A group on its way, the ids it was given last on the last stage, and what had been sent by its last step."""

    batch: Batch
    group: Group
    number: int
    ids: torch.Tensor | None = None
    num_sent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What all stages are told before they begin: the options of `generate`, and how many groups are in flight."""

    options: Mapping[str, Any]
    num_slots: int


@dataclass(slots=True, kw_only=True)
class Engine:
    """One stage's loop. `inputs_needed` has, by stage, the floating inputs whose values it needs.

    `doing` is told what is worked on, for whoever has to say what went wrong.
    """

    model: StageModel
    transport: Transport
    clock: Clock
    inputs_needed: Sequence[frozenset[str]]
    doing: Callable[[str], object]
    _num_groups: int = 0

    def lead(self, order: Order, batches: Iterator[Batch]) -> Iterator[Finished]:
        """Run batches through all stages, from the first; each comes out when it is finished."""
        for target in range(1, len(self.transport.ranks)):
            self.transport.send_object(target, order)
        yield from self._turns(order, batches)

    def follow(self) -> None:
        """Do this stage's part of what the first one leads."""
        order: Order = self.transport.receive_object(0)
        for _ in self._turns(order, iter(())):
            pass

    def _turns(self, order: Order, batches: Iterator[Batch]) -> Iterator[Finished]:
        slots: list[_Slot | None | Literal["closed"]] = [None] * order.num_slots
        while any(slot != "closed" for slot in slots):
            for place, slot in enumerate(slots):
                if isinstance(slot, _Slot) and self._is_over(slot):
                    yield Finished(batch=slot.batch, answers=slot.group.answers)
                    slot = None
                if slot is None:
                    slot = self._next(batches, order.options) or "closed"
                if isinstance(slot, _Slot):
                    self._step(slot)
                slots[place] = slot
        self.transport.settle(self.transport.num_sent)

    @property
    def _is_first(self) -> bool:
        return self.transport.stage == 0

    @property
    def _is_last(self) -> bool:
        return self.transport.stage == len(self.transport.ranks) - 1

    def _is_over(self, slot: _Slot) -> bool:
        ids = slot.ids if self._is_last else self.transport.receive_ids(slot.group.batch_size)
        assert ids is not None, "the last stage chose a token at the group's last step"
        slot.group.take(ids)
        return slot.group.is_finished

    def _next(self, batches: Iterator[Batch], options: Mapping[str, Any]) -> _Slot | None:
        """The group that takes a free slot; None when there is no more."""
        batch = self._told(next(batches, None)) if self._is_first else self.transport.receive_object(0)
        if batch is None:
            return None
        self._says("preparing the prompts", batch)
        group = Group(self.model, relocate(dict(batch.inputs), self._placed), options, batch.seeds)
        self._num_groups += 1
        return _Slot(batch=batch, group=group, number=self._num_groups - 1)

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input on this stage's device; of one that came without bytes nobody looks at the values."""
        device = self.transport.device
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor.to(device)

    def _says(self, what: str, batch: Batch) -> None:
        self.doing(f"{what} of requests {', '.join(map(str, batch.indexes))}")

    def _told(self, batch: Batch | None) -> Batch | None:
        """The batch, after every other stage has been sent what it needs of it."""
        for target in range(1, len(self.transport.ranks)):
            message = batch and Batch(
                indexes=batch.indexes,
                inputs=without_values(batch.inputs, self.inputs_needed[target]),
                seeds=batch.seeds,
            )
            self.transport.send_object(target, message)
        return batch

    def _step(self, slot: _Slot) -> None:
        group, transport = slot.group, self.transport
        self._says(f"running token {group.num_steps}" if group.num_steps else "running the prompts", slot.batch)
        has_pictures = any(
            isinstance(value, torch.Tensor) and value.is_floating_point() for value in slot.batch.inputs.values()
        )
        with self.clock.task(slot.number, group.num_steps, has_pictures=has_pictures):
            outputs = group.step()
            if self._is_last:
                slot.ids = group.choose(outputs)
                transport.send_ids(slot.ids)
        # That this step's values have arrived shows that those of the step before have been used everywhere.
        transport.settle(slot.num_sent)
        slot.num_sent = transport.num_sent
