"""Train a small MAR and what it needs: `python train.py vae`, `python train.py mar`, `python train.py classifier`.

Each continues where it was stopped when called again, and ends by writing the averaged weights as safetensors.
Another model needs an entry in `models/presets.py` and a folder of images, one subfolder per class. The shipped
`mar_tiny` was made by these three commands.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion.loss import HybridLoss
from diffusion.schedule import NUM_TRAIN_STEPS
from models import MAR, PRESETS, AutoencoderKL, create_model
from models.presets import Preset
from util.cli import Parser
from util.errors import InputError, exits_cleanly
from util.machine import ROOT, choose_device, mixed_precision
from util.runs.options import Options
from util.scoring.classifier import CLASSIFIER_PATH
from util.scoring.scores import Statistics, load_extractor
from util.training.classifier import train_classifier
from util.training.fashion import FASHION_MNIST_FOLDER, load_fashion_mnist
from util.training.loop import fit
from util.weights.checkpoint import load_weights, save_safetensors

LABEL_DROPOUT = 0.1  # share of images trained without their class (MAR paper)
FIRST_EVERY, FIRST_WEIGHT = 16, 300.0  # one timestep in 16 is where sampling starts, with this weight of its error
FINISH_FIRST_EVERY, FINISH_CONDITION_NOISE = 4, 0.5  # in the end one in 4, and there with noise in the conditions


def load_images(data: str, size: int, fashion_mnist: Path) -> tuple[Tensor, Tensor]:
    """Load images [N, 3, size, size] uint8, cropped to squares, and their labels [N].

    `data` is a folder with a subfolder per class, or "fashion-mnist", whose files are in the folder `fashion_mnist`.
    Raises InputError if there are no images, or one cannot be read.
    """
    if data == "fashion-mnist":
        if size != 32:
            raise InputError(f"--data fashion-mnist has 32 x 32 images, but the model's are {size} x {size}")
        return load_fashion_mnist(fashion_mnist)
    classes = sorted(path for path in Path(data).glob("*") if path.is_dir())
    if not classes:
        raise InputError(f"--data {data}: no such folder, or no subfolders (one per class) in it")
    images, labels = [], []
    for label, folder in enumerate(classes):
        for path in tqdm(sorted(folder.iterdir()), desc=folder.name):
            try:
                image = Image.open(path).convert("RGB")
            except OSError:
                raise InputError(f"{path} is not a readable image: remove it from --data") from None
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
            images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def to_float(images: Tensor) -> Tensor:
    """Scale uint8 pixels to [-1, 1]."""
    return images.float() / 127.5 - 1


# The VAE


def train_vae(args: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    """Train the VAE: minimise the reconstruction error, as a Gaussian of `--pixel_std` weighs it, plus the KL term."""
    images, _ = load_images(args.data, preset.architecture.get("img_size", 256), args.fashion_mnist)
    images = images.to(device)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(**preset.vae).to(device)

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (args.batch_size,), generator=generator, device=device)
        x = random_flip(to_float(images[chosen]), generator)
        with mixed_precision(device):
            posterior = vae.encode(x)
            decoded = vae.decode(posterior.sample(generator)).float()
        error = (decoded - x).square().sum(dim=(1, 2, 3)) / (2 * args.pixel_std**2)
        return (error + posterior.kl()).mean() / x[0].numel()

    average = fit(vae, loss, folder=args.output_dir, steps=args.steps, lr=args.lr, weight_decay=0.0, device=device)
    mse, std = vae_report(average, to_float(images[:2000]))
    print(f"reconstruction: {10 * np.log10(4 / mse):.2f} dB PSNR; standard deviation of latents: {std:.3f}")
    set_latent_std(average, std, 1 / MAR.latent_scale)
    save_safetensors(average.state_dict(), args.output_dir / "vae.safetensors", {})


def random_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    flip = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    return torch.where(flip, x.flip(3), x)


@torch.inference_mode()
def vae_report(vae: AutoencoderKL, images: Tensor) -> tuple[float, float]:
    """Compute the mean squared error of reconstructed `images`, and the standard deviation of their drawn latents."""
    errors, latents = [], []
    for x in images.split(100):
        posterior = vae.encode(x)
        errors.append((vae.decode(posterior.mean) - x).square().mean())
        latents.append(posterior.sample(torch.Generator(x.device).manual_seed(0)))
    return torch.stack(errors).mean().item(), torch.cat(latents).std().item()


@torch.no_grad()
def set_latent_std(vae: AutoencoderKL, old: float, new: float) -> None:
    """Rescale the latents in the two 1 x 1 convolutions around them, so that every model shares one latent scale."""
    factor, z, (weight, bias) = new / old, vae.embed_dim, vae.quant_conv.parameters()
    weight[:z] *= factor
    bias[:z] *= factor
    bias[z:] += 2 * np.log(factor)
    vae.post_quant_conv.weight /= factor


# MAR


def train_mar(args: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    """Train MAR: predict masked tokens of the VAE's latents (MAR paper, section 4), in the end as sampling meets them.

    The timestep at which sampling starts gets more than its share of the training, because the first denoising step
    multiplies the head's error by up to 316. The input of the head's last layer is nearly constant at that timestep, so
    the layer's weights would move together; they learn at a tenth of the rate.

    With mask ratios of 70 % and more, as in the paper, the model never sees contexts like those of sampling's second
    half. A small model that was trained on few images predicts worse there, and a single bad prediction at the first
    timestep makes a token diverge. So the last training steps mask any number of tokens, and disturb the conditions at
    the first timestep, which teaches the head not to rely on them there.
    """
    images, labels = load_images(args.data, preset.architecture.get("img_size", 256), args.fashion_mnist)
    torch.manual_seed(args.seed)
    model = create_model(args.model).to(device)
    if labels.max() >= model.class_num:
        raise InputError(f"--data {args.data} has {labels.max() + 1} classes, but {args.model} has {model.class_num}")
    vae = AutoencoderKL(**preset.vae)
    load_weights(vae, args.vae_path or ROOT / preset.vae_path, what="the VAE")
    moments = encode_images(vae.to(device).eval(), images).to(device) * model.latent_scale
    labels = labels.to(device)
    head_loss = HybridLoss(device)
    num_images, num_tokens = args.batch_size, model.seq_len

    def uniform(generator: torch.Generator, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def loss(network: MAR, finishing: bool, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(labels), (num_images,), generator=generator, device=device)
        mean, std = moments[chosen].float().chunk(2, dim=1)
        latents = mean + std * torch.randn(mean.shape, generator=generator, device=device)
        positions = uniform(generator, num_images, num_tokens).argsort(dim=1)
        num_masked = masked_tokens(num_tokens, generator)
        if finishing:
            num_masked = int(torch.randint(1, num_tokens + 1, (), generator=generator, device=device))
        num_known = num_tokens - num_masked
        tokens = model.patchify(latents).gather(1, positions[..., None].expand(-1, -1, model.token_dim))
        no_class = uniform(generator, num_images, 1) < LABEL_DROPOUT
        class_embedding = torch.where(no_class, network.fake_latent, network.class_emb(labels[chosen]))
        # A fixed number of tokens goes to the head whatever the mask ratio: fewer masked ones repeat more often.
        rows = torch.arange(args.head_tokens, device=device) % num_masked
        targets = tokens[:, num_known:][:, rows].flatten(0, 1)
        timesteps = (uniform(generator, len(targets)) * NUM_TRAIN_STEPS).long()
        timesteps[:: FINISH_FIRST_EVERY if finishing else FIRST_EVERY] = NUM_TRAIN_STEPS - 1
        at_first = timesteps == NUM_TRAIN_STEPS - 1
        noise = torch.randn(targets.shape, generator=generator, device=device)
        with mixed_precision(device):
            conditions = network(class_embedding, tokens[:, :num_known], positions)[:, rows].flatten(0, 1)
            if finishing:
                disturbance = torch.randn(conditions.shape, generator=generator, device=device)
                conditions = conditions + FINISH_CONDITION_NOISE * at_first[:, None] * disturbance
            squared_error, bound = head_loss(network.diffloss.net, targets, conditions, timesteps, noise)
        return (torch.where(at_first, FIRST_WEIGHT, 1.0) * squared_error + bound).mean()

    def train(network: MAR, finishing: bool, folder: Path, steps: int, lr: float, ema_decay: float) -> MAR:
        return fit(
            network,
            partial(loss, network, finishing),
            folder=folder,
            steps=steps,
            lr=lr,
            no_weight_decay=["diffloss.", "class_emb.", "fake_latent", "mask_token", "encoder_pos", "decoder_pos"],
            slow=["diffloss.net.final_layer.linear."],
            ema_decay=ema_decay,
            device=device,
        )

    average = train(model, False, args.output_dir, args.steps, args.lr, 0.999)
    average = train(
        average.requires_grad_(True), True, args.output_dir / "finish", args.finish_steps, args.lr / 3, 0.99
    )
    save_safetensors(average.state_dict(), args.output_dir / "checkpoint-last.safetensors", {"weights": "ema"})


@torch.inference_mode()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images to the mean and standard deviation of their latents: [N, 2C, h, w], float16, on the CPU."""
    device = vae.quant_conv.weight.device
    moments = []
    for batch in tqdm(images.split(250), desc="encoding", mininterval=10):
        with mixed_precision(device):
            posterior = vae.encode(to_float(batch.to(device)))
        moments.append(torch.cat([posterior.mean, torch.exp(0.5 * posterior.logvar)], dim=1).half().cpu())
    return torch.cat(moments)


