"""Train a small MAR and what it needs: `python train.py vae`, `python train.py mar`, `python train.py classifier`.

Each continues where it was stopped when called again, and ends by writing the averaged weights as safetensors.
Another model needs an entry in `models/presets.py` and a folder of images, one subfolder per class. docs/training.md
tells what each stage is for, and what did not help.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from diffusion.loss import HybridLoss
from diffusion.schedule import NUM_TRAIN_STEPS
from models import MAR, PRESETS, AutoencoderKL, create_model
from models.presets import Preset
from util.cli import Parser
from util.errors import InputError, exits_cleanly
from util.files import atomic_write, check_writable, file_digest
from util.machine import ROOT, choose_device, mixed_precision
from util.runs.options import Options
from util.scoring.classifier import CLASSIFIER_PATH
from util.scoring.scores import Statistics, load_extractor
from util.training.classifier import train_classifier
from util.training.fashion import FASHION_MNIST_FOLDER, load_fashion_mnist
from util.training.initialization import initialize_with_neighbours
from util.training.loop import fit
from util.training.probe import ContextProbe
from util.weights.checkpoint import LoadedWeights, find_weights, load_weights, save_safetensors

LABEL_DROPOUT = 0.1  # share of images trained without their class (MAR paper)
FIRST_EVERY, FIRST_WEIGHT = 16, 300.0  # one timestep in 16 is where sampling starts, with this weight of its error
FINISH_FIRST_EVERY, FINISH_CONDITION_NOISE = 4, 0.5  # in the finish one in 4, and there with noise in the conditions
NO_WEIGHT_DECAY = ("diffloss.", "class_emb.", "fake_latent", "mask_token", "encoder_pos", "decoder_pos")
REPORT_IMAGES = 2000  # images that the VAE's reconstruction and the scale of its latents are measured on
HELD_OUT = 300  # images that MAR is not trained on, for the context probe


def load_images(data: str, size: int, fashion_mnist: Path) -> tuple[Tensor, Tensor]:
    """Load images [N, 3, size, size] uint8, cropped to squares, and their labels [N].

    `data` is a folder with a subfolder per class, or "fashion-mnist", whose files are in the folder `fashion_mnist`.
    Raises InputError if there are no images, or one cannot be read.
    """
    if data == "fashion-mnist":
        if size != 32:
            raise InputError(f"--data fashion-mnist has 32 x 32 images, but the model's are {size} x {size}")
        return load_fashion_mnist(fashion_mnist)
    classes = sorted(path for path in Path(data).glob("[!.]*") if path.is_dir())
    if not classes:
        raise InputError(f"--data {data}: no such folder, or no subfolders (one per class) in it")
    images, labels = [], []
    for label, folder in enumerate(classes):
        for path in tqdm(sorted(folder.iterdir()), desc=folder.name):
            try:
                image = Image.open(path).convert("RGB")
            except Exception:  # a damaged file can fail anywhere in the reader
                raise InputError(f"{path} is not a readable image: remove it from --data") from None
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
            images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
            labels.append(label)
    if not images:
        raise InputError(f"--data {data}: no images in its subfolders")
    return torch.stack(images), torch.tensor(labels)


def given(args: argparse.Namespace, *names: str) -> dict[str, int | float | str]:
    """Return flags and their values."""
    return {f"--{name}": getattr(args, name) for name in names}


def digest_of(*tensors: Tensor) -> str:
    """Return SHA-256 of the tensors' bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


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

    average = fit(
        vae,
        loss,
        folder=args.output_dir,
        steps=args.steps,
        lr=args.lr,
        weight_decay=0.0,
        settings={"sha256 of --data": digest_of(images)[:16], **given(args, "batch_size", "seed", "pixel_std")},
        device=device,
    )
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:REPORT_IMAGES]  # of all classes
    mse, std = vae_report(average, to_float(images[some.to(images.device)]))
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


class WithReadout(nn.Module):
    """A MAR in training, with the linear map from conditions to tokens that only the regression needs."""

    def __init__(self, network: MAR) -> None:
        super().__init__()
        self.network = network
        self.readout = nn.Linear(network.mask_token.shape[-1], network.token_dim)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)


