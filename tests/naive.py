"""MAR, LazyMAR and the other methods by definition: one image and one branch at a time, in raster order, in float64.

The sampler is compared with this. It shares nothing with the sampler but the network's parameters and the declarations
of settings: orders, attention, caches, schedules and denoising are written out again, without any optimization.
"""

import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from models import MAR, AnnealedSteps, CachePolicy, Method, SolverSteps

Rows = list[int]  # numbers of rows; of a sequence, the buffer's come first
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


def exp_counts(seq_len: int, num_iter: int) -> list[int]:
    """eMIGM's tokens of each step, as many as are expected, at least one."""
    counts = []
    for step in range(num_iter):
        time = 1 - (1 - 1e-5) * (step + 1) / num_iter
        left = round(seq_len * (1 - math.exp(-5 * time)) / (1 - math.exp(-5))) if step < num_iter - 1 else 0
        counts.append(max(1, seq_len - sum(counts) - left))
    return counts


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
    if last == 0:  # a single step, which both begins and ends the fall
        return steps.upper
    if steps.schedule == "cosine":
        return steps.lower + int((math.cos(math.pi * step / last) + 1) / 2 * fall)
    return steps.lower + int((last - step) / last * fall)


def is_refresh(policy: CachePolicy, step: int, stage_steps: tuple[int, ...], of_64: bool = False) -> bool:
    """Whether everything is computed; with several stages, or `of_64`, the policy's steps are of 64, and rounded up.

    A start step below 1 is a fraction of all steps. Alternation stays alternation, however few the steps are.
    """
    if policy.refresh_steps is not None:
        return step == 0 or step in policy.refresh_steps
    start, interval = policy.start_step, policy.refresh_interval
    of_64 = of_64 or len(stage_steps) > 1
    if 0 < start < 1:
        start = next(count for count in range(sum(stage_steps) + 1) if count / sum(stage_steps) >= start)
    elif of_64:
        start = -(-start * sum(stage_steps) // 64)
    if of_64 and interval > 1:
        interval = max(2, -(-interval * sum(stage_steps) // 64))
    stage_starts = [sum(stage_steps[:stage]) for stage, steps in enumerate(stage_steps) if steps]
    if step in stage_starts or step < start or interval == 1:
        return True
    return step + 1 not in stage_starts and (step - start) % interval == 0


def recomputed_rows(policy: CachePolicy, step: int, num_iter: int, num_rows: int, num_predicted: int) -> int:
    """How many rows are recomputed after the prune layer; `num_predicted` are those of this step and the one before."""
    progress = step * 64 // num_iter
    fraction = [value for start, value in policy.recomputed_fractions if start <= progress][-1]
    return min(num_rows, max(num_predicted + policy.min_margin, int(num_rows * fraction)))


def attention(attn, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows [n, D] attending to rows [m, D], head by head."""
    heads = []
    for queries, keys, values in zip(*(rows.chunk(attn.num_heads, dim=1) for rows in (q, k, v))):
        weights = torch.softmax(queries @ keys.T / math.sqrt(queries.shape[1]), dim=1)
        heads.append(weights @ values)
    return attn.proj(torch.cat(heads, dim=1))


def similarity(new: torch.Tensor, old: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The cosine of the angle between each row [D] of `new` and of `old`, averaged over the heads."""
    heads = zip(new.chunk(num_heads, dim=1), old.chunk(num_heads, dim=1))
    return torch.stack([F.cosine_similarity(now, before, dim=1) for now, before in heads]).mean(0)


class Half:
    """One image's conditional or unconditional pass through the transformer, and what it remembers of the last."""

    def __init__(self, model: MAR, class_embedding: torch.Tensor) -> None:
        self.model, self.class_embedding = model, class_embedding

        def unknown(width: int) -> torch.Tensor:
            return torch.full((model.buffer_size + model.seq_len, width), torch.nan).double()

        encoder_dim, decoder_dim = model.fake_latent.shape[1], model.mask_token.shape[-1]
        self.encoder_cache = [(unknown(encoder_dim), unknown(encoder_dim)) for _ in model.encoder_blocks]
        self.decoder_cache = [(unknown(decoder_dim), unknown(decoder_dim)) for _ in model.decoder_blocks]
        self.decoder_input = unknown(decoder_dim)
        self.block_inputs = {}  # of the decoder blocks that have computed all rows

    def encode(self, tokens: torch.Tensor, rows: list[int], known: list[int]) -> torch.Tensor:
        """The encoder's output at `rows`, which see all `known` rows; rows count the buffer first."""
        model = self.model
        buffer = self.class_embedding.expand(model.buffer_size, -1)
        x = torch.cat([buffer, model.z_proj(tokens)]) + model.encoder_pos_embed_learned[0]
        x = model.z_proj_ln(x)[rows]
        for block, (keys, values) in zip(model.encoder_blocks, self.encoder_cache):
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=1)
            keys[rows], values[rows] = k, v
            x = x + attention(block.attn, q, keys[known], values[known])
            x = x + block.mlp(block.norm2(x))
        return model.encoder_norm(x)

    def decode(self, policy: CachePolicy | None, num_recomputed: int, certain: list[int], ranking) -> torch.Tensor:
        """The last block's output [P + L, D], NaN where pruned; by a `ranking` [P + L] or by similarity."""
        x, rows = self.decoder_input, torch.arange(len(self.decoder_input))
        prune_layer = policy.prune_layer if policy else None
        for index, (block, (keys, values)) in enumerate(zip(self.model.decoder_blocks, self.decoder_cache)):
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=1)
            if index == prune_layer:
                compared = {"similarity": (v, values), "keys": (k, keys), "outputs": (x, self.block_inputs[index])}
                scores = ranking
                if ranking is None:
                    scores = similarity(*compared[policy.selection], block.attn.num_heads)
                scores = scores.clone()
                scores[certain] = -math.inf
            keys[rows], values[rows] = k, v
            if len(rows) == len(keys):
                self.block_inputs[index] = x.clone()
            x = x + attention(block.attn, q, keys, values)
            if index == prune_layer:
                rows = scores.argsort(stable=True)[:num_recomputed].sort().values
                x = x[rows]
            x = x + block.mlp(block.norm2(x))
        output = torch.full_like(self.decoder_input, torch.nan)
        output[rows] = x
        return output

    def run(
        self, tokens: torch.Tensor, known: Rows, previous: Rows, now: Rows, policy, num_recomputed, ranking
    ) -> torch.Tensor:
        """The last block's output, to predict rows `now`, after rows `previous`; a `policy` allows old features."""
        model = self.model
        buffer = list(range(model.buffer_size))
        new = buffer + (previous if policy else known)
        if policy is None:
            self.decoder_input = model.mask_token[0] + model.decoder_pos_embed_learned[0]
        encoded = self.encode(tokens, new, buffer + known)
        self.decoder_input[new] = model.decoder_embed(encoded) + model.decoder_pos_embed_learned[0, new]
        return self.decode(policy, num_recomputed, previous + now, ranking)


@functools.cache
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

    def step(self, i: int, x, eps, v, noise):
        """One ancestral step from x_i; `noise` is scaled by the temperature already."""
        alpha_bar, previous, beta = self.alpha_bars[i], self.previous[i], self.betas[i]
        x0 = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
        mean = (beta * math.sqrt(previous) * x0 + (1 - previous) * math.sqrt(1 - beta) * x) / (1 - alpha_bar)
        if i == 0:
            return mean
        posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
        fraction = (v + 1) / 2
        log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(posterior_variance)
        return mean + torch.exp(log_variance / 2) * noise


class Times:
    """The noise schedule between timesteps of training, for a solver; lower ones are cut off, the rest stretched."""

    def __init__(self, lowest: float) -> None:
        alpha_bars = Schedule(1000).alpha_bars
        self.log_alphas = [math.log(a) / 2 for a in alpha_bars if math.log(a / (1 - a)) / 2 >= lowest]
        self.stride = 1000 / len(self.log_alphas)
        self.last = 1000 - self.stride

    def alpha_sigma_lambda(self, timestep: float) -> tuple[float, float, float]:
        i = min(int(timestep / self.stride), len(self.log_alphas) - 2)
        fraction = timestep / self.stride - i
        alpha = math.exp((1 - fraction) * self.log_alphas[i] + fraction * self.log_alphas[i + 1])
        return alpha, math.sqrt(1 - alpha**2), math.log(alpha**2 / (1 - alpha**2)) / 2

    def grid(self, first: float, last: float, count: int) -> list[float]:
        """`count` timesteps from `first` on, and `last`, uniform in lambda; by bisection."""
        (_, _, start), (_, _, stop) = self.alpha_sigma_lambda(first), self.alpha_sigma_lambda(last)
        found = []
        for step in range(1, count):
            low, high = last, first
            for _ in range(80):
                middle = (low + high) / 2
                is_later = self.alpha_sigma_lambda(middle)[2] > start + (stop - start) * step / count
                low, high = (middle, high) if is_later else (low, middle)
            found.append(low)
        return [float(first), *found, float(last)]


def solve(predict, x: torch.Tensor, steps: SolverSteps) -> torch.Tensor:
    """DPM-Solver++ from noise x [n, C]; `predict(x, timestep)` is the guided eps."""
    times = Times(-math.inf if steps.rule == "multistep" else -5.1)

    def data(x: torch.Tensor, timestep: float) -> torch.Tensor:
        alpha, sigma, _ = times.alpha_sigma_lambda(timestep)
        return (x - sigma * predict(x, timestep)) / alpha

    def move(x: torch.Tensor, s: float, t: float, start: torch.Tensor, other=None, at=None, exact=False):
        """From s to t, given the data predicted at s and at another timestep; linear in lambda between."""
        (_, sigma_s, lambda_s), (alpha, sigma, lambda_t) = times.alpha_sigma_lambda(s), times.alpha_sigma_lambda(t)
        h = lambda_t - lambda_s
        x = sigma / sigma_s * x + alpha * (1 - math.exp(-h)) * start
        if other is None:
            return x
        slope = (other - start) / (times.alpha_sigma_lambda(at)[2] - lambda_s)
        return x + alpha * slope * (h - (1 - math.exp(-h)) if exact else h / 2 * (1 - math.exp(-h)))

    if steps.rule == "multistep":
        before = s_before = None
        for s, t in itertools.pairwise(times.grid(950, 0, steps.evaluations)):
            now = data(x, s)
            x, before, s_before = move(x, s, t, now, before, s_before), now, s
        return x
    orders, left = [], steps.evaluations
    while left:
        orders.append(3 if left > 3 else min(left, 2))
        left -= orders[-1]
    outer = times.grid(times.last, 0, len(orders))
    for order, s, t in zip(orders, outer, outer[1:]):
        start, later, other, at = data(x, s), times.grid(s, t, order)[1:-1], None, None
        for middle in later:
            other = data(move(x, s, middle, start, other, at, exact=True), middle)
            at = middle
        x = move(x, s, t, start, other, at, exact=order == 3)
    return x


@functools.cache
def sinusoids(timestep: float) -> torch.Tensor:
    """128 cosines and 128 sines of float32 angles, each rounded to float32 from a result of higher precision.

    Those of a timestep that is no whole number are not rounded, and neither are their angles.
    """
    exponents = np.float32(-math.log(10000)) * np.arange(128, dtype=np.float32) / np.float32(128)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    if isinstance(timestep, float):
        angles = timestep * frequencies.astype(np.float64)
        return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)]))
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


