"""The masked autoregressive network (MAR, arXiv 2406.11838), with the parameter names of the official checkpoints.

Tokens come with their positions, in any order: attention sees order only through the position embeddings, so a caller
may keep the tokens in the order in which they are generated. The network knows nothing about sampling or caching;
what a sampler needs of a block (its queries, keys and values apart from its output) is public.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from models.diffloss import DiffusionHead


class Attention(nn.Module):
    """Multi-head attention. Projecting and attending are separate, so that a caller can cache keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the embedding width {dim} is not a multiple of the {num_heads} attention heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries [B, n, D] of rows [B, n, D], and their keys and values side by side [B, n, 2D]."""
        return self.split(self.qkv(x))

    def split(self, projections: Tensor) -> tuple[Tensor, Tensor]:
        """Split the output [B, n, 3D] of `qkv` as `project` returns it."""
        width = self.proj.in_features
        return projections[..., :width], projections[..., width:]

    def forward(self, queries: Tensor, keys_values: Tensor) -> Tensor:
        """Attend from `queries` [B, n, D] to the rows of `keys_values` [B, m, 2D]; return [B, n, D]."""
        keys, values = keys_values.chunk(2, dim=-1)
        q, k, v = (rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for rows in (queries, keys, values))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp: Any = Mlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU)

    def finish(self, x: Tensor, queries: Tensor, keys_values: Tensor) -> Tensor:
        """Return the block's output for rows `x` [B, n, D], which attend to `keys_values` [B, m, 2D]."""
        x = x + self.attn(queries, keys_values)
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, *self.attn.project(self.norm1(x)))


