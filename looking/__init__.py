"""Where a model looks when it gives an answer: maps over the picture."""

from looking.explain import METHODS, Map, explain

__all__ = ["METHODS", "Map", "explain"]
