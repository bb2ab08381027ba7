"""`plan-devices convert FOLDER OUT`: pickled weights into safetensors, shard by shard, running no code of theirs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from planner.cli import options
from planner.units import format_bytes


def run(argv: Sequence[str]) -> int:
    """Convert, saying on stderr what was written."""
    parser = options.Parser(
        prog="plan-devices convert",
        description="Turn a folder of pytorch_model*.bin into safetensors, in a new folder.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds pytorch_model*.bin")
    parser.add_argument("out", type=Path, metavar="OUT", help="is created; must not exist")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr")
    arguments = parser.parse_args(argv)

    from vlm.convert import ConvertedShard, convert_checkpoint

    def tell(shard: ConvertedShard) -> None:
        print(
            f"{shard.index}/{shard.num_shards} {shard.target}: "
            f"{len(shard.keys)} tensors, {format_bytes(shard.num_bytes)}",
            file=sys.stderr,
        )

    convert_checkpoint(arguments.folder, arguments.out, None if arguments.quiet else tell)
    return 0