class Batch(NamedTuple):
    """Images of one training step, their tokens in random orders, known ones first.

    labels:    classes [B].
    no_class:  [B, 1], true for images that are trained without their class.
    positions: [B, L] of the tokens.
    tokens:    [B, L, C], with noise of the VAE's posterior.
    means:     [B, L, C], the same tokens without noise.
    num_known: how many of the L tokens are known.
    """

    labels: Tensor
    no_class: Tensor
    positions: Tensor
    tokens: Tensor
    means: Tensor
    num_known: int


def train_mar(args: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    """Train MAR in three phases, each of which goes on from the averaged weights of the phase before.

    1. **context**: the transformer alone learns to predict unknown tokens from known ones (`regression_loss`). Its
       gradient is clean where the diffusion loss's is noisy, and the transformer learns from it in minutes to use the
       known tokens. It begins with attention to neighbours, so that it need not find out which positions are near.
    2. **diffusion**: the head learns to generate tokens, together with the transformer (`diffusion_loss`), whose
       regression goes on beside it.
    3. **finish**: the same at a third of the learning rate, with more training of the first denoising step.

    Muon trains the matrices of the transformer's blocks, AdamW all other parameters.

    With `--start_from`, the weights of an earlier training take the place of the first phase.
    """
    check_start(args.output_dir, args.start_from)
    images, labels = load_images(args.data, preset.architecture.get("img_size", 256), args.fashion_mnist)
    torch.manual_seed(args.seed)
    model = create_model(args.model)
    if labels.max() >= model.class_num:
        raise InputError(f"--data {args.data} has {labels.max() + 1} classes, but {args.model} has {model.class_num}")
    if args.start_from:
        steps_before = steps_trained(load_weights(model, args.start_from, what=args.model))
    else:
        initialize_with_neighbours(model)
        steps_before = args.context_steps
    trained = WithReadout(model).to(device)
    moments = load_latents(args, preset, images, device).to(device)
    labels = labels.to(device)
    held_out, training = split_images(len(labels), device)
    probe = make_probe(model, moments, labels, held_out, training)
    head_loss = HybridLoss(device)

    def loss(trained: WithReadout, phase: str, generator: torch.Generator) -> Tensor:
        chosen = training[torch.randint(len(training), (args.batch_size,), generator=generator, device=device)]
        batch = draw_batch(model, moments[chosen], labels[chosen], args.posterior_noise, generator)
        conditions, error = regression_loss(trained, batch)
        if phase == "context":
            return error
        targets = batch.tokens[:, batch.num_known :]
        rows = torch.arange(args.head_tokens, device=device) % targets.shape[1]  # few unknown tokens repeat
        return error + diffusion_loss(
            head_loss, trained.network, targets[:, rows], conditions[:, rows], phase == "finish", generator
        )

    def report(phase: str, step: int, average: WithReadout) -> None:
        if probe:
            probe(f"{phase}, step {step}", average.network)

    settings = given(args, "batch_size", "seed", "posterior_noise", "head_tokens")
    if args.start_from:
        settings["sha256 of --start_from"] = file_digest(find_weights(args.start_from, args.model))[:16]
    first_seeds = {"context": 0, "diffusion": steps_before, "finish": steps_before + args.steps}

    def train(trained: WithReadout, phase: str, flags: tuple[str, str], lr: float, ema_decay: float) -> WithReadout:
        trained.requires_grad_(True)
        trained.network.diffloss.requires_grad_(phase != "context")
        steps_flag, lr_flag = flags
        return fit(
            trained,
            partial(loss, trained, phase),
            folder=args.output_dir / phase,
            steps=getattr(args, steps_flag.lstrip("-")),
            lr=lr,
            no_weight_decay=[f"network.{name}" for name in NO_WEIGHT_DECAY],
            slow=["network.diffloss.net.final_layer.linear."],
            matrices=["network.encoder_blocks.", "network.decoder_blocks."],
            ema_decay=ema_decay,
            first_seed=first_seeds[phase],
            settings=settings,
            report=partial(report, phase),
            steps_flag=steps_flag,
            lr_flag=lr_flag,
            device=device,
        )

    if not args.start_from:
        trained = train(trained, "context", ("--context_steps", "--context_lr"), args.context_lr, 0.999)
    trained = train(trained, "diffusion", ("--steps", "--lr"), args.lr, 0.999)
    trained = train(trained, "finish", ("--finish_steps", "--lr"), args.lr / 3, 0.99)
    # One entry, as several would come in any order.
    metadata = {"weights": f"EMA after {first_seeds['finish'] + args.finish_steps} steps"}
    save_safetensors(trained.network.state_dict(), args.output_dir / "checkpoint-last.safetensors", metadata)


def check_start(folder: Path, start_from: str | None) -> None:
    """Raise InputError if a training in `folder` began in the other way, with `--start_from` or without."""
    began_anew, goes_on = (folder / "context").exists(), (folder / "diffusion").exists()
    if start_from and began_anew:
        raise InputError(f"{folder} is of a training without --start_from: leave it out, or take another --output_dir")
    if not start_from and goes_on and not began_anew:
        raise InputError(f"{folder} is of a training with --start_from: give it, or take another --output_dir")


def steps_trained(loaded: LoadedWeights) -> int:
    """Return the steps in which weights were trained, as their file says; 0 if it does not."""
    steps = re.search(r"(\d+) steps", loaded.metadata.get("weights", ""))
    return int(steps[1]) if steps else 0


def draw_batch(
    model: MAR, moments: Tensor, labels: Tensor, posterior_noise: float, generator: torch.Generator
) -> Batch:
    """Draw what is random about a training step of images with `moments` [B, 2C, h, w], see `encode_images`.

    The tokens get only the share `posterior_noise` of the posterior's noise: all of it would hide what a token tells
    about its neighbours.

    As many tokens are masked as at a random step of sampling, where the MAR paper masks 70 % and more: a small model
    that was trained on few images predicts worse from contexts of a kind that it has never met, and a single bad
    prediction at the first timestep makes a token diverge.
    """
    mean, std = (model.patchify(part) for part in moments.float().chunk(2, dim=1))  # [B, L, C]
    num_images, num_tokens, device = len(mean), mean.shape[1], mean.device
    positions = torch.rand(num_images, num_tokens, generator=generator, device=device).argsort(dim=1)
    noise = posterior_noise * torch.randn(mean.shape, generator=generator, device=device)
    means, tokens = (x.gather(1, positions[..., None].expand_as(x)) for x in (mean, mean + std * noise))
    num_masked = masked_tokens(num_tokens, generator)
    no_class = torch.rand(num_images, 1, generator=generator, device=device) < LABEL_DROPOUT
    return Batch(labels, no_class, positions, tokens, means, num_tokens - num_masked)


def masked_tokens(num_tokens: int, generator: torch.Generator) -> int:
    """Draw how many tokens to mask: as many as are unknown at a random moment of sampling's cosine schedule."""
    moment = torch.rand((), generator=generator, device=generator.device).item()
    return max(1, math.ceil(num_tokens * math.cos(math.pi / 2 * moment)))


def regression_loss(trained: WithReadout, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the conditions [B, L - num_known, D] of unknown tokens, and how well a linear readout of them predicts
    the tokens' means: the mean squared error."""
    network, num_known = trained.network, batch.num_known
    class_embedding = torch.where(batch.no_class, network.fake_latent, network.class_emb(batch.labels))
    with mixed_precision(batch.tokens.device):
        conditions = network(class_embedding, batch.tokens[:, :num_known], batch.positions)
        error = (trained.readout(conditions).float() - batch.means[:, num_known:]).square().mean()
    return conditions, error


def diffusion_loss(
    head_loss: HybridLoss,
    network: MAR,
    targets: Tensor,
    conditions: Tensor,
    finish: bool,
    generator: torch.Generator,
) -> Tensor:
    """Compute the head's loss on the unknown tokens `targets` [B, m, C], from their conditions [B, m, D].

    The timestep at which sampling starts gets more than its share of the training, because the first denoising step
    multiplies the head's error by up to 316. The input of the head's last layer is nearly constant at that timestep, so
    the layer's weights would move together; they learn at a tenth of the rate. In the finish the conditions are
    disturbed at that timestep, which teaches the head not to rely on them there.
    """
    device = targets.device
    targets, conditions = targets.flatten(0, 1), conditions.flatten(0, 1)
    timesteps = (torch.rand(len(targets), generator=generator, device=device) * NUM_TRAIN_STEPS).long()
    timesteps[:: FINISH_FIRST_EVERY if finish else FIRST_EVERY] = NUM_TRAIN_STEPS - 1
    at_first = timesteps == NUM_TRAIN_STEPS - 1
    noise = torch.randn(targets.shape, generator=generator, device=device)
    with mixed_precision(device):
        if finish:
            disturbance = torch.randn(conditions.shape, generator=generator, device=device)
            conditions = conditions + FINISH_CONDITION_NOISE * at_first[:, None] * disturbance
        squared_error, bound = head_loss(network.diffloss.net, targets, conditions, timesteps, noise)
    return (torch.where(at_first, FIRST_WEIGHT, 1.0) * squared_error + bound).mean()


def split_images(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Choose the images, by index, that are held out for the probe, at most a tenth; the others are trained on."""
    held_out = min(HELD_OUT, count // 10)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device)
    return order[:held_out], order[held_out:]


def make_probe(model: MAR, moments: Tensor, labels: Tensor, held_out: Tensor, training: Tensor) -> ContextProbe | None:
    """Make the probe of the images held out; None if there are none."""
    if not len(held_out):
        return None
    tokens, others = (model.patchify(moments[part].chunk(2, dim=1)[0].float()) for part in (held_out, training))
    return ContextProbe(others, labels[training], tokens, labels[held_out])


def load_latents(args: argparse.Namespace, preset: Preset, images: Tensor, device: torch.device) -> Tensor:
    """Encode images as `encode_images` does, and scale the result as the network's latents are: [N, 2C, h, w].

    Encoding takes minutes on a CPU, so the result is kept in `--output_dir`, with a digest of images and VAE. Raises
    InputError if what is kept there has another digest.
    """
    vae = AutoencoderKL(**preset.vae)
    load_weights(vae, args.vae_path or ROOT / preset.vae_path, what="the VAE")
    digest = digest_of(images, *vae.state_dict().values())
    path = args.output_dir / "latents.pt"
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        made_of, moments = kept["of"], kept["moments"]
    except Exception:  # there are none, or the file is damaged
        check_writable(path)
        moments = encode_images(vae.to(device).eval(), images) * MAR.latent_scale
        with atomic_write(path) as temporary:
            torch.save({"of": digest, "moments": moments}, temporary)
        return moments
    if made_of != digest:
        raise InputError(f"{path} holds latents of other images or of another VAE: choose another --output_dir")
    return moments


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
        sub.add(
            "--seed",
            int,
            "seed of the initial weights, on which the batches do not depend",
            default=0,
            minimum=0,
            maximum=2**32 - 1,
        )
        sub.add_fields(Options, "device")
        sub.set_defaults(run=run)
        return sub

    vae = stage("vae", train_vae, "train the VAE", steps=2500, batch_size=32, lr=1e-3)
    vae.add("--pixel_std", float, "standard deviation of a pixel; larger: smoother latents, blurrier images",
            default=0.08, above=0)  # fmt: skip
    mar = stage("mar", train_mar, "train MAR on the latents of a trained VAE", steps=3400, batch_size=32, lr=1.5e-3)
    mar.add("--vae_path", str, "the trained VAE's weights", metavar="FILE", default_text="the model's")
    mar.add("--start_from", str, "weights of an earlier training to go on from, in place of the context phase",
            metavar="FILE", default_text="none")  # fmt: skip
    mar.add("--context_steps", int, "steps before, of the transformer without the head", default=1000, minimum=1)
    mar.add("--context_lr", float, "learning rate of these steps", default=2e-3, above=0)
    mar.add("--finish_steps", int, "steps after, at a third of the learning rate", default=400, minimum=1)
    mar.add("--posterior_noise", float, "share of the VAE's noise that the latents get", default=0.3, minimum=0,
            maximum=1)  # fmt: skip
    mar.add("--head_tokens", int, "tokens of an image that train the diffusion head in a step", default=128, minimum=1)
    what = "train the Fashion-MNIST classifier behind FID and Inception Score of mar_tiny"
    stage("classifier", train_scorer, what, steps=2400, batch_size=250, lr=4e-3)
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for folder in (args.output_dir, *args.output_dir.parents):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output_dir {args.output_dir} cannot be made: {folder} is not a folder")
    args.run(args, PRESETS[args.model], choose_device(args.device))


if __name__ == "__main__":
    sys.exit(main())
