"""MAR and LazyMAR the slow way: the method's definition, one image and one half at a time, in raster order.

Nothing here is shared with the sampler but the network's parameters: attention, caches, schedules and denoising are
written out again, in float64 and without any of the savings, so that the sampler has something to be compared with.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from models import MAR, CachePolicy


def predicted_per_step(order: list[int], num_iter: int) -> list[tuple[list[int], int]]:
    """Of each step, the token positions it predicts, ascending, and the masked count that guidance goes by."""
    steps, masked = [], len(order)
    for step in range(num_iter):
        left = math.floor(len(order) * math.cos(math.pi / 2 * (step + 1) / num_iter))
        left = max(1, min(masked - 1, left))
        after = 0 if step == num_iter - 1 else left
        steps.append((sorted(order[after:masked]), left))
        masked = after
    return steps


def guidance(cfg: float, cfg_schedule: str, masked_after: int, seq_len: int) -> float:
    if cfg_schedule == "constant":
        return cfg
    return 1 + (cfg - 1) * (seq_len - masked_after) / seq_len


def kept_rows(policy: CachePolicy, step: int, num_iter: int, num_rows: int, num_predicted: int) -> int:
    """How many rows go on below the prune layer; `num_predicted` are those of this step and of the one before."""
    progress = step * 64 // num_iter
    fraction = [value for start, value in policy.kept_fractions if start <= progress][-1]
    return min(num_rows, max(num_predicted + policy.min_margin, int(num_rows * fraction)))


def attention(attn, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows [n, D] attending to rows [m, D], head by head."""
    size = q.shape[1] // attn.num_heads
    heads = []
    for head in range(attn.num_heads):
        part = slice(head * size, (head + 1) * size)
        weights = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(size), dim=1)
        heads.append(weights @ v[:, part])
    return attn.proj(torch.cat(heads, dim=1))


def similarity(new: torch.Tensor, old: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The cosine of the angle between each row [D] of `new` and of `old`, averaged over the heads."""
    size = new.shape[1] // num_heads
    cosines = [
        F.cosine_similarity(new[:, i * size : (i + 1) * size], old[:, i * size : (i + 1) * size], dim=1)
        for i in range(num_heads)
    ]
    return torch.stack(cosines).mean(0)


class Half:
    """One image's conditional or unconditional pass through the transformer, and what it remembers of the last."""

    def __init__(self, model: MAR, class_embedding: torch.Tensor) -> None:
        self.model, self.class_embedding = model, class_embedding
        self.num_rows = model.buffer_size + model.seq_len
        rows, encoder_dim = self.num_rows, model.fake_latent.shape[1]
        decoder_dim = model.mask_token.shape[2]
        self.encoder_keys = [torch.full((rows, encoder_dim), torch.nan).double() for _ in model.encoder_blocks]
        self.encoder_values = [torch.full((rows, encoder_dim), torch.nan).double() for _ in model.encoder_blocks]
        self.decoder_input = torch.full((rows, decoder_dim), torch.nan).double()
        self.decoder_keys = [torch.full((rows, decoder_dim), torch.nan).double() for _ in model.decoder_blocks]
        self.decoder_values = [torch.full((rows, decoder_dim), torch.nan).double() for _ in model.decoder_blocks]

    def encode(self, tokens: torch.Tensor, rows: list[int], known: list[int]) -> torch.Tensor:
        """The encoder's output at `rows`, which see all `known` rows; rows count the buffer first."""
        model = self.model
        buffer = self.class_embedding.expand(model.buffer_size, -1)
        x = torch.cat([buffer, model.z_proj(tokens)]) + model.encoder_pos_embed_learned[0]
        x = model.z_proj_ln(x)[rows]
        for block, keys, values in zip(model.encoder_blocks, self.encoder_keys, self.encoder_values):
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=1)
            keys[rows], values[rows] = k, v
            x = x + attention(block.attn, q, keys[known], values[known])
            x = x + block.mlp(block.norm2(x))
        return model.encoder_norm(x)

    def decode(self, prune_layer: int | None, num_kept: int, certain: list[int]) -> torch.Tensor:
        """The last block's output [P + L, D]; rows that were pruned are NaN."""
        rows = torch.arange(self.num_rows)
        x = self.decoder_input
        for index, block in enumerate(self.model.decoder_blocks):
            keys, values = self.decoder_keys[index], self.decoder_values[index]
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=1)
            if index == prune_layer:
                scores = similarity(v, values, block.attn.num_heads)
                scores[certain] = 0
            keys[rows], values[rows] = k, v
            x = x + attention(block.attn, q, keys, values)
            if index == prune_layer:
                rows = scores.argsort(stable=True)[:num_kept].sort().values
                # Were so many rows' similarities negative, the method would not say which of the zeros to keep.
                assert set(certain) <= set(rows.tolist())
                x = x[rows]
            x = x + block.mlp(block.norm2(x))
        output = torch.full_like(self.decoder_input, torch.nan)
        output[rows] = x
        return output

    def run(
        self, tokens: torch.Tensor, known: list[int], previous: list[int], now: list[int], policy, num_kept: int
    ) -> torch.Tensor:
        """The last block's output for token positions `now`, after `previous`; a `policy` allows old features."""
        model, first = self.model, self.model.buffer_size
        buffer_rows = list(range(first))
        known_rows = buffer_rows + [first + position for position in known]
        previous_rows = [first + position for position in previous]
        if policy is None:
            new_rows = known_rows
            self.decoder_input = model.mask_token[0] + model.decoder_pos_embed_learned[0]
        else:
            new_rows = buffer_rows + previous_rows
        encoded = self.encode(tokens, new_rows, known_rows)
        self.decoder_input[new_rows] = model.decoder_embed(encoded) + model.decoder_pos_embed_learned[0, new_rows]
        certain = previous_rows + [first + position for position in now]
        return self.decode(policy.prune_layer if policy else None, num_kept, certain)


