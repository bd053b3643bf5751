"""Train a small MAR and what it needs: `train.py vae`, then `train.py mar`; `train.py classifier` for its scores.

A training that was stopped continues when the same command is given again. Each training ends by writing its weights as
safetensors. Any model of `models/presets.py` can be trained on a folder of images with a subfolder for each class.
docs/training.md gives the reasons for how it is done, and what did not help.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from diffusion.loss import hybrid_loss
from diffusion.schedule import NUM_TRAIN_STEPS
from models import MAR, PRESETS, AutoencoderKL, Preset, create_model
from models.diffloss import DiffusionHead
from models.presets import MAR_MODELS
from util.cli import Parser, number
from util.errors import InputError, exits_cleanly
from util.extractors import CLASSIFIER_PATH, FashionClassifier, import_torch_fidelity, load_classifier
from util.files import check_writable, file_digest
from util.machine import ROOT, choose_device, mixed_precision, weights_digest
from util.metrics import Statistics
from util.training.images import FASHION_MNIST_FOLDER, load_fashion_mnist, load_images
from util.training.initialization import initialize_with_neighbours
from util.training.loop import Phase, fit
from util.weights import find_weights, load_weights, save_safetensors

BETAS = (0.9, 0.95)  # of AdamW
LABEL_DROPOUT = 0.1  # share of images that are trained without their class (MAR paper)
FIRST_EVERY, FINISH_FIRST_EVERY = 16, 4  # one in so many tokens is trained at the first timestep of sampling
FIRST_WEIGHT = 300.0  # weight of the noise-prediction error at that timestep
FINISH_CONDITION_NOISE = 0.5  # standard deviation of the noise in the conditions at that timestep
SCALE_BATCHES = 20  # batches of 100 images that measure the scale of the VAE's latents


def settings_of(args: argparse.Namespace, images: Tensor, **others: str) -> dict[str, Any]:
    """Return what a training depends on: its flags, and digests of its images and other inputs."""
    left_out = ("train", "device", "output_dir", "data", "fashion_mnist", "vae_path", "start_from")
    flags = {f"--{name}": value for name, value in vars(args).items() if name not in left_out}
    return {**flags, "sha256 of --data": hashlib.sha256(images.numpy().data).hexdigest()[:16], **others}


def draw(images: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images of one step: their indices [count] on the CPU, and the images on the generator's device."""
    chosen = torch.randint(len(images), (count,), generator=generator, device=generator.device).cpu()
    return chosen, images[chosen].to(generator.device)


def to_float(images: Tensor) -> Tensor:
    """Scale uint8 pixels to [-1, 1]."""
    return images.float() / 127.5 - 1


