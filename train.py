"""Train a small MAR, on Fashion-MNIST or on a folder of images with a subfolder for each class.

A training that was stopped continues when the same command is given again. It ends by writing the weights as
safetensors. docs/training.md gives the reasons.
"""

import argparse
import gzip
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from diffusion.loss import hybrid_loss
from diffusion.schedule import NUM_TRAIN_STEPS
from models import MAR, PRESETS, create_model
from models.presets import MAR_MODELS
from util.cli import Parser, number
from util.errors import InputError, describe_differences, exits_cleanly, why_unreadable
from util.files import atomic_write, file_digest
from util.machine import choose_device, mixed_precision
from util.weights import find_weights, load_weights, save_safetensors

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
BETAS = (0.9, 0.95)  # of AdamW
SAVE_EVERY = 100  # steps
WARMUP = 100  # steps
MAX_GRADIENT_NORM = 3.0
LABEL_DROPOUT = 0.1  # share of images that are trained without their class (MAR paper)
FIRST_EVERY, FINISH_FIRST_EVERY = 16, 4  # one in so many tokens is trained at the first timestep of sampling
FIRST_WEIGHT = 300.0  # weight of the noise-prediction error at that timestep
FINISH_CONDITION_NOISE = 0.5  # standard deviation of the noise in the conditions at that timestep
QUERY_KEY_SCALE = 1.2  # of the initial weights; a larger scale makes a row attend to fewer and closer rows
OUTPUT_SCALE = 0.4  # initial scale of what attention adds to a row


