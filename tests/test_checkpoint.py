"""Checkpoint files: what loads, what is refused and how, and how much memory it takes."""

from __future__ import annotations

import argparse
import builtins
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from models import PRESETS, CachePolicy, sample_tokens
from util.errors import InputError
from util.files import atomic_write, file_digest
from util.runs.images import decode, to_pixels
from util.weights.checkpoint import load_weights, save_safetensors
from util.weights.download import FILES, OUTPUT_DIR
from util.weights.models import load_model, note_missing_ema

ROOT = Path(__file__).parents[1]


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


def assert_holds(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    state = module.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(state[name], value), name


def training_checkpoint() -> dict:
    return {
        "model": random_weights(1),
        "model_ema": random_weights(2),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 399,
        "scaler": {"scale": 1.0},
    }


@pytest.mark.parametrize("zip_format", [True, False])
def test_ema_weights_of_a_training_checkpoint_are_preferred(tmp_path, zip_format):
    path = tmp_path / "checkpoint.pth"
    torch.save(training_checkpoint(), path, _use_new_zipfile_serialization=zip_format)
    network = Network()
    loaded = load_weights(network, path, what="mar_tiny")
    assert_holds(network, random_weights(2))
    assert (loaded.path, loaded.entry) == (path, "model_ema")


@pytest.mark.parametrize("zip_format", [True, False])
def test_arguments_of_a_training_run_are_passed_over(tmp_path, zip_format):
    path = tmp_path / "checkpoint.pth"
    arguments = argparse.Namespace(model="mar_base", device="cuda", blr=None, nested={"a": [1, (2, 3)]})
    torch.save({**training_checkpoint(), "args": arguments}, path, _use_new_zipfile_serialization=zip_format)
    network = Network()
    if hasattr(torch.serialization, "add_safe_globals"):
        load_weights(network, path, what="mar_base")
        assert_holds(network, random_weights(2))
    else:  # torch < 2.4 cannot
        assert "upgrade torch" in refusal(path)


def test_model_entry_is_used_where_there_is_no_ema(tmp_path):
    contents = training_checkpoint()
    del contents["model_ema"]
    torch.save(contents, tmp_path / "kl16.ckpt")
    network = Network()
    assert load_weights(network, tmp_path / "kl16.ckpt", what="VAE").entry == "model"
    assert_holds(network, random_weights(1))


@pytest.mark.parametrize("name", ["checkpoint-last.pth", "checkpoint-last.safetensors"])
def test_flat_files_load_from_their_folder(tmp_path, name):
    if name.endswith(".pth"):
        torch.save(random_weights(3), tmp_path / name)
    else:
        save_safetensors(random_weights(3), tmp_path / name, {"step": "12"})
    network = Network()
    loaded = load_weights(network, tmp_path, what="mar_tiny")
    assert (loaded.path, loaded.entry) == (tmp_path / name, "flat")
    assert_holds(network, random_weights(3))


@pytest.mark.parametrize(
    ("name", "contents", "metadata", "is_marked"),
    [
        ("mar-base.safetensors", random_weights(), {}, False),
        ("mar-base.safetensors", random_weights(), {"weights": "EMA"}, True),
        ("mar_base_ema.safetensors", random_weights(), {}, True),
        ("schema.safetensors", random_weights(), {"schema": "semantic"}, False),
        ("flat.pth", random_weights(), None, False),
        ("model-ema.pth", random_weights(), None, True),
        ("checkpoint-last.pth", training_checkpoint(), None, True),
        ("no-ema.pth", {"model": random_weights()}, None, False),
    ],
)
def test_weights_that_nothing_marks_as_ema_get_a_note(
    name, contents, metadata, is_marked, tmp_path, capsys, monkeypatch
):
    if metadata is None:
        torch.save(contents, tmp_path / name)
    else:
        save_safetensors(contents, tmp_path / name, metadata)
    loaded = load_weights(Network(), tmp_path / name, what="mar_base")
    assert loaded.is_marked_as_ema == is_marked
    note_missing_ema("mar_tiny", loaded)  # whose files are all flat, and averages
    assert not capsys.readouterr().out
    note_missing_ema("mar_base", loaded)
    printed = capsys.readouterr().out
    assert (name in printed and "EMA" in printed) == (not is_marked)
    monkeypatch.setenv("RANK", "1")
    note_missing_ema("mar_base", loaded)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_meta_module_gets_weights_of_the_wanted_type(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save(random_weights(), path)
    else:
        save_safetensors(random_weights(), path, {})
    with torch.device("meta"):
        network = Network()
    network.mask_token.requires_grad_(False)
    load_weights(network, path, what="mar_tiny", dtype=torch.bfloat16, device="cpu")
    expected = {n: v.bfloat16() if v.is_floating_point() else v for n, v in random_weights().items()}
    assert_holds(network, expected)
    assert all(value.device.type == "cpu" and value.is_contiguous() for value in network.state_dict().values())
    assert network.state_dict()["norm.num_batches_tracked"].dtype == torch.int64
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in network.named_parameters()} - {"mask_token"}


def test_weights_do_not_change_with_the_file_they_came_from(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_safetensors(random_weights(), path, {})
    network = Network()
    load_weights(network, path, what="mar_tiny")
    with path.open("r+b") as file:
        file.seek(-500, os.SEEK_END)
        file.write(bytes(500))
    assert_holds(network, random_weights())


def test_a_buffer_that_no_file_can_fill_is_not_left_on_meta(tmp_path):
    torch.save(random_weights(), tmp_path / "weights.pth")
    network = Network().to("meta")
    network.register_buffer("frequencies", torch.zeros(3, device="meta"), persistent=False)
    with pytest.raises(AssertionError, match="frequencies"):
        load_weights(network, tmp_path / "weights.pth", what="mar_tiny")


class Payload:
    """Pickles as a call of `function(argument)`."""

    def __init__(self, function, argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("name", ["system", "exec", "eval", "getattr"])
@pytest.mark.parametrize("place", ["args", "model_ema", "whole"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, zip_format, name, place):
    marker = tmp_path / "ran"
    payload = {
        "system": Payload(os.system, f"touch {marker}"),
        "exec": Payload(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "eval": Payload(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "getattr": Payload(builtins.getattr, "x"),
    }[name]
    contents = payload if place == "whole" else {**training_checkpoint(), place: payload}
    torch.save(contents, tmp_path / "evil.pth", _use_new_zipfile_serialization=zip_format)
    network = Network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(InputError, match=rf"evil\.pth refers to \S*{name}, which could run code"):
        load_weights(network, tmp_path / "evil.pth", what="mar_tiny")
    assert not marker.exists()
    assert_holds(network, before)


def refusal(path: Path, network: nn.Module | None = None, **options) -> str:
    """The message with which `path` is refused; the network must be left as it was."""
    network = network or Network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(network, path, what="mar_huge", **options)
    assert_holds(network, before)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_missing_unknown_and_misshapen_entries_are_named(tmp_path):
    path = tmp_path / "weights.pth"
    weights = random_weights()
    del weights["blocks.1.weight"]
    weights["blocks.2.weight"] = torch.zeros(6, 6)
    weights["class_emb.weight"] = torch.zeros(10, 8)
    torch.save({"model": weights}, path)
    message = refusal(path)
    assert "lacks blocks.1.weight" in message
    assert "unknown blocks.2.weight" in message
    assert "class_emb.weight [10, 8] for [10, 6]" in message


def test_a_checkpoint_of_another_model_is_recognised(tmp_path):
    save_safetensors(random_weights(width=8), tmp_path / "weights.safetensors", {})
    widths = {8: "mar_base"}
    message = refusal(
        tmp_path / "weights.safetensors", identify=lambda shapes: widths.get(shapes["class_emb.weight"][1])
    )
    assert "is a mar_base checkpoint, not mar_huge" in message


def test_ignored_prefixes_may_hold_anything_and_nothing_else_may(tmp_path):
    path = tmp_path / "kl16.ckpt"
    torch.save({"model": {**random_weights(), "loss.logvar": torch.zeros(()), "loss.discriminator": "none"}}, path)
    assert "unknown loss.logvar, loss.discriminator" in refusal(path)
    network = Network()
    load_weights(network, path, what="VAE", ignore_prefixes=("loss.",))
    assert_holds(network, random_weights())


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    "value",
    [None, [1.0], torch.zeros(1, 1, 6, dtype=torch.int64), torch.zeros(1, 1, 6).to_sparse()],
    ids=["none", "list", "integers", "sparse"],
)
def test_entries_that_are_no_plain_tensors_are_refused(tmp_path, value):
    torch.save({"model": {**random_weights(), "mask_token": value}}, tmp_path / "weights.pth")
    assert "no usable numbers in mask_token" in refusal(tmp_path / "weights.pth")


@pytest.mark.parametrize("contents", [[1, 2], {"epoch": 3}, {}, {"model": {}}, {"state_dict": {}}, {3: torch.zeros(1)}])
def test_files_without_weights_are_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "weights.pth")
    refusal(tmp_path / "weights.pth")


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "contents, expected",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\n <!DOCTYPE html><html><head><title>Dropbox</title>", "dl=1"),
        (b"<html>", "web page"),
        (b"weights to follow\n", "no checkpoint at all"),
        (bytes(1000), "no checkpoint at all"),
        (b"PK\x03\x04" + bytes(1000), "no checkpoint at all"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, ending, contents, expected):
    path = tmp_path / f"weights{ending}"
    path.write_bytes(contents)
    assert expected in refusal(path)


def test_a_missing_file_is_told_with_the_way_to_get_it(tmp_path, monkeypatch):
    assert "does not exist" in refusal(tmp_path / "weights.pth")
    assert "holds no checkpoint-last" in refusal(tmp_path)
    path = tmp_path / FILES["mar_huge"].path
    assert f"python -m util.weights.download mar_huge --output_dir {tmp_path}`" in refusal(path)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"<!doctype html>")
    assert "python -m util.weights.download mar_huge" in refusal(path.parent / path.name)
    monkeypatch.chdir(tmp_path)
    assert "python -m util.weights.download vae`" in refusal(Path(OUTPUT_DIR) / FILES["vae"].path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_load_or_are_refused_but_nothing_else_happens(tmp_path, kind):
    whole, path = tmp_path / "whole", tmp_path / "damaged"
    if kind == "safetensors":
        save_safetensors(random_weights(), whole, {"step": "12"})
    else:
        torch.save(training_checkpoint(), whole, _use_new_zipfile_serialization=kind == "zip")
    data = whole.read_bytes()
    chance = random.Random(0)

    for length in chance.sample(range(len(data)), 30):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            load_weights(Network(), path, what="mar_tiny")

    refused = 0
    for _ in range(100):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        path.write_bytes(damaged)
        network = Network()
        try:
            load_weights(network, path, what="mar_tiny")
        except InputError:
            refused += 1
        else:
            assert {n: v.shape for n, v in network.state_dict().items()} == {
                n: v.shape for n, v in Network().state_dict().items()
            }
    assert 0 < refused < 100


MEASURE_MEMORY = """
import sys, threading
import torch
from torch import nn
from util.weights.checkpoint import load_weights

def anonymous_megabytes():  # memory of our own: pages of a mapped file can be dropped and do not count
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.empty(1 << 20) for _ in range(16))  # 64 MB

with torch.device("meta"):
    network = Network()
start, highest, done = anonymous_megabytes(), 0.0, threading.Event()

def watch():
    global highest
    while not done.wait(0.0005):
        highest = max(highest, anonymous_megabytes())

threading.Thread(target=watch, daemon=True).start()
load_weights(network, sys.argv[1], what="mar_tiny", dtype=getattr(torch, sys.argv[2]))
done.set()
print(max(highest, anonymous_megabytes()) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize("name, dtype", [("checkpoint.pth", "float32"), ("weights.safetensors", "bfloat16")])
def test_loading_takes_the_memory_of_the_network_not_of_the_file(tmp_path, name, dtype):
    path = tmp_path / name
    weights = {f"weights.{i}": torch.full((1 << 20,), float(i)) for i in range(16)}  # 64 MB
    if name.endswith(".pth"):
        moments = {i: {"exp_avg": value + 1, "exp_avg_sq": value + 2} for i, value in enumerate(weights.values())}
        model = {key: value + 3 for key, value in weights.items()}
        torch.save({"model": model, "model_ema": weights, "optimizer": moments}, path)
        assert path.stat().st_size > 4 * (64 << 20)
    else:
        save_safetensors(weights, path, {})
    command = [sys.executable, "-c", MEASURE_MEMORY, str(path), dtype]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    path.unlink()
    network = {"float32": 64, "bfloat16": 32}[dtype]
    assert network - 4 < float(output) < network + 4 + 8  # one tensor more, and the reader's own


def test_a_loaded_model_and_its_vae_make_pixels_of_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the preset's weights are found from anywhere
    model, vae = load_model("mar_tiny", "cpu", torch.float32)
    settings = {"num_iter": 8, "cfg": 3.0, "num_sampling_steps": 20, "cache": CachePolicy(start_step=2)}
    pixels = to_pixels(decode(vae, sample_tokens(model, torch.tensor([1, 8]), **settings) / model.latent_scale))
    assert (pixels.shape, pixels.dtype) == ((2, 32, 32, 3), np.uint8)
    assert np.median(pixels[:, 0]) < 10 < pixels[:, 8:24, 8:24].mean()  # a garment on black
    model, vae = load_model("mar_tiny", "cpu", torch.bfloat16)
    assert model.mask_token.dtype == vae.post_quant_conv.weight.dtype == torch.bfloat16
    assert model.diffloss.net.input_proj.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="unknown model 'mar_giant'"):
        load_model("mar_giant")
    with pytest.raises(InputError, match="is a mar_tiny checkpoint, not mar_base"):
        load_model("mar_base", weights=ROOT / PRESETS["mar_tiny"].checkpoint)


def test_saving_replaces_the_old_file_whole_and_keeps_metadata(tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    save_safetensors(random_weights(1), path, {})
    save_safetensors({**random_weights(2), "class_emb.weight": torch.ones(6, 10).t()}, path, {"step": "12"})
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["step"] == "12"
        assert torch.equal(file.get_tensor("class_emb.weight"), torch.ones(10, 6))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "occupied").write_text("a file where a folder should be")
    with pytest.raises(InputError, match=r"cannot write .*weights\.safetensors"):
        save_safetensors(random_weights(), tmp_path / "occupied" / "weights.safetensors", {})


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.json"
    with atomic_write(path) as partial:
        partial.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    save_safetensors(random_weights(), tmp_path / "weights.safetensors", {})
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_digest_is_sha256_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
