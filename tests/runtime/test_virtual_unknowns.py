"""Values that follow from numbers nobody computed: decided by a rule, and on record with the line that needed them."""

import linecache

import pytest
import torch
import torch.nn.functional as F

from runtime.virtual import Decision, virtual_gpus
from runtime.virtual.unknowns import model_line

DEVICE = "vgpu:0"
GIB = 2**30


@pytest.fixture(autouse=True)
def gpus():
    return virtual_gpus([GIB] * 2, shape_only=True)


def unknown(*shape):
    return torch.empty(shape, device="meta").to(DEVICE)


DECIDED = {
    "equals": (lambda x: x == 0, [False] * 4, "eq", "equals no other: False"),
    "differs": (lambda x: x != 0, [True] * 4, "ne", "equals no other: True"),
    "less": (lambda x: x < x + 1, [False] * 4, "lt", "is not less than another: False"),
    "more": (lambda x: x.gt_(1).bool(), [True] * 4, "_to_copy", "not zero: True"),
    "equals itself": (lambda x: x == x, [True] * 4, "eq", "a number equals itself"),
    "differs from itself": (lambda x: x != x, [False] * 4, "ne", "a number equals itself"),
    "is not a number": (lambda x: x.isnan(), [False] * 4, "isnan", "is finite: False"),
    "is something": (lambda x: x.any(), True, "any", "not zero: True"),
    "not": (lambda x: ~x.bool(), [False] * 4, "_to_copy", "not zero: True"),
    "argmax": (lambda x: x.argmax(), 0, "argmax", "picked: 0"),
    "argmin of columns": (lambda x: x.view(2, 2).argmin(0), [0, 0], "argmin", "picked: 0"),
    "max with index": (lambda x: x.max(0).indices, 0, "max", "picked: 0"),
    "sample": (lambda x: x.multinomial(2), [0, 0], "multinomial", "picked: 0"),
    "cast to integers": (lambda x: x.long(), [0] * 4, "_to_copy", "integer 0"),
    "cast elsewhere": (lambda x: x.to("vgpu:1", torch.int32), [0] * 4, "_to_copy", "integer 0"),
    "cast on the host": (lambda x: x.to("cpu", torch.int32), [0] * 4, "_to_copy", "integer 0"),
    "bucket": (lambda x: torch.bucketize(x, x), [0] * 4, "bucketize", "integer 0"),
    "bits": (lambda x: x.view(torch.int32) + 1, [0] * 4, "add", "integer 0"),
    "nonzero": (lambda x: x.nonzero(), [[0], [1], [2], [3]], "nonzero", "not zero"),
    "out": (
        lambda x: torch.gt(x, 0, out=torch.ones(4, dtype=torch.bool, device=DEVICE)),
        [False] * 4,
        "gt",
        "is not more than another: False",
    ),
    "empty out": (
        lambda x: torch.argmax(x, 0, out=torch.empty(0, dtype=torch.long, device=DEVICE)),
        0,
        "argmax",
        "picked: 0",
    ),
    "read": (lambda x: x, [0.0] * 4, "_to_copy", "read on the host as 0.0"),
}


@pytest.mark.parametrize(("call", "value", "op", "rule"), DECIDED.values(), ids=DECIDED)
def test_value_is_decided_by_a_rule_on_record(call, value, op, rule, gpus):
    assert call(unknown(4)).tolist() == value
    assert any(decision.op == op and rule in decision.rule for decision in gpus.decisions)


HOST = {
    "item": (lambda x: x[0].item(), 0.0),
    "truth": (lambda x: bool(x[0]), False),
    "integer": (lambda x: int(x.sum()), 0),
    "finite": (lambda x: torch.isfinite(x).all().item(), True),
    "any nan": (lambda x: x.isnan().any().item(), False),
    "equal": (lambda x: torch.equal(x, x + 1), False),
    "equal to itself": (lambda x: torch.equal(x, x), True),
    "contains": (lambda x: 3.0 in x, False),
    "all close": (lambda x: torch.allclose(x, x + 1), False),
    "numpy": (lambda x: x.cpu().numpy().tolist(), [0.0] * 4),
    "printed": (lambda x: str(x), "tensor([0.0000, 0.0000, 0.0000, 0.0000], device='vgpu:0')"),
}