class TrainedMAR(nn.Module):
    """A MAR and what only its training needs: a linear readout from conditions to tokens, and the draws of a step."""

    def __init__(self, network: MAR) -> None:
        super().__init__()
        self.network = network
        self.readout = nn.Linear(network.mask_token.shape[-1], network.token_dim)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def make_optimizers(self) -> list[Optimizer]:
        """Make AdamW, and Muon for the matrices of the transformer's blocks."""
        blocks = nn.ModuleList([*self.network.encoder_blocks, *self.network.decoder_blocks])
        matrices = [parameter for parameter in blocks.parameters() if parameter.ndim == 2]
        slow = list(self.network.diffloss.net.final_layer.linear.parameters())  # see diffusion_loss
        taken = {id(parameter) for parameter in matrices + slow}
        others = [parameter for parameter in self.parameters() if id(parameter) not in taken]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": slow, "lr_factor": 0.1}]
        # With this adjust_lr_fn an entry changes as much in a step as with AdamW, so that they share a learning rate.
        muon = torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        return [AdamW(groups, betas=BETAS, weight_decay=0.0), muon]

    def forward(
        self, mean: Tensor, std: Tensor, labels: Tensor, posterior_noise: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict masked tokens from the others, in random orders; some images have no class.

        The tokens get only the share `posterior_noise` of the noise of their posteriors, whose `mean` and `std` are
        [B, L, C]: all of it would hide what a token tells about its neighbours. The `labels` are [B].

        Returns the mean squared error of a linear readout of the conditions that predicts `mean`, the masked tokens
        [B, m, C], and their conditions [B, m, D].
        """
        positions = torch.rand(mean.shape[:2], generator=generator, device=mean.device).argsort(dim=1)
        tokens = mean + std * posterior_noise * torch.randn(mean.shape, generator=generator, device=mean.device)
        mean, tokens = (x.gather(1, positions[..., None].expand_as(x)) for x in (mean, tokens))
        # As many are masked as are unknown at a random time of sampling (the MAR paper: 70 % and more). A small model
        # predicts worse from contexts of a kind that it has not seen, and one bad prediction makes a token diverge.
        time, num_tokens = torch.rand((), generator=generator, device=mean.device).item(), mean.shape[1]
        num_known = min(math.floor(num_tokens * (1 - math.cos(math.pi / 2 * time))), num_tokens - 1)
        no_class = torch.rand(len(mean), 1, generator=generator, device=mean.device) < LABEL_DROPOUT
        class_embedding = torch.where(no_class, self.network.fake_latent, self.network.class_emb(labels))
        conditions = self.network(class_embedding, tokens[:, :num_known], positions)
        error = (self.readout(conditions).float() - mean[:, num_known:]).square().mean()
        return error, tokens[:, num_known:], conditions

    def diffusion_loss(self, tokens: Tensor, conditions: Tensor, generator: torch.Generator, finish: bool) -> Tensor:
        """Compute the head's loss on `tokens` [N, C] with their `conditions` [N, D].

        The timestep at which sampling starts is trained more often, because the first denoising step multiplies the
        head's error by up to 316. The input of the head's last layer is nearly constant at that timestep, so that the
        layer's weights would move together; they learn at a tenth of the learning rate. In the finish, noise in the
        conditions at that timestep teaches the head not to rely on them there.
        """
        device = tokens.device
        timesteps = (torch.rand(len(tokens), generator=generator, device=device) * NUM_TRAIN_STEPS).long()
        timesteps[:: FINISH_FIRST_EVERY if finish else FIRST_EVERY] = NUM_TRAIN_STEPS - 1
        at_first = timesteps == NUM_TRAIN_STEPS - 1
        noise = torch.randn(tokens.shape, generator=generator, device=device)
        if finish:
            disturbance = torch.randn(conditions.shape, generator=generator, device=device)
            conditions = conditions + FINISH_CONDITION_NOISE * at_first[:, None] * disturbance
        squared_error, bound = hybrid_loss(self.network.diffloss.net, tokens, conditions, timesteps, noise)
        return (torch.where(at_first, FIRST_WEIGHT, 1.0) * squared_error + bound).mean()


@torch.no_grad()
def initialize_with_neighbours(model: MAR) -> None:
    """Set the initial weights in place so that tokens attend to their neighbours, with PyTorch's global generator.

    A transformer with random weights spends much of a short training on learning which positions are close. "Mimetic
    initialization" (Trockman and Kolter, arXiv 2305.09828), here on a grid of tokens, gives it that knowledge.
    """
    for embedding in (model.encoder_pos_embed_learned, model.decoder_pos_embed_learned):
        embedding[0, model.buffer_size :] = grid_sinusoids(model.grid_size, embedding.shape[-1])
    for attention in [block.attn for block in [*model.encoder_blocks, *model.decoder_blocks]]:
        # Queries and keys become the same random projection of a row, and values a rotation that the output reverts.
        queries, keys, values = attention.qkv.weight.chunk(3)
        for query, key in zip(queries.chunk(attention.num_heads), keys.chunk(attention.num_heads), strict=True):
            projection = QUERY_KEY_SCALE * nn.init.orthogonal_(torch.empty(query.shape))
            query.copy_(projection + 0.02 * torch.randn(query.shape))
            key.copy_(projection + 0.02 * torch.randn(query.shape))
        rotation = nn.init.orthogonal_(torch.empty(values.shape))
        values.copy_(rotation)
        attention.proj.weight.copy_(OUTPUT_SCALE * rotation.T)


def grid_sinusoids(size: int, width: int) -> Tensor:
    """Compute sines and cosines of row and column with geometric wavelengths: [size * size, width]; 4 divides width."""
    count = width // 4
    wavelengths = 2.0 * 16.0 ** (torch.arange(count) / (count - 1))  # 2 to 32 tokens
    angles = 2 * math.pi * torch.arange(size)[:, None] / wavelengths
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [size, width / 2]
    return torch.cat([line[:, None].expand(-1, size, -1), line.expand(size, -1, -1)], dim=2).flatten(0, 1)


def train(args: argparse.Namespace) -> None:
    """Train MAR in three phases, each from the averaged weights of the one before.

    1. **Context**: the transformer alone learns to predict unknown tokens from known ones by regression, whose gradient
       is clean where the diffusion loss's is noisy. It starts with attention to neighbours.
    2. **Diffusion**: the head learns to generate tokens, and the regression continues beside it.
    3. **Finish**: the same at a third of the learning rate, with the first denoising step four times as often.

    With `--start_from`, the weights of an earlier training replace the first phase.
    """
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"train.py needs PyTorch 2.9 or later, for torch.optim.Muon: update {torch.__version__}")
    preset, device = PRESETS[args.model], choose_device(args.device)
    images, labels = load_images(args.data, preset.architecture["img_size"], args.fashion_mnist)
    torch.manual_seed(args.seed)
    model = create_model(args.model)
    if labels.max() >= model.class_num:
        raise InputError(f"--data {args.data} has {labels.max() + 1} classes, but {args.model} has {model.class_num}")
    vae = preset.make_vae().to(device).requires_grad_(False).eval()
    load_weights(vae, args.vae_path or preset.vae_path, what="the VAE", ignore_prefixes=["loss."])
    if args.start_from:
        load_weights(model, args.start_from, what=args.model)
        file = find_weights(args.start_from, args.model)
        seed, context_steps = int(file_digest(file)[:7], 16), 0  # the batches are not those of the earlier training
    else:
        initialize_with_neighbours(model)
        seed, context_steps = 0, args.context_steps
    trained = TrainedMAR(model).to(device)

    def loss(generator: torch.Generator, *, with_head: bool = True, finish: bool = False) -> Tensor:
        chosen = torch.randint(len(images), (args.batch_size,), generator=generator, device=device).cpu()
        x = images[chosen].to(device).float() / 127.5 - 1
        with mixed_precision(device):
            mean, std = (model.patchify(preset.latent_scale * moment.float()) for moment in vae.posterior(x))
            error, *masked = trained(mean, std, labels[chosen].to(device), args.posterior_noise, generator)
            if not with_head:
                return error
            rows = torch.arange(args.head_tokens, device=device) % masked[0].shape[1]  # repeats tokens if there are few
            tokens, conditions = (x[:, rows].flatten(0, 1) for x in masked)
            return error + trained.diffusion_loss(tokens, conditions, generator, finish)

    phases: list[tuple[str, Callable, int, float, float]] = [
        ("context", partial(loss, with_head=False), context_steps, args.context_lr, 0.999),
        ("diffusion", loss, args.steps, args.lr, 0.999),
        ("finish", partial(loss, finish=True), args.finish_steps, args.lr / 3, 0.99),
    ]
    for name, phase_loss, steps, lr, ema_decay in phases:
        fit(trained, trained.make_optimizers(), phase_loss, args, name, steps, lr, ema_decay, seed)
        seed += steps
    save_safetensors(model.state_dict(), args.output_dir / "checkpoint-last.safetensors", {"weights": "EMA"})


def fit(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    loss: Callable[[torch.Generator], Tensor],
    args: argparse.Namespace,
    name: str,
    steps: int,
    lr: float,
    ema_decay: float = 0.999,
    first_seed: int = 0,
) -> None:
    """Train `module` in place. It ends in eval mode, with an exponential moving average of its weights.

    The learning rate rises to `lr` in the first steps, and falls to 0 along a cosine.

    Args:
        optimizers: new ones. A group of parameters may have an `lr_factor`.
        loss:       computes the loss of a step. It must draw all random numbers from the given generator, which is
                    seeded with the number of the step, so that a resumed training sees the same batches.
        args:       the training's flags. They are saved and compared.
        name:       the training is saved as `name`.pth in `--output_dir`; the same call continues from it.
        first_seed: seed of the first step. A CPU generator uses the lowest 32 bits only.

    Raises InputError if the file holds a training with other flags, or the loss is not finite.
    """
    path = args.output_dir / f"{name}.pth"
    settings = {flag: str(value) for flag, value in vars(args).items() if flag not in ("output_dir", "device")}

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        """Update an averaged parameter. The decay starts low, so that the initial weights are soon forgotten."""
        return averaged.lerp(current, 1 - min(ema_decay, (1 + int(count)) / (10 + int(count))))

    ema = AveragedModel(module, avg_fn=average)
    parts: list[Any] = [ema, module, *optimizers]
    done = _load(parts, path, settings)
    generator = torch.Generator(next(module.parameters()).device)
    progress = tqdm(range(done, steps), name, total=steps, initial=done, unit="step", mininterval=10)
    module.train()
    for step in progress:
        step_lr = lr * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = step_lr * group.get("lr_factor", 1.0)
        error = loss(generator.manual_seed(first_seed + step))
        progress.set_postfix(loss=f"{error.item():.4f}", refresh=False)
        if not error.isfinite():
            raise InputError(f"the loss became {error.item()}: lower the learning rate, in another --output_dir")
        module.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(module.parameters(), MAX_GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
        ema.update_parameters(module)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {"step": step + 1, "settings": settings, "parts": [part.state_dict() for part in parts]}
            with atomic_write(path) as partial:
                torch.save(state, partial)
    module.load_state_dict(ema.module.state_dict())
    module.eval()


def _load(parts: Sequence[Any], path: Path, settings: Mapping[str, str]) -> int:
    """Load a saved training into `parts`, if there is one; return its number of steps."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise InputError(f"{path} is damaged ({why_unreadable(error)}): remove it to start again") from None
    if differences := describe_differences(state["settings"], settings):
        raise InputError(f"{path}: {', '.join(differences)}: give the same flags, or another --output_dir")
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    return state["step"]


def load_images(data: str, size: int, fashion_mnist: Path) -> tuple[Tensor, Tensor]:
    """Load images [N, 3, size, size] uint8 and their classes [N].

    `data` is "fashion-mnist", whose files are in the folder `fashion_mnist`, or a folder with a subfolder for each
    class; its images are cropped to squares and resized. Raises InputError for no images or one that is unreadable.
    """
    if data == "fashion-mnist":
        if size != 32:
            raise InputError(f"--data fashion-mnist has 32 x 32 images, but the model's are {size} x {size}")
        return _load_fashion_mnist(fashion_mnist)
    files = sorted(Path(data).glob("[!.]*/[!.]*"))
    if not files:
        raise InputError(f"--data {data}: no such folder, or no subfolders with images (one for each class) in it")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for image, path in zip(images, tqdm(files, desc=f"reading {data}"), strict=True):
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "GIF")) as opened:
                square = ImageOps.fit(opened.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        except Exception as error:  # a damaged file can fail anywhere in the reader
            raise InputError(f"{path} cannot be read as an image ({error}): remove it from --data") from None
        image[:] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    _, labels = np.unique([path.parent.name for path in files], return_inverse=True)
    return images, torch.from_numpy(labels)


def _load_fashion_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Load the training images of Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), with a black border of 2 pixels."""
    files = [folder / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    try:
        pixels, classes = (bytearray(gzip.decompress(file.read_bytes())) for file in files)
        images = torch.frombuffer(pixels, dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)
        labels = torch.frombuffer(classes, dtype=torch.uint8, offset=8).long()
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise InputError(
            f"Fashion-MNIST cannot be read from {folder} ({error}): install Debian's package dataset-fashion-mnist, or "
            "give the folder of Fashion-MNIST's .gz files with --fashion_mnist"
        ) from None
    return F.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1), labels


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    count, natural, positive = number(int, 1), number(int, 0, 2**63 - 1), number(float, 1e-9)
    add = parser.add_argument
    add("--model", choices=sorted(MAR_MODELS), default="mar_tiny", help="model to train")
    add("--data", default="fashion-mnist", help="fashion-mnist, or a folder with a subfolder for each class")
    add("--fashion_mnist", type=Path, default=FASHION_MNIST, help="folder with Fashion-MNIST's .gz files")
    add("--output_dir", type=Path, default=Path("output/train_mar"), help="folder of the training and its weights")
    add("--vae_path", metavar="FILE", help="weights of the VAE (default: the model's)")
    add("--start_from", metavar="FILE", help="weights of an earlier training, instead of the context phase")
    add("--context_steps", type=natural, default=1000, help="first steps, without the head")
    add("--context_lr", type=positive, default=2e-3, help="learning rate of the first steps")
    add("--steps", type=count, default=3400, help="steps with the head")
    add("--lr", type=positive, default=1.5e-3, help="learning rate of the steps with the head")
    add("--finish_steps", type=natural, default=400, help="last steps, at a third of the learning rate")
    add("--batch_size", type=count, default=32, help="images in each step")
    add("--posterior_noise", type=number(float, 0, 1), default=0.3, help="share of the VAE's noise in the latents")
    add("--head_tokens", type=count, default=128, help="tokens of an image that train the diffusion head in one step")
    add("--seed", type=natural, default=0, help="seed of the initial weights; batches do not depend on it")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    sys.exit(main())
