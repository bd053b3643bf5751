"""The diffusion head: an MLP that predicts noise for one token, given the transformer's condition for it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.linear import Linear

NUM_FREQUENCIES, MAX_PERIOD = 128, 10000  # of the timesteps' sinusoids
BIAS_OVER_SIGNAL = 10.0  # in a new head's first layer, see DiffusionHead.initialize_weights


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(x + shift, x, scale)


def timestep_sinusoids(timesteps: Tensor) -> Tensor:
    """Cosines, then sines, of the original timesteps [N] (0..999) at 128 frequencies: [N, 256] float32.

    Correctly rounded: angles are float32 products, as the weights were trained with, and their cosines and sines are
    computed in float64 and rounded once. PyTorch's float32 functions would give values that differ from processor to
    processor, and the first of 100 denoising steps multiplies such a difference by 316.

    Timesteps that are real numbers (float64) make float64 sinusoids of float64 angles.
    """
    exponents = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=timesteps.device)
    exponents = -math.log(MAX_PERIOD) * exponents / NUM_FREQUENCIES
    frequencies = exponents.double().exp().float()
    dtype = torch.float64 if timesteps.is_floating_point() else torch.float32
    angles = (timesteps[:, None].to(dtype) * frequencies).double()
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the original timestep (0..999) through a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp: Any = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embeddings [N, width] of `timesteps` [N], on the weights' device."""
        return self.mlp(timestep_sinusoids(timesteps).to(self.mlp[0].weight))


class ResidualBlock(nn.Module):
    """x + gate * mlp(modulated norm of x), with shift, scale and gate from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation: Any = nn.Sequential(nn.SiLU(), Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(modulate(self.in_ln(x), shift, scale)))


class FinalLayer(nn.Module):
    """Modulated norm without parameters, then the linear map to eps and v."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation: Any = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        x = modulate(self.norm_final(x), shift, scale)
        with torch.autocast(x.device.type, enabled=False):  # like `input_proj`: see DiffusionHead
            return self.linear(x)


class DiffusionHead(nn.Module):
    """Noise predictor: noisy tokens [N, C], timesteps [N] and conditions [N, D] to [N, 2C], eps and v.

    The first and the last layer keep their own precision under autocast: they alone pass on tokens and predicted noise,
    whose errors the first of 100 denoising steps multiplies by 316.
    """

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedding(width)
        self.cond_embed = nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks: Any = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier, with modulations at zero, so that every block starts as the identity, and eps = x at the output.

        That is the right output at the noisiest timestep, where sampling amplifies errors most. It needs a final norm
        that is nearly linear in x, so the first layer adds a large bias, orthogonal to everything that depends on x.
        The blocks' norms subtract the bias again, so that they see x at unit scale; the last layer's weights are
        orthogonal to it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for modulated in [*self.res_blocks, self.final_layer]:
            nn.init.zeros_(modulated.adaLN_modulation[1].weight)
        for number in (0, 2):
            nn.init.normal_(self.time_embed.mlp[number].weight, std=0.02)
        self._pass_noise_through()

    @torch.no_grad()
    def _pass_noise_through(self) -> None:
        weight, bias, readout = self.input_proj.weight, self.input_proj.bias, self.final_layer.linear
        token_dim = weight.shape[1]
        nn.init.normal_(weight, std=token_dim**-0.5)
        weight.sub_(weight.mean(dim=0))
        visible = torch.linalg.qr(torch.cat([weight, torch.ones_like(bias)[:, None]], dim=1)).Q
        nn.init.normal_(bias)
        bias.sub_(visible @ (visible.T @ bias))
        bias.mul_(BIAS_OVER_SIGNAL / bias.square().mean().sqrt())
        norm = (BIAS_OVER_SIGNAL**2 + 1) ** 0.5
        for block in self.res_blocks:
            block.in_ln.weight.fill_(norm)
            block.in_ln.bias.copy_(-bias)
        nn.init.zeros_(readout.weight)
        readout.weight[:token_dim] = torch.linalg.pinv(weight) * norm

    def forward(self, x: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        y = self.time_embed(timesteps) + self.cond_embed(conditions)
        with torch.autocast(x.device.type, enabled=False):
            x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)
