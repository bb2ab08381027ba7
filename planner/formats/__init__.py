"""Plans for other engines: their own command lines and environments, or the reason why a plan cannot be said there."""

from planner.formats.engines import ENGINES, engine_text

__all__ = ["ENGINES", "engine_text"]
