"""MAR, LazyMAR and the other methods by definition: one image and one branch at a time, in raster order, in float64.

The sampler is compared with this. It shares nothing with the sampler but the network's parameters and the declarations
of settings: orders, attention, caches, schedules and denoising are written out again, without any optimization.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from models import MAR, AnnealedSteps, CachePolicy, DetailedTokens

Steps = list[list[int]]  # of each step, the token positions it predicts, ascending


def in_random_order(order: list[int], num_iter: int, tokens_per_step: list[int] | None = None) -> Steps:
    """MAR's steps: from the end of the order on, ever more tokens at once; or as many as are listed."""
    steps, masked = [], len(order)
    for step in range(len(tokens_per_step) if tokens_per_step else num_iter):
        left = math.floor(len(order) * math.cos(math.pi / 2 * (step + 1) / num_iter))
        left = 0 if step == num_iter - 1 else max(1, min(masked - 1, left))
        left = masked - tokens_per_step[step] if tokens_per_step else left
        steps.append(sorted(order[left:masked]))
        masked = left
    return steps


def stage_of(row: int, column: int, num_stages: int) -> int:
    """GtR's stage of a token: half of the grid is the last stage, half of what is left the one before, and so on."""
    for halving in range(1, num_stages):
        if (row + column) % 2**halving != 0:
            return num_stages - halving
    return 0