@pytest.mark.parametrize(("call", "value"), HOST.values(), ids=HOST)
def test_host_reads_a_value_on_record(call, value, gpus):
    assert call(unknown(4)) == value
    assert gpus.decisions


ROWS, EXPERTS, CHOSEN = 6, 4, 2


def test_router_spreads_rows_evenly_over_experts(gpus):
    _, experts = unknown(ROWS, EXPERTS).topk(CHOSEN)
    assert experts.tolist() == [[0, 1], [2, 3]] * 3
    assert F.one_hot(experts, EXPERTS).sum((0, 1)).tolist() == [ROWS * CHOSEN // EXPERTS] * EXPERTS
    assert [decision.rule for decision in gpus.decisions] == [
        "unknown numbers rank in turn: row r, slot k -> (r * K + k) % n"
    ]


RANKED = {
    "topk of columns": (lambda x: x.topk(2, dim=0).indices, [[0, 2, 4, 0], [1, 3, 5, 1]]),
    "sort": (lambda x: x.sort().indices, [[0, 1, 2, 3]] * ROWS),
    "sort of columns": (lambda x: x.sort(stable=True, dim=0).indices.t(), [[0, 1, 2, 3, 4, 5]] * 4),
    "argsort": (lambda x: x.argsort(descending=True), [[0, 1, 2, 3]] * ROWS),
    "one number": (lambda x: x.sum().topk(1).indices, [0]),
    "no rows": (lambda x: x[:0].topk(2).indices, []),
}


@pytest.mark.parametrize(("rank", "order"), RANKED.values(), ids=RANKED)
def test_ranks_are_distinct_in_every_row(rank, order):
    assert rank(unknown(ROWS, EXPERTS)).flatten().tolist() == torch.tensor(order).flatten().tolist()


def test_grouped_routing_goes_through(gpus):
    """As in DeepSeek-V3, GLM-4.5V and Kimi: groups are ranked first, and the other groups' experts masked out."""
    scores = unknown(ROWS, 8)
    groups = scores.view(ROWS, 4, 2).topk(2).values.sum(-1).topk(2).indices
    mask = torch.zeros_like(scores.view(ROWS, 4, 2)[..., 0]).scatter_(1, groups, 1).bool()
    masked = scores.masked_fill(~mask.unsqueeze(-1).expand(ROWS, 4, 2).reshape(ROWS, 8), 0.0)
    assert masked.topk(2).indices.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]] + [[0, 1], [2, 3]]
    assert mask.sum(-1).tolist() == [2] * ROWS
    assert {decision.op for decision in gpus.decisions} >= {"topk"}


def test_decision_names_operation_shape_rule_and_line(gpus):
    scores = unknown(3, 5)
    for _ in range(4):
        (scores > 0).any()
    [(decision, count)] = gpus.decisions.items()
    assert count == 4
    assert (decision.op, decision.shape) == ("gt", (3, 5))
    file, _, rest = decision.place.partition(":")
    line, _, function = rest.partition(" in ")
    assert (file.rpartition("/")[2], function) == (
        "test_virtual_unknowns.py",
        "test_decision_names_operation_shape_rule_and_line",
    )
    assert linecache.getline(__file__, int(line)).strip() == "(scores > 0).any()"
    assert str(decision) == f"gt [3, 5]: {decision.rule} ({decision.place})"


def test_line_of_torch_or_accelerate_is_never_the_place(gpus):
    layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True, device="meta").to(DEVICE).eval()
    with torch.no_grad():
        layer(unknown(1, 3, 8), src_key_padding_mask=unknown(1, 3) > 0)
    assert all("test_virtual_unknowns.py" in decision.place for decision in gpus.decisions)
    assert "test_virtual_unknowns.py" in model_line()


def test_new_devices_start_a_new_record(gpus):
    unknown(2).argmax()
    assert len(gpus.decisions) == 1
    assert virtual_gpus([GIB], shape_only=True).decisions == {}
    assert len(gpus.decisions) == 1


def test_real_valued_devices_decide_nothing():
    gpus = virtual_gpus([GIB])
    assert torch.tensor([1.0, 3.0], device=DEVICE).argmax().item() == 1
    assert gpus.decisions == {}
    assert not gpus.is_shape_only


def test_equal_decisions_are_one():
    first, second = (Decision(op="gt", shape=(2,), rule="r", place="p") for _ in range(2))
    assert {first: 1} == {second: 1}