class Schedule:
    """Constants of improved DDPM's 1000 cosine steps, respaced to fewer."""

    def __init__(self, num_sampling_steps: int) -> None:
        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        product, products = 1.0, []
        for i in range(1000):
            product *= 1 - min(0.999, 1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000))
            products.append(product)
        stride, position, self.timesteps = 999 / (num_sampling_steps - 1), 0.0, []
        for _ in range(num_sampling_steps):
            self.timesteps.append(round(position))
            position += stride
        self.alpha_bars = [products[t] for t in self.timesteps]
        self.previous = [1.0, *self.alpha_bars[:-1]]
        self.betas = [1 - now / before for now, before in zip(self.alpha_bars, self.previous)]

    def posterior_log_variance(self, i: int) -> float:
        i = max(i, 1)
        return math.log(self.betas[i] * (1 - self.previous[i]) / (1 - self.alpha_bars[i]))

    def step(self, i: int, x, eps, v, noise):
        """One ancestral step from x_i; `noise` is scaled by the temperature already."""
        alpha_bar, previous, beta = self.alpha_bars[i], self.previous[i], self.betas[i]
        x0 = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
        mean = (beta * math.sqrt(previous) * x0 + (1 - previous) * math.sqrt(1 - beta) * x) / (1 - alpha_bar)
        if i == 0:
            return mean
        fraction = (v + 1) / 2
        log_variance = fraction * math.log(beta) + (1 - fraction) * self.posterior_log_variance(i)
        return mean + torch.exp(log_variance / 2) * noise


def sinusoids(timestep: int) -> torch.Tensor:
    """128 cosines and 128 sines of float32 angles, each rounded to float32 from a result of higher precision."""
    exponents = np.float32(-math.log(10000)) * np.arange(128, dtype=np.float32) / np.float32(128)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (np.float32(timestep) * frequencies).astype(np.float64)
    return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)]).astype(np.float32)).double()


class HeadHalf:
    """The diffusion head for one half's conditions z [n, D], and what it remembers from step to step."""

    def __init__(self, net, z: torch.Tensor) -> None:
        self.net, self.z = net, z
        self.mlp_outputs: dict[int, torch.Tensor] = {}
        self.differences: dict[int, torch.Tensor] = {}

    def __call__(self, x, timestep: int, refresh: bool, warm: bool, skipped: tuple[int, ...]):
        """eps and v for noisy tokens x [n, C]; unless `refresh`, skipped blocks and (if not `warm`) MLPs are old."""
        net = self.net
        y = net.time_embed.mlp(sinusoids(timestep)) + net.cond_embed(self.z)
        modulation = F.silu(y)
        x = net.input_proj(x)
        for index, block in enumerate(net.res_blocks):
            if not refresh and index in skipped:
                x = x + self.differences[index]
                continue
            shift, scale, gate = block.adaLN_modulation[1](modulation).chunk(3, dim=1)
            if refresh or warm:
                self.mlp_outputs[index] = block.mlp(block.in_ln(x) * (1 + scale) + shift)
            out = x + gate * self.mlp_outputs[index]
            if refresh:
                self.differences[index] = out - x
            x = out
        shift, scale = net.final_layer.adaLN_modulation[1](modulation).chunk(2, dim=1)
        normed = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return net.final_layer.linear(normed * (1 + scale) + shift).chunk(2, dim=1)