def random_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images [B, C, H, W] from left to right."""
    flip = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    return torch.where(flip, x.flip(3), x)


# VAE


def train_vae(args: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    """Minimize the squared error of the reconstruction, weighted for a Gaussian of `--pixel_std`, plus the KL term."""
    images, _ = load_images(args.data, preset.architecture.get("img_size", 256), args.fashion_mnist)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(**preset.vae).to(device)

    def loss(generator: torch.Generator) -> Tensor:
        x = random_flip(to_float(draw(images, args.batch_size, generator)[1]), generator)
        with mixed_precision(device):
            posterior = vae.encode(x)
            decoded = vae.decode(posterior.sample(generator)).float()
        error = (decoded - x).square().sum(dim=(1, 2, 3)) / (2 * args.pixel_std**2)
        return (error + posterior.kl()).mean() / x[0].numel()

    def make_optimizers() -> list[Optimizer]:
        return [AdamW(vae.parameters(), betas=BETAS, weight_decay=0.0)]

    fit(vae, [Phase(args.steps, args.lr, loss)], make_optimizers, args.output_dir, settings_of(args, images), device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode():
        batches = [to_float(draw(images, 100, generator)[1]) for _ in range(SCALE_BATCHES)]
        std = torch.cat([vae.encode(x).sample(generator) for x in batches]).std().item()
    rescale_latents(vae, 1 / (preset.latent_scale * std))
    save_safetensors(vae.state_dict(), args.output_dir / "vae.safetensors", {})


@torch.no_grad()
def rescale_latents(vae: AutoencoderKL, factor: float) -> None:
    """Multiply the latents by `factor`, in the 1 x 1 convolutions around them: images are reconstructed as before."""
    channels, (weight, bias) = vae.embed_dim, vae.quant_conv.parameters()
    weight[:channels] *= factor
    bias[:channels] *= factor
    bias[channels:] += 2 * math.log(factor)  # the log variances
    vae.post_quant_conv.weight /= factor


# MAR


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
        blocks = [*self.network.encoder_blocks, *self.network.decoder_blocks]
        matrices = [parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2]
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

        The tokens get only the share `posterior_noise` of the posterior's noise: all of it would hide what a token
        tells about its neighbours.

        Args:
            mean, std: of the posteriors of the tokens, [B, L, C].
            labels:    classes [B].

        Returns:
            Mean squared error of a linear readout of the conditions that predicts `mean`; the masked tokens [B, m, C];
            their conditions [B, m, D].
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


def train_mar(args: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    """Train MAR in three phases.

    1. **Context**: the transformer alone learns to predict unknown tokens from known ones by regression, whose gradient
       is clean where the diffusion loss's is noisy. It starts with attention to neighbours.
    2. **Diffusion**: the head learns to generate tokens, and the regression continues beside it.
    3. **Finish**: the same at a third of the learning rate, with more training of the first denoising step.

    With `--start_from`, the weights of an earlier training replace the first phase.
    """
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"train.py mar needs PyTorch 2.9 or later, for torch.optim.Muon: update {torch.__version__}")
    images, labels = load_images(args.data, preset.architecture.get("img_size", 256), args.fashion_mnist)
    torch.manual_seed(args.seed)
    model = create_model(args.model)
    if labels.max() >= model.class_num:
        raise InputError(f"--data {args.data} has {labels.max() + 1} classes, but {args.model} has {model.class_num}")
    vae = AutoencoderKL(**preset.vae)
    load_weights(vae, args.vae_path or ROOT / preset.vae_path, what="the VAE")
    vae = vae.to(device).requires_grad_(False).eval()
    start = file_digest(find_weights(args.start_from, args.model))[:16] if args.start_from else "none"
    settings = settings_of(args, images, **{"sha256 of the VAE": weights_digest(vae), "sha256 of --start_from": start})
    if args.start_from:
        load_weights(model, args.start_from, what=args.model)
    else:
        initialize_with_neighbours(model)
    trained = TrainedMAR(model).to(device)

    def loss(generator: torch.Generator, *, with_head: bool = True, finish: bool = False) -> Tensor:
        chosen, x = draw(images, args.batch_size, generator)
        with mixed_precision(device):
            posterior = vae.encode(to_float(x))
            moments = (posterior.mean, torch.exp(0.5 * posterior.logvar))
            mean, std = (model.patchify(preset.latent_scale * moment.float()) for moment in moments)
            error, *masked = trained(mean, std, labels[chosen].to(device), args.posterior_noise, generator)
            if not with_head:
                return error
            rows = torch.arange(args.head_tokens, device=device) % masked[0].shape[1]  # repeats tokens if there are few
            tokens, conditions = (x[:, rows].flatten(0, 1) for x in masked)
            return error + diffusion_loss(model.diffloss.net, tokens, conditions, generator, finish)

    phases = [
        Phase(0 if args.start_from else args.context_steps, args.context_lr, partial(loss, with_head=False)),
        Phase(args.steps, args.lr, loss),
        Phase(args.finish_steps, args.lr / 3, partial(loss, finish=True), ema_decay=0.99),
    ]
    first_seed = int(start[:7], 16) if args.start_from else 0  # the batches are not those of the earlier training
    fit(trained, phases, trained.make_optimizers, args.output_dir, settings, device, first_seed)
    save_safetensors(model.state_dict(), args.output_dir / "checkpoint-last.safetensors", {"weights": "EMA"})


def diffusion_loss(
    head: DiffusionHead, tokens: Tensor, conditions: Tensor, generator: torch.Generator, finish: bool
) -> Tensor:
    """Compute the head's loss on `tokens` [N, C] with their `conditions` [N, D].

    The timestep at which sampling starts is trained more often, because the first denoising step multiplies the head's
    error by up to 316. The input of the head's last layer is nearly constant at that timestep, so that the layer's
    weights would move together; they learn at a tenth of the learning rate. In the finish, noise in the conditions at
    that timestep teaches the head not to rely on them there.
    """
    device = tokens.device
    timesteps = (torch.rand(len(tokens), generator=generator, device=device) * NUM_TRAIN_STEPS).long()
    timesteps[:: FINISH_FIRST_EVERY if finish else FIRST_EVERY] = NUM_TRAIN_STEPS - 1
    at_first = timesteps == NUM_TRAIN_STEPS - 1
    noise = torch.randn(tokens.shape, generator=generator, device=device)
    if finish:
        disturbance = torch.randn(conditions.shape, generator=generator, device=device)
        conditions = conditions + FINISH_CONDITION_NOISE * at_first[:, None] * disturbance
    squared_error, bound = hybrid_loss(head, tokens, conditions, timesteps, noise)
    return (torch.where(at_first, FIRST_WEIGHT, 1.0) * squared_error + bound).mean()


# The Fashion-MNIST classifier behind FID and Inception Score of mar_tiny


def train_classifier(args: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    """Train the classifier, and write the statistics of the training images' features."""
    import_torch_fidelity()  # refuses a version that cannot compute the statistics
    test_images, test_labels = load_fashion_mnist(args.fashion_mnist, "t10k")
    images, labels = load_fashion_mnist(args.fashion_mnist)
    torch.manual_seed(args.seed)
    classifier = FashionClassifier().to(device).to(memory_format=torch.channels_last)

    def loss(generator: torch.Generator) -> Tensor:
        chosen, x = draw(images, args.batch_size, generator)
        shifts = torch.randint(-2, 3, (2,), generator=generator, device=device).tolist()  # the black border is as wide
        with mixed_precision(device):
            _, logits = classifier(random_flip(x, generator).roll(shifts, (2, 3)))
        return F.cross_entropy(logits.float(), labels[chosen].to(device), label_smoothing=0.05)

    def make_optimizers() -> list[Optimizer]:
        return [AdamW(classifier.parameters(), betas=BETAS, weight_decay=0.05)]

    phase = Phase(args.steps, args.lr, loss, ema_decay=0.0)  # an average would need batch-norm statistics of its own
    fit(classifier, [phase], make_optimizers, args.output_dir, settings_of(args, images), device)
    weights = {name: x.bfloat16() if x.is_floating_point() else x for name, x in classifier.state_dict().items()}
    path = args.output_dir / CLASSIFIER_PATH.name
    save_safetensors(weights, path, {})

    written = load_classifier(path).to(device)
    with torch.inference_mode():
        predictions = torch.cat([written(batch.to(device))[1].argmax(1).cpu() for batch in test_images.split(500)])
        features = torch.cat([written(batch.to(device))[0].cpu() for batch in images.split(500)])
    print(f"{path}: test accuracy {(predictions == test_labels).double().mean():.2%}", flush=True)
    Statistics.from_features(features).save(args.output_dir / Path(preset.statistics_path).name)


