"""Packed batches that the attention tests are made of."""

from __future__ import annotations

import torch

Segments = list[tuple[int, int, int, int]]


def grouped(groups: list[tuple[int, list[int]]]) -> Segments:
    """Segments of (prefix length, response lengths) groups, laid out one after another."""
    segments: Segments = []
    row = 0
    for prefix, responses in groups:
        start = row
        if prefix:
            segments.append((row, prefix, 0, 0))
            row += prefix
        for length in responses:
            segments.append((row, length, start if prefix else 0, prefix))
            row += length
    return segments


def heads(tokens: int, query_heads: int, kv_heads: int, width: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, count, width, generator=generator) for count in (query_heads, kv_heads, kv_heads)]
