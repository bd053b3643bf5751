"""train.py: its losses and initial weights, trainings that are stopped and continued, and its command line."""

import argparse
import dataclasses
import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import train
from diffusion.loss import hybrid_loss
from models import MAR, PRESETS, create_model
from util.errors import InputError


def test_the_bound_trains_the_variance_and_not_the_noise():
    outputs = torch.zeros(64, 8, requires_grad=True)
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    timesteps = 15 * torch.arange(64)
    squared_error, bound = hybrid_loss(lambda *_: outputs, torch.ones(64, 4), torch.empty(64, 0), timesteps, noise)
    (gradient,) = torch.autograd.grad((squared_error + bound).sum(), outputs)
    torch.testing.assert_close(gradient[:, :4], -2 * noise / 4)  # of the squared error alone
    assert (gradient[:, 4:].abs() > 0).any()


def test_a_new_model_attends_to_neighbours():
    torch.manual_seed(0)
    model = create_model("mar_tiny")
    train.initialize_with_neighbours(model)
    block, middle = model.decoder_blocks[0], 8 * 16 + 8
    queries, keys_values = block.attn.project(block.norm1(model.masked_input(torch.arange(256)[None])))
    q, k = (x.unflatten(-1, (block.attn.num_heads, -1)) for x in (queries, keys_values.chunk(2, dim=-1)[0]))
    weights = torch.einsum("bqhd,bkhd->hqk", q, k).div(8).softmax(dim=-1).mean(dim=0)[middle]
    assert min(weights[middle + 1], weights[middle + 16]) > 10 * weights[1]


