"""Checks whose absence changes nothing that shows, and why; a run takes them for accounted for."""

EQUIVALENT: dict[tuple[str, str, str], str] = {}
"""The reason, by module, the line's code and what was done."""
