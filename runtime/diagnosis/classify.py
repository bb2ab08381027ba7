"""Says of a mismatch which class of hazard it is, and what to do, from who made its operands and where it stands.

Names of modules decide the label only: that it fails has been seen, whatever it is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from planner.diagnosis.diagnosis import Finding, Hazard
from planner.paths import contains
from runtime.atoms import find_atoms
from runtime.diagnosis.cuda_literals import MADE_BY_LITERAL
from runtime.diagnosis.map_run import ROOT
from runtime.mismatch import Mismatch

_VISION = re.compile(
    r"(^|[._])(vision|visual|vit|image|img|pixel|patch|qformer|q_former|projector|proj_vision|mm_projector|connector|"
    r"multi_modal|mlp1|resampler|perceiver|tower|aligner|merger|encoder_vision)",
    re.IGNORECASE,
)
_POSITIONS = re.compile(r"rotary|rope|inv_freq|position|pos_emb|pos_ids|relative_attention_bias", re.IGNORECASE)
_MERGES = frozenset({"cat", "stack", "masked_scatter", "index_put", "scatter"})
_PLAIN_MERGES = _MERGES - {"index_put"}
"""Those that models put features into the prompt with; deepstack features are added to hidden states by index."""

_MASKED = frozenset({"masked_fill", "where", "bitwise_and", "logical_and", "eq", "ne"})

FIXES: dict[Hazard, str] = {
    "merge": "Put what makes the two operands on one device: projector and token embedding.",
    "nosplit": "Keep the block whole: its parts meet in a residual.",
    "bareparam": "Put the tensor beside what reads it, and what reads it beside the tensor.",
    "tied": "Put both names of the weight on one device.",
    "rope": "Put the table on the device of the layers that read it.",
    "kvcache": "Let each layer's cache be on the layer's device; give its module one entry.",
    "crosslayer": "Keep the module that makes the tensor with all that read it outside a module's call.",
    "genio": "Put the token embedding and the head where inputs and results are.",
    "hardcuda": "No map mends this: make the tensor on the device of what it meets (device=x.device).",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Where in a model things are: elements of module lists, the token embedding, the head, and ties."""

    blocks: tuple[str, ...]
    embedding: str
    head: str
    tied: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Roles:
        """The roles of a model's modules; empty names where it does not tell."""
        names = {id(module): name for name, module in model.named_modules()}
        several: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            several.setdefault(id(parameter), []).append(name)
        return cls(
            blocks=tuple(atom.name for atom in find_atoms(model) if atom.module_list is not None),
            embedding=names.get(id(_given(model, "get_input_embeddings")), ""),
            head=names.get(id(_given(model, "get_output_embeddings")), ""),
            tied=frozenset(name for group in several.values() if len(group) > 1 for name in group),
        )

    def block_of(self, module: str) -> str:
        """The element of a module list that `module` is or lies in, or nothing."""
        return next((block for block in self.blocks if contains(block, module)), "")

    def is_vision(self, module: str) -> bool:
        """Whether a name speaks of images."""
        return bool(_VISION.search(module))


def hazard_of(mismatch: Mismatch, roles: Roles) -> Hazard:
    """The class that a mismatch belongs to."""
    named = [name for name in mismatch.tensors if name]
    if MADE_BY_LITERAL in mismatch.modules:
        return "hardcuda"
    if any(_POSITIONS.search(name) for name in named) or _reads_host_table(mismatch):
        return "rope"
    if mismatch.kind == "host":
        return "hardcuda"
    if "cache" in mismatch.file.rpartition("/")[2] or "cache" in mismatch.place.function:
        return "kvcache"
    if any(name in roles.tied for name in named):
        return "tied"
    if any(_is_read_raw(name, mismatch.within) for name in named):
        return "bareparam"
    if "transformers/generation/" in mismatch.file or mismatch.within == ROOT and _meets_inputs(mismatch, roles):
        return "genio"
    return _by_makers(mismatch, roles)


def mismatch_findings(mismatches: Iterable[Mismatch], roles: Roles) -> Iterator[Finding]:
    """One finding per line of code and class, with every operation there as evidence."""
    causes: dict[tuple[Hazard, str], list[Mismatch]] = {}
    for mismatch in mismatches:
        causes.setdefault((hazard_of(mismatch, roles), str(mismatch.place)), []).append(mismatch)
    for (hazard, place), same in causes.items():
        first = same[0]
        devices = " and ".join(dict.fromkeys(map(shown_device, first.devices)))
        yield Finding(
            severity="will fail",
            hazard=hazard,
            title=f"{plain_name(first.op)}: operands on {devices}",
            evidence=tuple(_operands(mismatch) for mismatch in same),
            fix=FIXES[hazard],
            place=place,
            modules=tuple(dict.fromkeys(name for m in same for name in involved(m))),
        )


