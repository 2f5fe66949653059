"""Penstock: the batch layer for any LLM endpoint."""

__version__ = "0.1.0"
