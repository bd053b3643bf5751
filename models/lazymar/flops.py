"""FLOPs of sampling an image, by a formula: two per multiply-add of each matmul. A test compares it with PyTorch's
counter."""

from collections import Counter
from typing import NamedTuple

from models.diffloss import NUM_FREQUENCIES
from models.lazymar.plan import DenoisingKind, HeadPlan, Plan, Step
from models.mar import MAR, Block


class Flops(NamedTuple):
    """FLOPs per image, by part."""

    encoder: int
    decoder: int
    head: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self)


def plan_flops(model: MAR, plan: Plan) -> Flops:
    """Return the FLOPs of sampling one image by a plan. `model` may be on any device, "meta" too."""
    width, head_width = model.mask_token.shape[-1], model.diffloss.net.input_proj.out_features
    timesteps = sum(len(head_plan.kinds) for head_plan in plan.distinct_head_plans)
    # Computed once: the first decoder block's projections of masked tokens, and the embeddings of the timesteps.
    once_in_decoder = 2 * model.seq_len * width * 3 * width
    once_in_head = 2 * timesteps * head_width * (2 * NUM_FREQUENCIES + head_width)
    return Flops(
        encoder=sum(encoder_flops(model, step) for step in plan),
        decoder=once_in_decoder + sum(decoder_flops(model, plan, step) for step in plan),
        head=once_in_head + sum(head_flops(model, step) for step in plan),
    )


def block_flops(block: Block, projected: int, queries: int, keys: int) -> int:
    """FLOPs of a transformer block: `projected` rows get queries, keys and values, `queries` of them are finished by
    attending to `keys` rows."""
    width, mlp_width = block.attn.proj.in_features, block.mlp.fc1.weight.shape[0]
    attention = 2 * queries * keys * 2 * width
    return 2 * projected * width * 3 * width + attention + 2 * queries * width * (width + 2 * mlp_width)


def encoder_flops(model: MAR, step: Step) -> int:
    """FLOPs of a step in the encoder."""
    new, known = step.encoded.stop - step.encoded.start, model.buffer_size + step.start
    rows = model.buffer_size + new
    blocks = sum(block_flops(block, rows, rows, known) for block in model.encoder_blocks)
    return step.transformer_branches * (2 * new * model.token_dim * model.fake_latent.shape[-1] + blocks)


def decoder_flops(model: MAR, plan: Plan, step: Step) -> int:
    """FLOPs of a step in the decoder."""
    changed = model.buffer_size + step.encoded.stop - step.encoded.start
    total = 2 * changed * model.decoder_embed.in_features * model.decoder_embed.out_features
    rows, last = plan.num_rows, len(model.decoder_blocks) - 1
    for number, block in enumerate(model.decoder_blocks):
        projected = changed if number == 0 else rows
        if number == last:
            rows = step.output_stop - step.start
        elif plan.policy.token_cache and number == plan.policy.prune_layer:
            rows = step.num_recomputed
        total += block_flops(block, projected, rows, plan.num_rows)
    return step.transformer_branches * total


def head_flops(model: MAR, step: Step) -> int:
    """FLOPs of a step in the diffusion head."""
    return sum(num_tokens * chain_flops(model, head_plan) for head_plan, num_tokens in step.head_plans)


def chain_flops(model: MAR, plan: HeadPlan) -> int:
    """FLOPs of a denoising chain for one token."""
    net = model.diffloss.net
    width, depth = net.input_proj.out_features, len(net.res_blocks)
    computed = sum(number not in plan.skipped_blocks for number in range(depth))
    block = 2 * width * 3 * width + 2 * 2 * width * width  # modulation, then the MLP's two layers
    gate = 2 * width * width
    first_layer = 2 * model.token_dim * width  # both branches share it
    last_layer = 2 * width * (2 * width + 2 * model.token_dim)  # modulation and linear map of the last layer
    per_step = {
        DenoisingKind.FULL: plan.num_branches * (depth * block + last_layer) + first_layer,
        DenoisingKind.WARMUP: computed * block + last_layer + first_layer,
        DenoisingKind.REUSE: computed * gate + last_layer + first_layer,
    }
    steps = sum(count * per_step[kind] for kind, count in Counter(plan.kinds).items())
    return plan.num_branches * 2 * net.cond_embed.in_features * width + steps