class MAR(nn.Module):
    """Masked autoregressive image model over continuous tokens.

    Args:
        img_size, vae_stride, patch_size: pixels per image side, per latent, and latents per token side.
        vae_embed_dim:                    latent channels C of the VAE.
        encoder_*, decoder_*, mlp_ratio:  the transformers' widths, depths, heads and MLP ratio.
        class_num:                        number of classes.
        buffer_size:                      class-embedding rows in front of the tokens (P).
        diffloss_d, diffloss_w:           blocks and width of the diffusion head.
        one_fake_token:                   one parameter [1, D] is both `fake_latent` and `mask_token`, as in eMIGM.

    L = (img_size / vae_stride / patch_size)^2 tokens of `token_dim` = C * patch_size^2 numbers each. `name` is that of
    the preset if `create_model` made the model.
    """

    def __init__(
        self,
        *,
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 1,
        vae_embed_dim: int = 16,
        encoder_embed_dim: int = 768,
        encoder_depth: int = 12,
        encoder_num_heads: int = 12,
        decoder_embed_dim: int = 768,
        decoder_depth: int = 12,
        decoder_num_heads: int = 12,
        mlp_ratio: float = 4.0,
        class_num: int = 1000,
        buffer_size: int = 64,
        diffloss_d: int = 6,
        diffloss_w: int = 1024,
        one_fake_token: bool = False,
    ) -> None:
        super().__init__()
        self.name = ""
        if img_size % (vae_stride * patch_size):
            raise ValueError(f"img_size {img_size} is not a multiple of vae_stride * patch_size")
        if min(encoder_depth, decoder_depth, diffloss_d, buffer_size, class_num) < 1:
            raise ValueError("encoder_depth, decoder_depth, diffloss_d, buffer_size and class_num must be at least 1")
        if one_fake_token and encoder_embed_dim != decoder_embed_dim:
            raise ValueError("one_fake_token needs an encoder and a decoder of the same width")
        self.img_size, self.patch_size, self.vae_embed_dim = img_size, patch_size, vae_embed_dim
        self.grid_size = img_size // vae_stride // patch_size
        self.seq_len = self.grid_size**2
        self.token_dim = vae_embed_dim * patch_size**2
        self.class_num, self.buffer_size = class_num, buffer_size

        self.class_emb = nn.Embedding(class_num, encoder_embed_dim)
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_embed_dim))  # stands for "no class"

        self.z_proj = nn.Linear(self.token_dim, encoder_embed_dim)
        self.z_proj_ln = nn.LayerNorm(encoder_embed_dim, eps=1e-6)
        rows = buffer_size + self.seq_len
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, rows, encoder_embed_dim))
        self.encoder_blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(encoder_embed_dim, encoder_num_heads, mlp_ratio) for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder_embed_dim, eps=1e-6)

        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.mask_token = self.fake_latent if one_fake_token else nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, rows, decoder_embed_dim))
        self.decoder_blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)

        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, decoder_embed_dim))
        head = DiffusionHead(self.token_dim, decoder_embed_dim, diffloss_w, diffloss_d)
        self.diffloss: Any = nn.ModuleDict({"net": head})  # the official checkpoints' names
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier for the transformers' linear layers, N(0, 0.02) for embeddings; the head sets its own."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("diffloss."):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embeddings = [self.class_emb.weight, self.fake_latent, self.mask_token, self.encoder_pos_embed_learned]
        for embedding in [*embeddings, self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned]:
            nn.init.normal_(embedding, std=0.02)

    # Latents and tokens

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to tokens [B, L, C * p * p], row-major over the grid, channels first in a token."""
        p = self.patch_size
        patches = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, h/p, p, w/p, p]
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """The inverse of `patchify`."""
        p, grid = self.patch_size, self.grid_size
        patches = tokens.unflatten(1, (grid, grid)).unflatten(3, (self.vae_embed_dim, p, p))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    # The parts of a step, in the order of use

    def encoder_input(self, class_embedding: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Buffer rows and the given tokens [B, n, token_dim] at `positions` [B, n]; returns [B, P + n, D]."""
        embedding = self.encoder_pos_embed_learned[0]
        buffer = class_embedding.unsqueeze(1) + embedding[: self.buffer_size]
        known = self.z_proj(tokens) + embedding[self.buffer_size + positions]
        return self.z_proj_ln(torch.cat([buffer, known], dim=1))

    def encode(self, class_embedding: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """The encoder's output [B, P + n, D] for the known tokens."""
        x = self.encoder_input(class_embedding, tokens, positions)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decoder_input(self, encoded: Tensor, positions: Tensor) -> Tensor:
        """The decoder's rows [B, P + n, D] of the buffer and of n encoded tokens at `positions` [B, n]."""
        embedding = self.decoder_pos_embed_learned[0]
        buffer, tokens = self.decoder_embed(encoded).split([self.buffer_size, positions.shape[1]], dim=1)
        return torch.cat(
            [buffer + embedding[: self.buffer_size], tokens + embedding[self.buffer_size + positions]], dim=1
        )

    def masked_input(self, positions: Tensor) -> Tensor:
        """The decoder's rows [..., D] of unknown tokens at `positions` [...]."""
        return self.mask_token.flatten() + self.decoder_pos_embed_learned[0, self.buffer_size + positions]

    def conditions(self, decoded: Tensor, positions: Tensor) -> Tensor:
        """Return the head's conditions [B, k, D], from the last block's output [B, k, D] at `positions` [B, k]."""
        return self.decoder_norm(decoded) + self.diffusion_pos_embed_learned[0, positions]

    def forward(self, class_embedding: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Conditions [B, L - n, D] of unknown tokens; in `positions` [B, L], those of the n known tokens come first."""
        num_known = tokens.shape[1]
        encoded = self.encode(class_embedding, tokens, positions[:, :num_known])
        known = self.decoder_input(encoded, positions[:, :num_known])
        x = torch.cat([known, self.masked_input(positions[:, num_known:])], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.conditions(x[:, self.buffer_size + num_known :], positions[:, num_known:])


def cast_model(model: MAR, dtype: torch.dtype) -> MAR:
    """Convert the model to `dtype` in place; under half precision the head's norms, first and last layer keep float32.

    First and last layer alone pass on tokens and predicted noise, whose errors the first denoising step multiplies by
    316; the norms may have to cancel a large bias, see `DiffusionHead.initialize_weights`.
    """
    head = model.diffloss.net
    sensitive = [head.input_proj, head.final_layer.linear, *(block.in_ln for block in head.res_blocks)]
    keep_float32 = dtype in (torch.float16, torch.bfloat16)
    kept = {id(parameter) for module in sensitive for parameter in module.parameters()} if keep_float32 else set()
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    return model
