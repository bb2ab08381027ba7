"""What is installed of what traces and proofs are made with; asking imports none of it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

MADE_WITH = ("torch", "transformers", "accelerate")


def installed_versions(*more: str) -> str:
    """Names and versions, such as `torch 2.13.0, transformers 5.23.0, accelerate 1.15.0`, after those of `more`."""
    return ", ".join(f"{name} {_version(name)}" for name in (*more, *MADE_WITH))


def _version(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "missing"
