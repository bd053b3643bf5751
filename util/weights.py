"""Weights on disk: PyTorch and safetensors files in, safetensors files out, and models that are ready for sampling.

A checkpoint may come from anyone: nothing in it can run code, a file that does not fit the network is refused before
the network is touched, and reading is memory-mapped, so that only the weights in use are brought into memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn

from models import MAR, PRESETS, AutoencoderKL, cast_model, create_model, pack_linear_layers
from models.vae import for_inference
from util.download import download_command, is_placeholder
from util.errors import InputError, why_unreadable
from util.files import atomic_write
from util.machine import choose_device, choose_dtype

EMA_ENTRIES = ("model_ema", "ema")  # of a training checkpoint, the preferred one first
WRAPPER_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)*")  # of DistributedDataParallel and torch.compile


class Ignored:
    """Takes the place of objects beside the weights, such as a training run's arguments; keeps nothing of them."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


ARRAYS = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
IGNORED: list[Any] = [(Ignored, name) for name in ("argparse.Namespace", "numpy.dtype", "numpy.ndarray", *ARRAYS)]


class LoadedWeights(NamedTuple):
    """Where weights came from."""

    path: Path  # the file, also where a folder was named
    entry: str | None  # of a training checkpoint, such as "model_ema"; None for a plain state dict
    is_ema: bool  # the entry, or the file's name or metadata, say that these are EMA weights


def load_model(
    name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    weights: str | os.PathLike | None = None,
    vae_weights: str | os.PathLike | None = None,
    **overrides: Any,
) -> tuple[MAR, AutoencoderKL]:
    """Load a model and its VAE, ready for sampling and decoding.

    Args:
        name:        a key of `PRESETS`, such as "mar_huge".
        device:      default: a GPU where there is one, else the CPU.
        dtype:       of weights and activations; default: bfloat16 on GPUs and on CPUs that compute in it, else float32.
        weights:     file of the model's weights; default: the preset's.
        vae_weights: file of the VAE's weights; default: the preset's.
        overrides:   constructor fields of `MAR` that replace the preset's, such as `class_num`.

    Raises:
        ValueError: there is no such model, or its VAE needs a package that is not installed.
        InputError: a file is missing or damaged, or its weights are another network's.
    """
    with torch.device("meta"):
        model = create_model(name, **overrides)
        vae = PRESETS[name].vae_class(**PRESETS[name].vae)
    device = choose_device("auto") if device is None else torch.device(device)
    dtype = choose_dtype("auto", device) if dtype is None else dtype
    loaded = load_weights(model, weights or PRESETS[name].checkpoint, what=name, device=device)
    if PRESETS[name].ema_expected and not loaded.is_ema:
        _print_once(
            f"note: nothing says that {loaded.path} holds EMA weights, which the published scores are of; other "
            "weights score much worse, and the official checkpoints hold both"
        )
    load_weights(vae, vae_weights or PRESETS[name].vae_path, what="the VAE", device=device, ignore_prefixes=["loss."])
    return _ready(model, vae, dtype)


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[MAR, AutoencoderKL]:
    """Make a model and its VAE with random weights, as ready as loaded ones: speed does not depend on the weights."""
    vae = PRESETS[name].vae_class(**PRESETS[name].vae)
    return _ready(create_model(name).to(device), vae.to(device), dtype)


def _ready(model: MAR, vae: Any, dtype: torch.dtype) -> tuple[MAR, AutoencoderKL]:
    pack_linear_layers(cast_model(model, dtype))
    return model, for_inference(vae, dtype)


