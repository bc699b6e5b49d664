"""Pruning: deciding which weights are zero, and making them so."""

__all__: list[str] = []
