"""Checkpoint files: what loads, what is refused and how, and how much memory it takes."""

import argparse
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from torch import nn

from models import PRESETS, CachePolicy, create_model, sample_tokens
from util.errors import InputError
from util.images import decode, to_pixels
from util.weights import load_model, load_weights, save_safetensors

ROOT = Path(__file__).parents[1]
TINY = PRESETS["mar_tiny"]
BOTH_FORMATS = pytest.mark.parametrize("zip_format", [True, False])  # PyTorch's, since 1.6 and before


class Network(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.class_emb = nn.Embedding(10, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.BatchNorm1d(width)  # has floating-point and integer buffers


def random_weights(seed: int = 0, width: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + seed
        for name, value in Network(width).state_dict().items()
    }


def training_checkpoint(**more) -> dict:
    return {
        "model": random_weights(1),
        "model_ema": random_weights(2),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 399,
        **more,
    }


def assert_holds(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    state = module.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(state[name], value), name


def refusal(path: Path, **options) -> str:
    """The message with which `path` is refused; the network must be left as it was."""
    network = Network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(network, path, what="mar_huge", **options)
    assert_holds(network, before)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert not any(advice in message for advice in ("weights_only", "allow_pickle", "unsafe"))
    return message


# What loads


@BOTH_FORMATS
def test_what_training_keeps_beside_the_weights_is_passed_over(tmp_path, zip_format):
    path = tmp_path / "checkpoint.pth"
    arguments = argparse.Namespace(model="mar_base", blr=None, nested={"a": [1, (2, 3)]}, lr=np.float32(0.1))
    more = {"best_fid": np.float64(2.3), "epoch": np.int64(3), "done": np.bool_(True), "rng": np.random.get_state()}
    torch.save(training_checkpoint(args=arguments, **more), path, _use_new_zipfile_serialization=zip_format)
    network = Network()
    assert load_weights(network, path, what="mar_base")
    assert_holds(network, random_weights(2))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize(
    ("entries", "taken"),
    [
        (("model", "ema"), "ema"),
        (("ema", "model_ema", "model"), "model_ema"),
        (("state_dict",), "state_dict"),
        (("ema_decay", "model"), "model"),
    ],
)
def test_ema_weights_are_preferred_and_prefixes_of_wrappers_are_removed(tmp_path, entries, taken, prefix):
    contents = {entry: random_weights(number) for number, entry in enumerate(entries)}
    torch.save({e: {prefix + n: v for n, v in each.items()} for e, each in contents.items()}, tmp_path / "weights.pth")
    network = Network()
    is_ema = load_weights(network, tmp_path / "weights.pth", what="mar_tiny")
    assert is_ema == (taken in ("ema", "model_ema"))
    assert_holds(network, contents[taken])


@pytest.mark.parametrize(("name", "is_ema"), [("checkpoint-last.pth", False), ("checkpoint-last.safetensors", True)])
def test_a_meta_module_gets_the_weights_in_a_folder_and_keeps_them_when_the_file_changes(tmp_path, name, is_ema):
    path = tmp_path / name
    if is_ema:
        save_safetensors(random_weights(3), path, {"weights": "EMA"})
    else:
        torch.save(random_weights(3), path)
    with torch.device("meta"):
        network = Network()
    assert load_weights(network, tmp_path, what="mar_tiny", device="cpu") == is_ema
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_holds(network, random_weights(3))


def test_a_loaded_model_and_its_vae_make_pixels_of_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the preset's weights are found from anywhere
    model, vae = load_model("mar_tiny", "cpu", torch.float32)
    settings = {"num_iter": 8, "cfg": 3.0, "num_sampling_steps": 20, "cache": CachePolicy(start_step=2)}
    pixels = to_pixels(decode(vae, sample_tokens(model, torch.tensor([1, 8]), **settings) / TINY.latent_scale))
    assert (pixels.shape, pixels.dtype) == ((2, 32, 32, 3), np.uint8)
    assert np.median(pixels[:, 0]) < 10 < pixels[:, 8:24, 8:24].mean()  # a garment on black
    model, vae = load_model("mar_tiny", "cpu", torch.bfloat16)
    assert model.mask_token.dtype == vae.post_quant_conv.weight.dtype == torch.bfloat16
    assert model.diffloss.net.input_proj.weight.dtype == torch.float32
    assert not capsys.readouterr().out
    with pytest.raises(InputError, match="holds weights of mar_tiny, not of mar_base"):
        load_model("mar_base", weights=TINY.checkpoint)


def test_another_number_of_classes_and_weights_that_are_not_ema(tmp_path, monkeypatch, capsys):
    path = tmp_path / "weights.safetensors"
    save_safetensors(create_model("mar_tiny", class_num=37).state_dict(), path, {})
    model, _ = load_model("mar_tiny", "cpu", torch.float32, weights=path, class_num=37)
    assert len(model.class_emb.weight) == 37
    with pytest.raises(InputError, match=r"does not fit mar_tiny.*--class_num 37"):
        load_model("mar_tiny", "cpu", torch.float32, weights=path)

    monkeypatch.setitem(vars(TINY), "ema_expected", True)
    note = f"note: nothing says that {path} holds EMA weights"
    for rank, printed in ((0, True), (1, False)):
        monkeypatch.setenv("RANK", str(rank))
        load_model("mar_tiny", "cpu", torch.float32, weights=path, class_num=37)
        assert (note in capsys.readouterr().out) == printed


# What is refused


class Payload:
    """Pickles as a call of `function(argument)`."""

    def __init__(self, function, argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@BOTH_FORMATS
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, zip_format):
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    payload = Payload(os.system, f"touch {marker}")
    for contents in (payload, training_checkpoint(args=payload), training_checkpoint(model_ema=payload)):
        torch.save(contents, path, _use_new_zipfile_serialization=zip_format)
        message = refusal(path)
        assert f"{path} refers to" in message and "system, which could run code" in message
        assert not marker.exists()


def test_ignored_prefixes_may_hold_anything_and_nothing_else_may(tmp_path):
    path = tmp_path / "kl16.ckpt"
    torch.save({"model": {**random_weights(), "loss.logvar": torch.zeros(()), "loss.discriminator": "none"}}, path)
    assert "unknown, not finite, or of another shape or type: loss.logvar, loss.discriminator" in refusal(path)
    network = Network()
    load_weights(network, path, what="VAE", ignore_prefixes=("loss.",))
    assert_holds(network, random_weights())


MISFITS = (
    None,
    np.zeros((1, 1, 6)),
    torch.zeros(1, 1, 8),
    torch.zeros(1, 1, 6, dtype=torch.int64),
    torch.zeros(1, 1, 6).to(torch.float8_e4m3fn),
    torch.zeros(1, 1, 6).to_sparse(),
    torch.full((1, 1, 6), float("nan")),
)


def with_mask_token(value: object) -> dict:
    return {"model": {**random_weights(), "mask_token": value}}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants", "ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        *((with_mask_token(value), "shape or type: mask_token (1 in all)") for value in MISFITS),
        ([1, 2], "holds a list"),
        ({}, "it holds nothing"),
        ({"model": random_weights(), "ema": {"decay": 0.9}}, "it holds decay"),
        (training_checkpoint(args=argparse.Namespace(output=ROOT)), "torch.save({'model_ema': state_dict}, FILE)"),
        (b"", "is empty, or is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\n <!DOCTYPE html><html><head><title>Dropbox</title>", "dl=1"),
        (pickle.dumps(Payload(os.abort, "")), "no checkpoint at all"),
    ],
)
def test_a_file_that_does_not_fit_says_what_it_holds_instead(tmp_path, contents, expected):
    path = tmp_path / "weights.pth"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        torch.save(contents, path)
    assert expected in refusal(path)


def test_a_missing_file_is_told_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("util.download.OUTPUT_DIR", tmp_path)
    (tmp_path / "mar/mar_huge").mkdir(parents=True)
    message = refusal(tmp_path / "mar/mar_huge")
    assert "checkpoint-last.pth does not exist" in message and "python -m util.download mar_huge`" in message


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_load_or_are_refused_but_nothing_else_happens(tmp_path, kind):
    ending = "safetensors" if kind == "safetensors" else "pth"
    whole, path = tmp_path / f"whole.{ending}", tmp_path / f"damaged.{ending}"
    if kind == "safetensors":
        save_safetensors(random_weights(), whole, {"step": "12"})
    else:
        torch.save(training_checkpoint(), whole, _use_new_zipfile_serialization=kind == "zip")
    data, chance, refused = whole.read_bytes(), random.Random(0), 0
    for length in chance.sample(range(len(data)), 30):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            load_weights(Network(), path, what="mar_tiny")
    for _ in range(100):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            load_weights(Network(), path, what="mar_tiny")
        except InputError:
            refused += 1
    assert 0 < refused < 100


# Saving


def test_saving_replaces_the_old_file_whole_with_metadata_and_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    path = tmp_path / "new" / "weights.safetensors"
    save_safetensors(random_weights(1), path, {})
    save_safetensors({**random_weights(2), "class_emb.weight": torch.ones(6, 10).t()}, path, {"step": "12"})
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["step"] == "12"
        assert torch.equal(file.get_tensor("class_emb.weight"), torch.ones(10, 6))
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