def involved(mismatch: Mismatch) -> tuple[str, ...]:
    """The modules and tensors that a mismatch names, the one whose code ran first."""
    named = [
        tensor or module for tensor, module in zip(mismatch.tensors or mismatch.modules, mismatch.modules, strict=True)
    ]
    real = [name for name in (mismatch.within, *named) if name not in (ROOT, "the inputs", "the host", MADE_BY_LITERAL)]
    return tuple(dict.fromkeys(name for name in real if name))


def plain_name(op: str) -> str:
    """What a user calls an operation: `index_put` for `_index_put_impl_`."""
    return op.strip("_").removesuffix("_impl")


def shown_device(device: str) -> str:
    """A virtual GPU by the name of the real one it stands for."""
    return device.replace("vgpu", "cuda")


def _operands(mismatch: Mismatch) -> str:
    names = zip(
        mismatch.operands, mismatch.tensors or mismatch.modules, mismatch.modules, mismatch.devices, strict=True
    )
    met = ", ".join(
        f"{argument} of {tensor or module} on {shown_device(device)}" for argument, tensor, module, device in names
    )
    return f"{mismatch.phase}, in {mismatch.within or ROOT}: {met}"


def _reads_host_table(mismatch: Mismatch) -> bool:
    """Whether a module of positions met what came from the host: its own table, of which a copy bears no name."""
    return "the host" in mismatch.modules and bool(_POSITIONS.search(mismatch.within.rpartition(".")[2]))


def _by_makers(mismatch: Mismatch, roles: Roles) -> Hazard:
    """Two results of modules met: which paths they came on says the rest."""
    makers = [maker for maker in mismatch.modules if maker not in (ROOT, "the inputs")]
    op = plain_name(mismatch.op)
    if _is_inside_one(mismatch, roles):
        return "nosplit"
    seeing = [maker for maker in makers if roles.is_vision(maker)]
    others = [maker for maker in makers if maker not in seeing]
    if seeing and any(roles.block_of(maker) for maker in others) and op not in _PLAIN_MERGES:
        return "crosslayer"
    if seeing and (others or op in _MERGES) and not roles.is_vision(mismatch.within):
        return "merge"
    if op in _MASKED or "mask" in mismatch.place.function or "the inputs" in mismatch.modules:
        return "genio"
    if _is_between_layers(mismatch, roles):
        return "crosslayer"
    return "merge" if op in _MERGES or _is_across(mismatch, makers) else "nosplit"


def _is_between_layers(mismatch: Mismatch, roles: Roles) -> bool:
    """Whether a layer's code reads what another made, or the code around layers adds something to what one made."""
    block = roles.block_of(mismatch.within)
    if block:
        return any(roles.block_of(maker) != block for maker in mismatch.modules)
    return mismatch.within in mismatch.modules and any(roles.block_of(maker) for maker in mismatch.modules)


def _is_across(mismatch: Mismatch, makers: Sequence[str]) -> bool:
    """Whether the operands come from different children of the module whose code runs, and those are containers."""
    depth = 0 if mismatch.within == ROOT else mismatch.within.count(".") + 1
    children = {".".join(maker.split(".")[: depth + 1]) for maker in makers if maker != mismatch.within}
    return len(children) > 1 and any(maker not in children for maker in makers)


def _is_inside_one(mismatch: Mismatch, roles: Roles) -> bool:
    """Whether an operand was made by a part of the very block whose code runs: a residual, a gate, a product."""
    block = roles.block_of(mismatch.within)
    return bool(block) and any(contains(block, m) and m != mismatch.within for m in mismatch.modules)


def _is_read_raw(tensor: str, within: str) -> bool:
    """Whether code of another module than the tensor's own leaf reads it, or a container reads its bare tensor."""
    parent = tensor.rpartition(".")[0]
    return parent != within or tensor.rpartition(".")[2] not in ("weight", "bias")


def _meets_inputs(mismatch: Mismatch, roles: Roles) -> bool:
    return any(maker == "the inputs" or roles.head and contains(roles.head, maker) for maker in mismatch.modules)


def _given(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter, lambda: None)()
    except (NotImplementedError, AttributeError):  # transformers' answers where a class has no single such module
        return None
    return found if isinstance(found, nn.Module) else None