def by_stages(order: list[int], num_iter: tuple[int, ...], side: int) -> Steps:
    """GtR's steps: one stage after the other, each spread evenly over its steps, from the end of the order on."""
    steps = []
    for stage, num_steps in enumerate(num_iter):
        left = [token for token in order if stage_of(token // side, token % side, len(num_iter)) == stage]
        size, owed = len(left), 0
        for _ in range(num_steps):
            owed += size
            steps.append(sorted(left.pop() for _ in range(owed // num_steps)))
            owed %= num_steps
        assert not left
    return steps


def guidance(cfg: float, cfg_schedule: str, masked_after: int, seq_len: int, unguided_below: float) -> float:
    """The CFG scale of a step; 1 where it would be below `unguided_below`."""
    if cfg_schedule == "linear":
        cfg = 1 + (cfg - 1) * (seq_len - max(1, masked_after)) / seq_len
    return 1.0 if cfg < unguided_below else cfg


def annealed(steps: int | AnnealedSteps, step: int, num_iter: int, num_generating: int) -> int:
    """Denoising steps asked for at a step of `num_iter`, of which `num_generating` come before the last stage."""
    if isinstance(steps, int):
        return steps
    fall, last = steps.upper - steps.lower, num_iter - 1
    if steps.schedule == "generation":
        if step >= num_generating:
            return steps.lower
        last = num_generating - 1
    if steps.schedule == "constant":
        return steps.lower
    if steps.schedule == "two-stage":
        return steps.upper if 2 * step < last else steps.lower
    if last == 0:  # a single step, which both begins and ends the fall
        return steps.upper
    if steps.schedule == "cosine":
        return steps.lower + int((math.cos(math.pi * step / last) + 1) / 2 * fall)
    return steps.lower + int((last - step) / last * fall)


def is_refresh(policy: CachePolicy, step: int, stage_steps: tuple[int, ...]) -> bool:
    """Whether everything is computed; with several stages the policy's steps are those of 64, and rounded up.

    A start step below 1 is a fraction of all steps. Alternation stays alternation, however few the steps are.
    """
    if policy.refresh_steps is not None:
        return step == 0 or step in policy.refresh_steps
    start, interval = policy.start_step, policy.refresh_interval
    if 0 < start < 1:
        start = next(count for count in range(sum(stage_steps) + 1) if count / sum(stage_steps) >= start)
    elif len(stage_steps) > 1:
        start = -(-start * sum(stage_steps) // 64)
    if len(stage_steps) > 1 and interval > 1:
        interval = max(2, -(-interval * sum(stage_steps) // 64))
    stage_starts = [sum(stage_steps[:stage]) for stage, steps in enumerate(stage_steps) if steps]
    if step in stage_starts or step < start or interval == 1:
        return True
    return step + 1 not in stage_starts and (step - start) % interval == 0


def kept_rows(policy: CachePolicy, step: int, num_iter: int, num_rows: int, num_predicted: int) -> int:
    """How many rows are recomputed after the prune layer; `num_predicted` are those of this step and the one before."""
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

    def decode(self, prune_layer: int | None, num_kept: int, certain: list[int], ranking) -> torch.Tensor:
        """The last block's output [P + L, D], NaN where pruned; by a `ranking` [P + L] or by similarity."""
        rows = torch.arange(self.num_rows)
        x = self.decoder_input
        for index, block in enumerate(self.model.decoder_blocks):
            keys, values = self.decoder_keys[index], self.decoder_values[index]
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=1)
            if index == prune_layer:
                scores = similarity(v, values, block.attn.num_heads) if ranking is None else ranking.clone()
                scores[certain] = -math.inf
            keys[rows], values[rows] = k, v
            x = x + attention(block.attn, q, keys, values)
            if index == prune_layer:
                rows = scores.argsort(stable=True)[:num_kept].sort().values
                x = x[rows]
            x = x + block.mlp(block.norm2(x))
        output = torch.full_like(self.decoder_input, torch.nan)
        output[rows] = x
        return output

    def run(
        self, tokens: torch.Tensor, known: list[int], previous: list[int], now: list[int], policy, num_kept, ranking
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
        return self.decode(policy.prune_layer if policy else None, num_kept, certain, ranking)


class Schedule:
    """Constants of improved DDPM's 1000 cosine steps, respaced to fewer; later ones than `first` become `first`."""

    def __init__(self, num_sampling_steps: int, first: int = 999) -> None:
        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        product, products = 1.0, []
        for i in range(1000):
            product *= 1 - min(0.999, 1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000))
            products.append(product)
        self.is_annealed = first < 999
        stride, position, self.timesteps = 999 / (num_sampling_steps - 1), 0.0, []
        for _ in range(num_sampling_steps):
            timestep = min(round(position), first)
            if timestep not in self.timesteps:
                self.timesteps.append(timestep)
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


def detail(condition: torch.Tensor) -> float:
    """The weighted sum of the amplitudes of a condition's [D] frequencies, but for the zeroth."""
    size, total = len(condition), 0.0
    for frequency in range(1, size // 2 + 1):
        angles = 2 * math.pi * frequency / size * torch.arange(size).double()
        amplitude = math.hypot((condition * angles.cos()).sum(), (condition * angles.sin()).sum())
        total += amplitude * (1 + frequency / (size // 2))
    return total


def detailed_ones(conditions: torch.Tensor, share: float) -> list[int]:
    """The numbers of the most detailed of an image's conditions [k, D]."""
    by_detail = sorted(range(len(conditions)), key=lambda token: detail(conditions[token]))
    return by_detail[len(conditions) - math.floor(len(conditions) * share + 1e-6) :]


def denoise(
    net, z_cond, z_uncond, noise, schedule: Schedule, cfg: float, temperature: float, policy: CachePolicy | None
) -> torch.Tensor:
    """Tokens [n, C] sampled for conditions [n, D]; `z_uncond` is None without guidance, `noise` is [S + 1, n, C]."""
    num_steps = len(schedule.timesteps)
    cond = HeadHalf(net, z_cond)
    uncond = None if z_uncond is None else HeadHalf(net, z_uncond)
    x = noise[0]
    for drawn, i in enumerate(reversed(range(num_steps)), start=1):
        refresh, warm, skipped = True, False, ()
        if policy is not None and policy.head_cache:
            interval = policy.head_refresh_interval
            if schedule.is_annealed and interval >= 1:  # the interval is that of 100 steps
                interval = -(-interval * num_steps // 100)
            if interval < 1:
                interval = math.ceil(interval * num_steps - 1e-6)
            refresh = i == num_steps - 1 or i % interval == 0
            warm = i > policy.head_warmup * num_steps
            skipped = policy.head_skipped_blocks
        eps, v = cond(x, schedule.timesteps[i], refresh, warm, skipped)
        if uncond is not None:
            if refresh:
                difference = eps - uncond(x, schedule.timesteps[i], refresh, warm, skipped)[0]
            eps = eps + (cfg - 1) * difference
        x = schedule.step(i, x, eps, v, temperature * noise[drawn])
    return x


def token_of_image(model: MAR, latents: torch.Tensor, position: int) -> torch.Tensor:
    """The token [C * p * p] at a position of latents [C, h, w]."""
    p = model.patch_size
    row, column = position // model.grid_size * p, position % model.grid_size * p
    return latents[:, row : row + p, column : column + p].flatten()


def image_of_tokens(model: MAR, tokens: torch.Tensor) -> torch.Tensor:
    """Latents [C, h, w] of tokens [L, C * p * p]."""
    p, grid, channels = model.patch_size, model.grid_size, model.vae_embed_dim
    latents = torch.empty(channels, grid * p, grid * p, dtype=tokens.dtype)
    for position, token in enumerate(tokens):
        row, column = position // grid * p, position % grid * p
        latents[:, row : row + p, column : column + p] = token.reshape(channels, p, p)
    return latents


def steps_with_tokens(num_iter: tuple[int, ...], missing: list[int], side: int) -> tuple[int, ...]:
    """The steps of each stage: no more than it has missing tokens."""
    stages = [stage_of(token // side, token % side, len(num_iter)) for token in missing]
    return tuple(min(num_steps, stages.count(stage)) for stage, num_steps in enumerate(num_iter))


def rankings(steps: Steps, num_steps: int, num_rows: int, num_tokens: int) -> torch.Tensor:
    """For each step a random ranking of an image's rows, the buffer first: [num_steps, num_rows].

    It is random in the order of prediction, and comes back in raster order.
    """
    order = [position for step in steps for position in step]
    unshuffled = np.tile(np.arange(num_rows, dtype=np.float32), (num_steps, 1))
    ranking = np.random.default_rng(order).permuted(unshuffled, axis=1)
    buffer = num_rows - num_tokens
    in_raster_order = ranking.copy()
    in_raster_order[:, [buffer + position for position in order]] = ranking[:, buffer:]
    return torch.from_numpy(in_raster_order).double()


@torch.inference_mode()
def sample_tokens(
    model: MAR,
    class_labels: torch.Tensor,
    *,
    num_iter: int | tuple[int, ...],
    cfg: float | list[float],
    cfg_schedule: str,
    temperature: float,
    num_sampling_steps: int | AnnealedSteps,
    noise,
    cache: CachePolicy | None = None,
    num_stages: int = 1,
    detailed_tokens: DetailedTokens | None = None,
    unguided_below: float = 1.0,
    lazy_sampling_steps: int | None = None,
    tokens_per_step: list[int] | None = None,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """What `models.sample_tokens` computes, for a float64 model on the CPU.

    The unconditional branch is computed at every step, if at any, whether or not somebody reads it.
    """
    batch, seq_len, num_rows = len(class_labels), model.seq_len, model.buffer_size + model.seq_len
    cond = [Half(model, model.class_emb.weight[label]) for label in class_labels]
    uncond = [Half(model, model.fake_latent[0]) for _ in class_labels]
    stored_difference = [None] * batch

    given = [position for position in range(seq_len) if known is not None and known[1].flatten()[position]]
    missing = [position for position in range(seq_len) if position not in given]
    stage_steps = (num_iter,) if isinstance(num_iter, int) else num_iter
    assert len(stage_steps) == num_stages
    if given:
        stage_steps = steps_with_tokens(stage_steps, missing, model.grid_size)
    stage_starts = [sum(stage_steps[:stage]) for stage in range(num_stages)]
    steps: list[Steps] = []
    for whole_order in noise.orders.tolist():
        order = [position for position in whole_order if position in missing]
        in_one_stage = in_random_order(order, stage_steps[0], tokens_per_step)
        steps.append(in_one_stage if num_stages == 1 else by_stages(order, stage_steps, model.grid_size))
    num_iter = len(steps[0])
    ranking = [rankings([given, *of_image], num_iter, num_rows, seq_len) for of_image in steps]

    annealing = isinstance(num_sampling_steps, AnnealedSteps)
    first_timestep = 950 if annealing else 999
    tokens = torch.zeros(batch, seq_len, model.token_dim).double()
    for image in range(batch):
        for position in given:
            tokens[image, position] = token_of_image(model, known[0][image], position)
    for step in range(num_iter):
        refresh = cache is None or is_refresh(cache, step, stage_steps)
        policy = None if refresh or not cache.token_cache else cache
        z_cond, z_uncond = [], []
        for image in range(batch):
            now = steps[image][step]
            previous = steps[image][step - 1] if step else []
            there = sorted(given + [position for past in steps[image][:step] for position in past])
            num_kept = kept_rows(cache, step, num_iter, num_rows, len(now) + len(previous)) if policy else num_rows
            chance = ranking[image][step] if policy and policy.selection == "random" else None
            arguments = (tokens[image], there, previous, now, policy, num_kept, chance)
            h_cond = cond[image].run(*arguments)
            if cfg == 1:
                h_uncond = h_cond
            elif refresh or not cache.condition_cache:
                h_uncond = uncond[image].run(*arguments)
                stored_difference[image] = h_uncond - h_cond
            else:
                h_uncond = h_cond + stored_difference[image]
            rows = [model.buffer_size + position for position in now]
            position_embedding = model.diffusion_pos_embed_learned[0, now]
            z_cond.append(model.decoder_norm(h_cond[rows]) + position_embedding)
            z_uncond.append(model.decoder_norm(h_uncond[rows]) + position_embedding)

        num_predicted = len(steps[0][step])
        masked_after = len(missing) - sum(len(past) for past in steps[0][: step + 1])
        scale = cfg[step] if isinstance(cfg, list) else cfg
        if not isinstance(cfg, list):
            scale = guidance(cfg, cfg_schedule, masked_after, len(missing), unguided_below)
        count = annealed(num_sampling_steps, step, num_iter, stage_starts[-1])
        if not refresh and lazy_sampling_steps is not None:
            count = min(count, lazy_sampling_steps)
        drawn = noise.draw(step, num_predicted).double()
        for image in range(batch):
            chosen = []
            if detailed_tokens is not None and step >= stage_starts[-1]:
                chosen = detailed_ones(z_cond[image], detailed_tokens.share)
            others = [token for token in range(num_predicted) if token not in chosen]
            most = max(count, detailed_tokens.num_sampling_steps) if detailed_tokens else None
            for part, num_steps in (chosen, most), (others, count):
                if part:
                    tokens[image, [steps[image][step][token] for token in part]] = denoise(
                        model.diffloss.net,
                        z_cond[image][part],
                        z_uncond[image][part] if scale > 1 else None,
                        drawn[:, image, part],
                        Schedule(num_steps, first_timestep),
                        scale,
                        temperature,
                        cache,
                    )
    return torch.stack([image_of_tokens(model, row) for row in tokens])