def test_masks_are_those_of_a_random_time_of_sampling(monkeypatch):
    model = create_model("mar_tiny")
    trained = train.TrainedMAR(model)
    monkeypatch.setattr(MAR, "forward", lambda self, _, tokens, positions: torch.zeros(1, 256 - tokens.shape[1], 128))
    mean, generator = torch.zeros(1, 256, model.token_dim), torch.Generator().manual_seed(0)
    masked = [trained(mean, mean, torch.zeros(1, dtype=int), 0.3, generator)[1].shape[1] for _ in range(2000)]
    assert min(masked) >= 1 and max(masked) == 256
    # The mean of the cosine from 0 to a quarter turn is 2 / pi. Rounding up adds half a token.
    assert np.mean(masked) / 256 == pytest.approx(2 / np.pi + 0.5 / 256, abs=0.02)


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A folder of 12 random images of each of two classes. mar_tiny becomes a network that trains in milliseconds."""
    preset = PRESETS["mar_tiny"]
    narrow = {"encoder_embed_dim": 16, "decoder_embed_dim": 16, "diffloss_w": 16, "diffloss_d": 1}
    architecture = {**preset.architecture, **narrow, "encoder_depth": 1, "decoder_depth": 1, "class_num": 2}
    monkeypatch.setitem(PRESETS, "mar_tiny", dataclasses.replace(preset, architecture=architecture))
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "data" / ".cache").mkdir()  # is no class
    return tmp_path / "data"


def train_mar(data: Path, folder: Path | str, *arguments: object) -> int:
    lengths = ["--context_steps", 4, "--steps", 3, "--finish_steps", 2]
    flags = ["--data", data, "--output_dir", folder, *lengths, "--batch_size", 2, "--head_tokens", 8, "--device", "cpu"]
    return train.main([str(argument) for argument in [*flags, *arguments]])


def test_mar_that_is_cut_off_again_and_again_gets_the_same_weights(data, tmp_path, monkeypatch):
    assert train_mar(data, tmp_path / "whole") == 0
    calls, clip = itertools.count(1), nn.utils.clip_grad_norm_

    def clip_or_cut(*arguments):
        """End the training in every third step, before the weights change."""
        if next(calls) % 3 == 0:
            raise KeyboardInterrupt
        return clip(*arguments)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip_or_cut)
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    for _ in range(4):  # between steps of a phase, and between phases
        with pytest.raises(KeyboardInterrupt):
            train_mar(data, tmp_path / "cut")
    for _ in range(2):  # the second time, the training is through
        assert train_mar(data, tmp_path / "cut") == 0
        whole, cut = (tmp_path / name / "checkpoint-last.safetensors" for name in ("whole", "cut"))
        assert cut.read_bytes() == whole.read_bytes()


def test_a_second_training_starts_from_the_weights_of_the_first_with_other_batches(data, tmp_path, monkeypatch):
    drawn, forward = [], MAR.forward
    monkeypatch.setattr(MAR, "forward", lambda *args: drawn.append(args[3].flatten().tolist()) or forward(*args))
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_mar(data, first) == 0
    assert train_mar(data, second, "--start_from", first, "--lr", 1e-9, "--vae_path", PRESETS["mar_tiny"].vae_path) == 0
    weights = [load_file(folder / "checkpoint-last.safetensors") for folder in (first, second)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    assert len({tuple(positions) for positions in drawn}) == len(drawn) == 9 + 5


def test_a_linear_map_learns_to_sum_its_inputs(tmp_path):
    torch.manual_seed(0)
    module = nn.Linear(4, 1)

    def loss(generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(32, 4, generator=generator)
        return (module(x) - x.sum(dim=1, keepdim=True)).square().mean()

    args = argparse.Namespace(output_dir=tmp_path)
    train.fit(module, [torch.optim.AdamW(module.parameters())], loss, args, "sum", steps=200, lr=0.1, ema_decay=0.9)
    assert (module.weight - 1).abs().max() < 0.02


def test_folders_and_fashion_mnist_are_read(data, tmp_path):
    images, labels = train.load_images(str(data), 32, tmp_path)
    assert images.shape == (24, 3, 32, 32) and labels.tolist() == [0] * 12 + [1] * 12

    rng = np.random.default_rng(0)
    pixels, classes = rng.integers(0, 256, (20, 28, 28), np.uint8), rng.integers(0, 10, 20, np.uint8)
    for name, header_size, values in [("images-idx3", 16, pixels), ("labels-idx1", 8, classes)]:
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(header_size) + values.tobytes()))
    images, labels = train.load_images("fashion-mnist", 32, tmp_path)
    np.testing.assert_array_equal(images, np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[:, None].repeat(3, axis=1))
    np.testing.assert_array_equal(labels, classes)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b damaged")
    with pytest.raises(InputError, match="Fashion-MNIST cannot be read"):
        train.load_images("fashion-mnist", 32, tmp_path)


def test_bad_input_is_named_and_exits_with_2(data, tmp_path, capsys, monkeypatch):
    def refusal(*arguments: object) -> str:
        assert train_mar(data, tmp_path / "run", *arguments) == 2
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert "--data nowhere: no such folder" in refusal("--data", "nowhere")
    assert "with --fashion_mnist" in refusal("--data", "fashion-mnist", "--fashion_mnist", "nowhere")
    assert "32 x 32 images, but the model's are" in refusal("--data", "fashion-mnist", "--model", "mar_base")
    assert "no weights for mar_tiny" in refusal("--start_from", "nowhere")
    assert "Not a directory" in refusal("--output_dir", "file/run")
    assert "--posterior_noise: must be from 0 to 1" in refusal("--posterior_noise", 1.5)
    assert ": lower the learning rate" in refusal("--context_lr", 1e30)

    assert train_mar(data, "run") == 0  # then it cannot be continued with other flags
    for flag, value in [("--finish_steps", 3), ("--lr", 1), ("--start_from", "run")]:
        assert f"context.pth: {flag.removeprefix('--')} " in refusal(flag, value)
    Path("run/context.pth").write_bytes(b"cos\nabort\n(tR.")  # ends the process which unpickles it
    assert "context.pth is damaged" in refusal()

    (data / "mice").mkdir()
    Image.new("RGB", (32, 32)).save(data / "mice" / "0.png")
    assert "has 3 classes, but mar_tiny has 2" in refusal()
    (data / "cats" / "0.png").write_bytes((data / "cats" / "1.png").read_bytes()[:200])
    assert "cats/0.png cannot be read as an image" in refusal()
