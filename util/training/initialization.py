"""Initial weights of a MAR whose tokens attend to their neighbours.

A transformer with random weights spends much of a short training on learning which positions are close. "Mimetic
initialization" (Trockman and Kolter, arXiv 2305.09828), here on a grid of tokens, gives it that knowledge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.mar import MAR, Attention

SHORTEST, LONGEST = 2.0, 32.0  # wavelengths of the position embeddings, in tokens
QUERY_KEY_SCALE = 1.2  # a larger scale makes a row attend to fewer and closer rows
OUTPUT_SCALE = 0.4  # scale of what attention adds to a row


@torch.no_grad()
def initialize_with_neighbours(model: MAR) -> None:
    """Set the position embeddings and attention weights in place, with PyTorch's global generator."""
    for embedding in (model.encoder_pos_embed_learned, model.decoder_pos_embed_learned):
        embedding[0, model.buffer_size :] = grid_sinusoids(model.grid_size, embedding.shape[-1])
    for block in [*model.encoder_blocks, *model.decoder_blocks]:
        _attend_to_similar_rows(block.attn)


def grid_sinusoids(size: int, width: int) -> Tensor:
    """Compute sines and cosines of row and column with geometric wavelengths: [size * size, width], row-major."""
    count = width // 4
    wavelengths = SHORTEST * (LONGEST / SHORTEST) ** (torch.arange(count) / max(1, count - 1))
    angles = 2 * math.pi * torch.arange(size)[:, None] / wavelengths
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [size, width / 2]
    grid = torch.cat([line[:, None].expand(-1, size, -1), line.expand(size, -1, -1)], dim=2).flatten(0, 1)
    return nn.functional.pad(grid, (0, width - grid.shape[1]))  # if the width is no multiple of 4


def _attend_to_similar_rows(attention: Attention) -> None:
    """Make queries and keys the same random projection of a row, and values a rotation that the output reverts."""
    dim = attention.proj.in_features
    queries, keys, values = attention.qkv.weight.chunk(3)
    for query, key in zip(queries.chunk(attention.num_heads), keys.chunk(attention.num_heads), strict=True):
        projection = QUERY_KEY_SCALE * nn.init.orthogonal_(torch.empty(query.shape))
        for part in (query, key):
            part.copy_(projection + 0.02 * torch.randn(part.shape))
    rotation = nn.init.orthogonal_(torch.empty(dim, dim))
    values.copy_(rotation)
    attention.proj.weight.copy_(OUTPUT_SCALE * rotation.T)