def denoise(net, z_cond, z_uncond, noise, cfg: float, temperature: float, policy: CachePolicy | None) -> torch.Tensor:
    """Tokens [n, C] sampled for conditions [n, D]; `z_uncond` is None without guidance, `noise` [S + 1, n, C]."""
    num_steps = len(noise) - 1
    schedule = Schedule(num_steps)
    cond = HeadHalf(net, z_cond)
    uncond = None if z_uncond is None else HeadHalf(net, z_uncond)
    x = noise[0]
    for drawn, i in enumerate(reversed(range(num_steps)), start=1):
        refresh, warm, skipped = True, False, ()
        if policy is not None and policy.head_cache:
            refresh = i == num_steps - 1 or i % policy.head_refresh_interval == 0
            warm = i > policy.head_warmup * num_steps
            skipped = policy.head_skipped_blocks
        eps, v = cond(x, schedule.timesteps[i], refresh, warm, skipped)
        if uncond is not None:
            if refresh:
                difference = eps - uncond(x, schedule.timesteps[i], refresh, warm, skipped)[0]
            eps = eps + (cfg - 1) * difference
        x = schedule.step(i, x, eps, v, temperature * noise[drawn])
    return x


def image_of_tokens(model: MAR, tokens: torch.Tensor) -> torch.Tensor:
    """Latents [C, h, w] of tokens [L, C * p * p]."""
    p, grid, channels = model.patch_size, model.grid_size, model.vae_embed_dim
    latents = torch.empty(channels, grid * p, grid * p, dtype=tokens.dtype)
    for position, token in enumerate(tokens):
        row, column = position // grid * p, position % grid * p
        latents[:, row : row + p, column : column + p] = token.reshape(channels, p, p)
    return latents


@torch.inference_mode()
def sample_tokens(
    model: MAR,
    class_labels: torch.Tensor,
    *,
    num_iter: int,
    cfg: float,
    cfg_schedule: str,
    temperature: float,
    num_sampling_steps: int,
    cache: CachePolicy | None,
    noise,
    conditions: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """What `models.sample_tokens` computes, for a float64 model on the CPU.

    Each step's conditions [halves, B, k, D], in ascending position, are appended to `conditions`.
    """
    batch, seq_len, guided = len(class_labels), model.seq_len, cfg != 1
    cond = [Half(model, model.class_emb.weight[label]) for label in class_labels]
    uncond = [Half(model, model.fake_latent[0]) for _ in class_labels]
    stored_difference = [None] * batch
    steps = [predicted_per_step(order.tolist(), num_iter) for order in noise.orders]
    tokens = torch.zeros(batch, seq_len, model.token_dim).double()
    for step in range(num_iter):
        refresh = cache is None or step < cache.start_step or (step - cache.start_step) % cache.refresh_interval == 0
        policy = None if refresh or not cache.token_cache else cache
        run_uncond = guided and (refresh or not cache.condition_cache)
        z_cond, z_uncond = [], []
        for image in range(batch):
            now = steps[image][step][0]
            previous = steps[image][step - 1][0] if step else []
            known = sorted(position for past, _ in steps[image][:step] for position in past)
            num_rows = model.buffer_size + seq_len
            num_kept = kept_rows(cache, step, num_iter, num_rows, len(now) + len(previous)) if policy else num_rows
            arguments = (tokens[image], known, previous, now, policy, num_kept)
            h_cond = cond[image].run(*arguments)
            if run_uncond:
                h_uncond = uncond[image].run(*arguments)
                stored_difference[image] = h_uncond - h_cond
            elif guided:
                h_uncond = h_cond + stored_difference[image]
            rows = [model.buffer_size + position for position in now]
            position_embedding = model.diffusion_pos_embed_learned[0, now]
            z_cond.append(model.decoder_norm(h_cond[rows]) + position_embedding)
            if guided:
                z_uncond.append(model.decoder_norm(h_uncond[rows]) + position_embedding)
        num_predicted = len(steps[0][step][0])
        drawn = noise.draw(step, num_predicted).double().flatten(1, 2)
        scale = guidance(cfg, cfg_schedule, steps[0][step][1], seq_len)
        halves = [torch.cat(z_cond), torch.cat(z_uncond) if guided else None]
        sampled = denoise(model.diffloss.net, *halves, drawn, scale, temperature, cache).unflatten(0, (batch, -1))
        for image in range(batch):
            tokens[image, steps[image][step][0]] = sampled[image]
        if conditions is not None:
            conditions.append(torch.stack([torch.stack(half) for half in (z_cond, z_uncond) if half]))
    return torch.stack([image_of_tokens(model, row) for row in tokens])
