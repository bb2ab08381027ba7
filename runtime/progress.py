"""What is shown while weights are read: a bar in bytes on a terminal, and nowhere else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from transformers.utils import logging as transformers_logging


def quieten_libraries() -> None:
    """Keep back what transformers, accelerate and the hub say about choices that a user of ours did not make."""
    transformers_logging.set_verbosity(logging.ERROR)
    for name in ("accelerate", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def byte_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields the function that moves it, callable from any thread. No terminal, no bar."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    shown = sys.stderr is not None and console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(what, total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)