def masked_tokens(num_tokens: int, generator: torch.Generator) -> int:
    """Draw how many tokens to mask: a ratio from N(1, 0.25) truncated to [0.7, 1], of `num_tokens`, rounded up."""
    below, above = (0.5 * (1 + torch.erf(torch.tensor(z / 0.25 / 2**0.5))) for z in (-0.3, 0.0))
    quantile = below + (above - below) * torch.rand((), generator=generator, device=generator.device).cpu()
    ratio = 1 + 0.25 * 2**0.5 * torch.erfinv(2 * quantile - 1).item()
    return max(1, int(np.ceil(num_tokens * min(ratio, 1.0))))


# The classifier that FID and IS of the small model are measured with


def train_scorer(args: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    """Train the Fashion-MNIST classifier behind mar_tiny's FID and IS, and write the training images' statistics."""
    if args.data != "fashion-mnist":
        raise InputError(f"--data {args.data}: the classifier is Fashion-MNIST's alone; leave the flag out")
    train_classifier(
        args.output_dir,
        data_folder=args.fashion_mnist,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        device=device,
        seed=args.seed,
    )
    extractor = load_extractor("fashion", args.output_dir / CLASSIFIER_PATH.name, device)
    images, _ = load_images(args.data, 32, args.fashion_mnist)
    features = torch.cat([extractor(batch)[0].cpu() for batch in images.split(500)])
    Statistics.from_features(features).save(args.output_dir / Path(preset.statistics_path).name)


# Command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)

    def stage(name: str, run: Callable, what: str, steps: int, batch_size: int, lr: float) -> Parser:
        sub = stages.add_parser(name, help=what, description=f"{what[0].upper() + what[1:]}.")
        sub.add("--model", str, "model whose architecture is trained", default="mar_tiny", choices=sorted(PRESETS))
        sub.add("--data", str, "fashion-mnist, or a folder of images with a subfolder for each class",
                default="fashion-mnist", metavar="FOLDER")  # fmt: skip
        sub.add("--fashion_mnist", Path, "folder of Fashion-MNIST's four .gz files, by default where Debian's package "
                "puts them", default=FASHION_MNIST_FOLDER, metavar="FOLDER")  # fmt: skip
        sub.add("--output_dir", Path, "folder of checkpoints and weights", default=Path("output") / f"train_{name}",
                metavar="FOLDER")  # fmt: skip
        sub.add("--steps", int, "optimizer steps", default=steps, minimum=1)
        sub.add("--batch_size", int, "images in each step", default=batch_size, minimum=1)
        sub.add("--lr", float, "learning rate", default=lr, above=0)
        sub.add("--seed", int, "seed of weights and batches", default=0, minimum=0, maximum=2**32 - 1)
        sub.add_fields(Options, "device")
        sub.set_defaults(run=run)
        return sub

    vae = stage("vae", train_vae, "train the VAE", steps=2500, batch_size=32, lr=1e-3)
    vae.add("--pixel_std", float, "standard deviation of a pixel; larger: smoother latents, blurrier images",
            default=0.08, above=0)  # fmt: skip
    mar = stage("mar", train_mar, "train MAR on the latents of a trained VAE", steps=5500, batch_size=32, lr=1e-3)
    mar.add("--vae_path", str, "the trained VAE's weights", metavar="FILE", default_text="the model's")
    mar.add("--finish_steps", int, "further steps, in which any number of tokens is masked", default=700, minimum=1)
    mar.add("--head_tokens", int, "tokens of an image that train the diffusion head in a step", default=128, minimum=1)
    what = "train the Fashion-MNIST classifier behind FID and Inception Score of mar_tiny"
    stage("classifier", train_scorer, what, steps=2400, batch_size=250, lr=4e-3)
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.run(args, PRESETS[args.model], choose_device(args.device))


if __name__ == "__main__":
    sys.exit(main())