# Command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    networks = parser.add_subparsers(dest="network", required=True)
    natural, positive = number(int, 1), number(float, 1e-9)
    data = "fashion-mnist, or a folder of images with a subfolder for each class"

    def add_network(name: str, train: Callable, what: str, steps: int, batch_size: int, lr: float) -> Callable:
        """Add a subcommand with the flags that all have; return a function that adds flags of its own."""
        sub = networks.add_parser(name, help=what, description=f"{what[0].upper() + what[1:]}.")
        sub.set_defaults(train=train)

        def add(flag: str, kind: Callable, default: Any, help: str, **settings: Any) -> None:
            sub.add_argument(flag, type=kind, default=default, help=help, **settings)

        add("--model", str, "mar_tiny", "model to train", choices=sorted(MAR_MODELS))
        add("--fashion_mnist", Path, FASHION_MNIST_FOLDER, "folder with Fashion-MNIST's four .gz files")
        add("--output_dir", Path, Path("output") / f"train_{name}", "folder of the training and its weights")
        add("--steps", natural, steps, "optimizer steps")
        add("--batch_size", natural, batch_size, "images in each step")
        add("--lr", positive, lr, "learning rate")
        add("--seed", number(int, 0, 2**32 - 1), 0, "seed of the initial weights; batches do not depend on it")
        add("--device", str, "auto", "where to train", choices=["auto", "cpu", "cuda"])
        return add

    add = add_network("vae", train_vae, "train the VAE", 2500, 32, 1e-3)
    add("--data", str, "fashion-mnist", data)
    add("--pixel_std", positive, 0.08, "standard deviation of a pixel; larger: smoother latents, blurrier images")

    add = add_network("mar", train_mar, "train MAR on the latents of a trained VAE", 3400, 32, 1.5e-3)
    add("--data", str, "fashion-mnist", data)
    add("--vae_path", str, None, "weights of the VAE (default: the model's)", metavar="FILE")
    add("--start_from", str, None, "weights of an earlier training, instead of the context phase", metavar="FILE")
    add("--context_steps", number(int, 0), 1000, "first steps, without the head")
    add("--context_lr", positive, 2e-3, "learning rate of the first steps")
    add("--finish_steps", number(int, 0), 400, "last steps, at a third of the learning rate")
    add("--posterior_noise", number(float, 0, 1), 0.3, "share of the VAE's noise that the latents get")
    add("--head_tokens", natural, 128, "tokens of an image that train the diffusion head in one step")

    add_network("classifier", train_classifier, "train the classifier that scores mar_tiny's images", 2400, 250, 4e-3)
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_writable(args.output_dir / "training.pth")
    args.train(args, PRESETS[args.model], choose_device(args.device))


if __name__ == "__main__":
    sys.exit(main())
