"""Pellucid: RLHF that can be seen through."""

__version__ = "0.1.0"
