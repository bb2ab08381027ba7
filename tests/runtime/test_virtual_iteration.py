"""Layouts of pointwise results, foretold from the operands' layouts alone, on thousands of random operands."""

import random

import pytest
import torch

from runtime.virtual.iteration import iterated, preserved

NUM_CASES = 1500
SIZES = (1, 1, 2, 3, 4)


def laid_out(rng, shape):
    """A tensor of this shape with its dimensions in any order in memory, some of them with gaps."""
    order = rng.sample(range(len(shape)), len(shape))
    gaps = [rng.choice((1, 1, 1, 2)) for _ in shape]
    base = torch.zeros([shape[dim] * gap for dim, gap in zip(order, gaps, strict=True)])
    for position, gap in enumerate(gaps):
        base = base.unflatten(position, (-1, gap)).select(position + 1, 0)
    return base.permute([order.index(dim) for dim in range(len(shape))])


def broadcast(rng, shape):
    """A tensor that broadcasts to this shape, at times by being expanded to it."""
    own = [1 if rng.random() < 0.15 else size for size in shape]
    tensor = laid_out(rng, own[rng.randint(0, len(own)) if rng.random() < 0.2 else 0 :])
    return tensor.expand(shape) if rng.random() < 0.15 else tensor


def as_meta(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


POINTWISE = {
    "one operand": (1, torch.neg, False),
    "one operand and a number": (1, lambda x: x * 2.5, True),
    "two operands": (2, torch.mul, False),
    "three operands": (3, lambda x, y, z: torch.where(x > 0, y, z), False),
}


@pytest.mark.parametrize(("num_operands", "compute", "has_number"), POINTWISE.values(), ids=POINTWISE)
def test_layout_is_that_of_the_computed_result(num_operands, compute, has_number):
    rng = random.Random(num_operands)
    for _ in range(NUM_CASES):
        shape = [rng.choice(SIZES) for _ in range(rng.randint(0, 5))]
        operands = [broadcast(rng, shape) for _ in range(num_operands)]
        if num_operands == 3:
            # The comparison inside is a pointwise operation of its own, with a layout of its own.
            operands[0] = operands[0].contiguous()
        computed = compute(*operands)
        foretold = iterated(as_meta(computed), [as_meta(operand) for operand in operands], has_number=has_number)
        assert foretold.stride() == computed.stride(), [(tuple(o.shape), o.stride()) for o in operands]


def test_copy_keeps_a_dense_layout_and_closes_gaps():
    rng = random.Random(0)
    for _ in range(NUM_CASES):
        tensor = broadcast(rng, [rng.choice(SIZES) for _ in range(rng.randint(0, 5))])
        assert preserved(as_meta(tensor)).stride() == torch.empty_like(tensor).stride(), tensor.stride()


@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (2, 1, 3, 3), (1, 8, 1, 1)], ids=str)
def test_channels_last_stays_so(shape):
    image = torch.zeros(shape).to(memory_format=torch.channels_last)
    foretold = iterated(as_meta(image * image), [as_meta(image)] * 2, has_number=False)
    assert foretold.stride() == (image * image).stride()