def _print_once(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def load_weights(
    module: nn.Module,
    path: str | os.PathLike,
    *,
    what: str,
    ignore_prefixes: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> LoadedWeights:
    """Fill `module` with the weights of a file, all of them or none.

    The file is a PyTorch checkpoint (`.pth`, `.ckpt`) or a `.safetensors` file; its content decides, not its name. It
    holds a state dict, or a training checkpoint with state dicts of which EMA weights are preferred. A prefix that a
    wrapper of PyTorch has put before every name is removed. The peak of memory is the module itself and one tensor.

    Args:
        module:          the network, on any device.
        path:            file, or folder with `checkpoint-last.pth` or `checkpoint-last.safetensors`.
        what:            what the weights are for, in messages: "mar_huge", "the VAE".
        ignore_prefixes: entries that may be in the file and are not read, such as ["loss."].
        device:          default: where `module` is, or the CPU if that is the meta device.

    Raises:
        InputError: the file is missing, unreadable or damaged, could run code, has other names or shapes, or holds
            numbers that are not finite.
    """
    path, expected = find_weights(path, what), module.state_dict()
    contents, metadata = _read(path)
    entry, tensors = _select_entry(path, what, contents, expected)
    tensors = {name: value for name, value in tensors.items() if not name.startswith(tuple(ignore_prefixes))}
    _check_fit(path, what, expected, tensors)

    is_meta = any(value.is_meta for value in expected.values())
    if is_meta:  # the copies become the module's, and do not depend on the mapped file, which may change while we run
        settings = {"copy": True, "memory_format": torch.contiguous_format}
        tensors = {n: v.to(device or "cpu", expected[n].dtype, **settings) for n, v in tensors.items()}
    elif device is not None:
        module.to(device)
    module.load_state_dict(tensors, assign=is_meta)
    words = entry or f"{path.name} {metadata}"
    return LoadedWeights(path, entry, re.search(r"(?<![a-z])ema(?![a-z])", words.lower()) is not None)


def save_safetensors(
    state_dict: Mapping[str, torch.Tensor], path: str | os.PathLike, metadata: Mapping[str, str]
) -> None:
    """Write tensors, from any device, and the strings of `metadata` to a `.safetensors` file, atomically.

    Raises InputError if the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    try:
        with atomic_write(path) as partial:
            safetensors.torch.save_file(tensors, partial, metadata=dict(metadata))
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from error


def find_weights(path: str | os.PathLike, what: str) -> Path:
    """Find the file of weights that a path names: the file itself, or a folder with `checkpoint-last.pth` in it.

    Raises InputError if there is no such file, or if it is empty, a Git LFS pointer or a web page.
    """
    file = path = Path(path)
    if path.is_dir():
        candidates = [path / "checkpoint-last.pth", path / "checkpoint-last.safetensors"]
        file = next((candidate for candidate in candidates if candidate.exists()), candidates[0])
    fetch = download_command(file)
    try:
        with file.open("rb") as stream:
            head = stream.read(512)
    except FileNotFoundError:
        missing = f"{path} holds no checkpoint-last.pth or .safetensors" if path.is_dir() else f"{file} does not exist"
        raise InputError(f"no weights for {what}: {missing}; {fetch or 'check the path'}") from None
    except OSError as error:
        raise InputError(f"cannot read the weights for {what}, {file}: {error.strerror}") from error
    if not head:
        raise InputError(f"{file} is empty; delete it and {fetch or 'get it again'}")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{file} is a Git LFS pointer, not the weights themselves; run `git lfs pull`")
    if is_placeholder(head):
        way_out = fetch or "get the file itself (a Dropbox link must end in dl=1)"
        raise InputError(f"{file} is a web page saved under this name; delete it and {way_out}")
    return file


def _read(path: Path) -> tuple[dict, Mapping[str, str]]:
    """Return what a PyTorch or safetensors file holds, and its metadata; tensors stay in the mapped file until used."""
    with path.open("rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{":  # safetensors: 8 bytes of length, then JSON
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        with torch.serialization.safe_globals(IGNORED):
            contents = torch.load(str(path), map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except Exception as error:  # a damaged file can fail anywhere in the reader
        refused = re.search(r"(?:GLOBAL|class) '?([\w.]+)", str(error))
        reason = f"is truncated, damaged or no checkpoint at all ({why_unreadable(error)})"
        way_out = f"delete it and {download_command(path) or 'get it again'}"
        if refused is not None:
            reason = f"refers to {refused[1].rstrip('.')}, which could run code, and is not loaded"
            way_out = "where it was made, save the weights alone: torch.save({'model_ema': state_dict}, FILE)"
        raise InputError(f"{path} {reason}; {way_out}") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds a {type(contents).__name__}, not a dict of weights; get it again")
    return contents, {}


def _select_entry(path: Path, what: str, contents: dict, expected: Mapping[str, Any]) -> tuple[str | None, dict]:
    """Return the state dict in a file, and the name of its entry unless it is the whole file.

    Prints which entry was taken and which prefix was removed from its names. Raises InputError if there is no state
    dict, or if several could be meant and none is named as EMA weights.
    """
    found = {}
    for entry, value in [(None, contents), *contents.items()]:
        if isinstance(value, dict):
            prefix = _wrapper_prefix([str(name) for name in value])
            tensors = {str(name).removeprefix(prefix): tensor for name, tensor in value.items()}
            if not expected.keys().isdisjoint(tensors):
                found[entry] = tensors, prefix
    chosen = next((entry for entry in (*EMA_ENTRIES, *found) if entry in found), None)
    if not found:
        held = ", ".join(str(name) for name in list(contents)[:3]) or "nothing"
        raise InputError(f"{path} does not fit {what}: it holds {held}; name a file with weights for {what}")
    if len(found) > 1 and chosen not in EMA_ENTRIES:
        raise InputError(f"{path} holds several sets of weights ({', '.join(map(str, found))}); save one of them alone")
    tensors, prefix = found[chosen]
    if chosen or prefix:
        removed = f", without the prefix {prefix}" if prefix else ""
        _print_once(f"weights for {what}: {chosen or 'all'} of {path}{removed}")
    return chosen, tensors


def _wrapper_prefix(names: Sequence[str]) -> str:
    """Return the prefix that wrappers of PyTorch have put before all names, "" if there is none."""
    prefix = WRAPPER_PREFIX.findall(names[0])[0] if names else ""
    return prefix if all(name.startswith(prefix) for name in names) else ""


def _check_fit(path: Path, what: str, expected: Mapping[str, torch.Tensor], tensors: Mapping[str, Any]) -> None:
    """Raise InputError unless names and shapes are those of the network, and the values finite plain tensors."""
    common = [name for name in expected if name in tensors]
    missing, unknown = [n for n in expected if n not in tensors], [n for n in tensors if n not in expected]
    unusable = [name for name in common if not _is_plain(tensors[name], expected[name])]
    misshapen = [n for n in common if n not in unusable and tensors[n].shape != expected[n].shape]
    shapes = [f"{n} {list(tensors[n].shape)} for {list(expected[n].shape)}" for n in misshapen]
    verbs = {"lacks": missing, "has the unknown": unknown, "has no usable numbers in": unusable, "has": shapes}
    faults = [f"{verb} {_listed(names)}" for verb, names in verbs.items() if names]
    if faults:
        found = _identify(tensors)
        article = "an" if found and found[0] in "aeiou" else "a"
        verdict = f"is {article} {found} checkpoint, not {what}" if found and found != what else f"does not fit {what}"
        way_out = "name the file and the model that belong together"
        if misshapen == ["class_emb.weight"] and len(faults) == 1:
            way_out = f"give --class_num {len(tensors['class_emb.weight'])} if it has that many classes"
        raise InputError(f"{path} {verdict}: it {', '.join(faults)}; {way_out}")
    broken = [name for name in common if not torch.stack(tensors[name].aminmax()).isfinite().all()]
    if broken:
        raise InputError(f"{path} holds numbers that are not finite, in {_listed(broken)}; get other weights")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def _identify(tensors: Mapping[str, Any]) -> str | None:
    """Name the preset that weights are for, by widths and by the shape of the mask token; None if none is."""
    names = ("class_emb.weight", "z_proj.weight", "mask_token")
    shapes = [tuple(getattr(tensors.get(name), "shape", ())) for name in names]
    width, token_dim, one_fake_token = shapes[0][-1:], shapes[1][-1:], len(shapes[2]) == 2
    for name, preset in PRESETS.items():
        fields = {"vae_embed_dim": 16, "one_fake_token": False, **preset.architecture}
        wanted = (fields["encoder_embed_dim"],), (fields["vae_embed_dim"],), fields["one_fake_token"]
        if wanted == (width, token_dim, one_fake_token):
            return name
    return None


def _is_plain(value: object, expected: torch.Tensor) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
        and (value.is_floating_point() and value.itemsize > 1) == expected.is_floating_point()  # no 8-bit floats
    )