def denoise(net, z_cond, z_uncond, noise, schedule: Schedule, cfg: float, temperature: float, policy) -> torch.Tensor:
    """Tokens [n, C] sampled for conditions [n, D], by noise [S + 1, n, C], with guidance if `cfg` is above 1."""
    if isinstance(schedule, SolverSteps):

        def predict(x: torch.Tensor, timestep: float) -> torch.Tensor:
            eps = HeadHalf(net, z_cond)(x, timestep, True, False, ())[0]
            if cfg == 1:
                return eps
            unguided = HeadHalf(net, z_uncond)(x, timestep, True, False, ())[0]
            return unguided + cfg * (eps - unguided)

        return solve(predict, temperature * noise[0], schedule)
    num_steps = len(schedule.timesteps)
    cond, uncond = HeadHalf(net, z_cond), HeadHalf(net, z_uncond)
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
        if cfg > 1:
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
    method: Method,
    *,
    cfg: float | list[float],
    cfg_schedule: str,
    temperature: float,
    noise,
    tokens_per_step: list[int] | None = None,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """What `models.sample_tokens` computes, for a float64 model on the CPU.

    The unconditional branch is computed at every step, if at any, whether or not somebody reads it.
    """
    seq_len, num_rows, cache = model.seq_len, model.buffer_size + model.seq_len, method.cache
    cond = [Half(model, model.class_emb.weight[label]) for label in class_labels]
    uncond = [Half(model, model.fake_latent[0]) for _ in class_labels]
    stored_difference = [None] * len(class_labels)

    stage_steps = (method.num_iter,) if isinstance(method.num_iter, int) else method.num_iter
    given = [position for position in range(seq_len) if known is not None and known[1].flatten()[position]]
    missing = [position for position in range(seq_len) if position not in given]
    if given:
        stage_steps = steps_with_tokens(stage_steps, missing, model.grid_size)
    last_stage = sum(stage_steps[:-1])
    steps: list[Steps] = []
    for whole_order in noise.orders.tolist():
        order = [position for position in whole_order if position in missing]
        counts = (
            exp_counts(len(missing), stage_steps[0])
            if method.token_schedule == "exp"
            else method.tokens_per_step or tokens_per_step
        )
        in_one_stage = in_random_order(order, stage_steps[0], counts)
        steps.append(in_one_stage if method.num_stages == 1 else by_stages(order, stage_steps, model.grid_size))
    num_iter = len(steps[0])
    ranking = [rankings([given, *of_image], num_iter, num_rows, seq_len) for of_image in steps]

    solver = method.num_sampling_steps if isinstance(method.num_sampling_steps, SolverSteps) else None
    first_timestep = 950 if isinstance(method.num_sampling_steps, AnnealedSteps) else 999
    tokens = torch.zeros(len(class_labels), seq_len, model.token_dim).double()
    for image in range(len(class_labels)):
        for position in given:
            tokens[image, position] = token_of_image(model, known[0][image], position)
    both, since_refresh = [], 0
    for step in range(num_iter if cache and cfg != 1 else 0):
        refresh = is_refresh(cache, step, stage_steps, method.token_schedule == "exp")
        since_refresh = 0 if refresh else since_refresh + 1
        if refresh or (cache.condition_interval and since_refresh % cache.condition_interval == 0):
            both.append(step)
    for step in range(num_iter):
        refresh = cache is None or is_refresh(cache, step, stage_steps, method.token_schedule == "exp")
        policy = None if refresh or not cache.token_cache else cache
        extra = step in both and not refresh and cache.condition_cache  # a lazy step with both branches
        first_new = max((past for past in both if past < step), default=0) if extra else max(step - 1, 0)
        end = min((later for later in both if later > step), default=num_iter) if extra else step + 1
        num_predicted = len(steps[0][step])
        masked_after = len(missing) - sum(len(past) for past in steps[0][: step + 1])
        if isinstance(cfg, list):
            scale = cfg[step]
        else:
            scale = guidance(cfg, cfg_schedule, masked_after, len(missing), method.unguided_below)
        time_after = 1 - (1 - 1e-5) * (step + 1) / num_iter
        lowest, highest = method.guidance_interval or (0, 1)
        if not lowest < time_after <= highest:
            scale = 1.0
        count = solver.evaluations if solver else annealed(method.num_sampling_steps, step, num_iter, last_stage)
        if not refresh and method.lazy_sampling_steps is not None:
            count = min(count, method.lazy_sampling_steps)
        drawn = noise.draw(step, num_predicted).double()

        for image, of_image in enumerate(steps):
            predicted = [[model.buffer_size + position for position in past] for past in of_image[: step + 1]]
            now, previous = predicted[-1], [row for past in predicted[first_new:-1] for row in past]
            needed = [model.buffer_size + position for later in of_image[step:end] for position in later]
            there = [model.buffer_size + position for position in given]
            there = sorted(there + [row for past in predicted[:-1] for row in past])
            num_recomputed = (
                recomputed_rows(cache, step, num_iter, num_rows, len(needed) + len(previous)) if policy else num_rows
            )
            chance = ranking[image][step] if policy and policy.selection == "random" else None
            arguments = (tokens[image], there, previous, needed, policy, num_recomputed, chance)
            h_cond = h_uncond = cond[image].run(*arguments)
            if cfg != 1 and (refresh or extra or not cache.condition_cache):
                h_uncond = uncond[image].run(*arguments)
                stored_difference[image] = h_uncond - h_cond
            elif cfg != 1:
                h_uncond = h_cond + stored_difference[image]
            position_embedding = model.diffusion_pos_embed_learned[0, of_image[step]]
            z_cond, z_uncond = (model.decoder_norm(h[now]) + position_embedding for h in (h_cond, h_uncond))

            chosen, most = [], count
            if method.detailed_tokens is not None and step >= last_stage and not solver:
                chosen = detailed_ones(z_cond, method.detailed_tokens.share)
                most = max(count, method.detailed_tokens.num_sampling_steps)
            others = [token for token in range(num_predicted) if token not in chosen]
            for part, num_steps in (chosen, most), (others, count):
                if part:
                    conditions = z_cond[part], z_uncond[part]
                    schedule = SolverSteps(num_steps, solver.rule) if solver else Schedule(num_steps, first_timestep)
                    draws, places = drawn[:, image, part], [of_image[step][token] for token in part]
                    made = denoise(model.diffloss.net, *conditions, draws, schedule, scale, temperature, cache)
                    tokens[image, places] = made
    return torch.stack([image_of_tokens(model, row) for row in tokens])
