"""Weights on disk: PyTorch and safetensors files in, safetensors files out, and models that are ready for sampling.

A checkpoint may come from anyone: nothing in it can run code, a file that does not fit the network is refused before
the network is touched, and reading is memory-mapped, so that only the weights in use are brought into memory.
"""

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

EMA_ENTRIES = ("model_ema", "ema")
ENTRIES = (*EMA_ENTRIES, "model", "state_dict")  # of a training checkpoint, the preferred one first
WRAPPER_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DistributedDataParallel and torch.compile


class Ignored:
    """Takes the place of objects beside the weights, such as a training run's arguments; keeps nothing of them."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


ARRAYS = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
IGNORED: list[Any] = [(Ignored, name) for name in ("argparse.Namespace", "numpy.dtype", "numpy.ndarray", *ARRAYS)]


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
        vae = PRESETS[name].make_vae()
    device = choose_device("auto") if device is None else torch.device(device)
    dtype = choose_dtype("auto", device) if dtype is None else dtype
    path = weights or PRESETS[name].checkpoint
    is_ema = load_weights(model, path, what=name, device=device)
    if PRESETS[name].ema_expected and not is_ema and os.environ.get("RANK", "0") == "0":
        print(
            f"note: nothing says that {path} holds EMA weights, which the published scores are of; other weights "
            "score much worse, and the official checkpoints hold both"
        )
    load_weights(vae, vae_weights or PRESETS[name].vae_path, what="the VAE", device=device, ignore_prefixes=["loss."])
    return _ready(model, vae, dtype)


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[MAR, AutoencoderKL]:
    """Make a model and its VAE with random weights, as ready as loaded ones: speed does not depend on the weights."""
    vae = PRESETS[name].make_vae()
    return _ready(create_model(name).to(device), vae.to(device), dtype)


def _ready(model: MAR, vae: Any, dtype: torch.dtype) -> tuple[MAR, AutoencoderKL]:
    pack_linear_layers(cast_model(model, dtype))
    return model, for_inference(vae, dtype)


def load_weights(
    module: nn.Module,
    path: str | os.PathLike,
    *,
    what: str,
    ignore_prefixes: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> bool:
    """Fill `module` with the weights of a file, all of them or none.

    The file is a PyTorch checkpoint (`.pth`, `.ckpt`) or a `.safetensors` file. It holds a state dict, or a training
    checkpoint with state dicts of which EMA weights are preferred. Prefixes of PyTorch's wrappers are removed. On the
    meta device, the peak of memory is the module itself and one tensor.

    Args:
        module:          the network, on any device.
        path:            file, or folder with `checkpoint-last.pth` or `checkpoint-last.safetensors`.
        what:            what the weights are for, in messages: "mar_huge", "the VAE".
        ignore_prefixes: entries that may be in the file and are not read, such as ["loss."].
        device:          where the weights go; default: where `module` is.

    Returns whether the entry's name or the file's metadata say that these are EMA weights.

    Raises InputError if the file is missing, unreadable or damaged, could run code, or does not fit the network.
    """
    path, expected = find_weights(path, what), module.state_dict()
    contents, metadata = _read(path)
    entry = next((name for name in ENTRIES if isinstance(contents.get(name), dict)), None)
    state = contents if entry is None else contents[entry]
    tensors = {WRAPPER_PREFIX.sub("", str(name)): value for name, value in state.items()}
    tensors = {name: value for name, value in tensors.items() if not name.startswith(tuple(ignore_prefixes))}
    _check_fit(path, what, expected, tensors)
    # Copies do not depend on the mapped file, which may change while we run.
    settings = {"copy": True, "memory_format": torch.contiguous_format}
    copies = {n: tensors[n].to(device or value.device, value.dtype, **settings) for n, value in expected.items()}
    module.load_state_dict(copies, assign=any(value.is_meta for value in expected.values()))
    return entry in EMA_ENTRIES or metadata.get("weights") == "EMA"


def save_safetensors(
    state_dict: Mapping[str, torch.Tensor], path: str | os.PathLike, metadata: Mapping[str, str]
) -> None:
    """Write tensors, from any device, and the strings of `metadata` to a `.safetensors` file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with atomic_write(path) as partial:
        safetensors.torch.save_file(tensors, partial, metadata=dict(metadata))


def find_weights(path: str | os.PathLike, what: str) -> Path:
    """Find the file of weights that a path names: the file itself, or a folder with `checkpoint-last.pth` in it.

    Raises InputError if there is no such file, or if it is empty, a Git LFS pointer or a web page.
    """
    file, head = Path(path), b""
    if file.is_dir():
        candidates = [file / "checkpoint-last.pth", file / "checkpoint-last.safetensors"]
        file = next((candidate for candidate in candidates if candidate.exists()), candidates[0])
    if file.is_file():
        with file.open("rb") as stream:
            head = stream.read(512)
    if not head or is_placeholder(head):
        way_out = download_command(file) or "get it again (a Dropbox link must end in dl=1, Git LFS takes git lfs pull)"
        raise InputError(
            f"no weights for {what}: {file} does not exist, is empty, or is a web page or Git LFS pointer; {way_out}"
        )
    return file


def _read(path: Path) -> tuple[dict, Mapping[str, str]]:
    """Return what a PyTorch or safetensors file holds, and its metadata; tensors stay in the mapped file until used."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        with torch.serialization.safe_globals(IGNORED):
            contents = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(contents, dict):
            raise TypeError(f"it holds a {type(contents).__name__}")
        return contents, {}
    except Exception as error:  # a damaged file can fail anywhere in the reader
        refused = re.search(r"(?:GLOBAL|class) '?([\w.]+)", str(error))
        reason = f"is truncated, damaged or no checkpoint at all ({why_unreadable(error)}); get it again"
        if refused is not None:
            reason = (
                f"refers to {refused[1].rstrip('.')}, which could run code, and is not loaded; where it was made, save "
                "the weights alone: torch.save({'model_ema': state_dict}, FILE)"
            )
        raise InputError(f"{path} {reason}") from error


def _check_fit(path: Path, what: str, expected: Mapping[str, torch.Tensor], tensors: Mapping[str, Any]) -> None:
    """Raise InputError unless names and shapes are those of the network, and the values finite plain tensors."""
    misfits = [name for name in {**expected, **tensors} if _kind(tensors.get(name)) != _kind(expected.get(name))]
    misfits = misfits or [name for name in expected if not torch.stack(tensors[name].aminmax()).isfinite().all()]
    if not misfits:
        return
    preset, class_shape = _identify(tensors), _kind(tensors.get("class_emb.weight"))[1]
    verdict = f"does not fit {what}" if preset in (None, what) else f"holds weights of {preset}, not of {what}"
    way_out = "name the file and the model that belong together"
    if misfits == ["class_emb.weight"] and class_shape:
        way_out = f"give --class_num {class_shape[0]} if it has that many classes"
    raise InputError(
        f"{path} {verdict}: missing, unknown, not finite, or of another shape or type: {', '.join(misfits[:2])} "
        f"({len(misfits)} in all); it holds {', '.join([*tensors][:2]) or 'nothing'}; {way_out}"
    )


def _kind(value: object) -> tuple[Any, tuple[int, ...]]:
    """Return type and shape of an entry of a state dict, both of which have to be the network's."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return type(value), ()
    is_float = value.is_floating_point() and value.itemsize > 1  # 8-bit floats need a scale
    return "floats" if is_float else value.dtype, tuple(value.shape)


def _identify(tensors: Mapping[str, Any]) -> str | None:
    """Name the preset that weights are for, by widths and by the shape of the mask token; None if none is."""
    small = {"encoder_depth": 1, "decoder_depth": 1, "diffloss_d": 1}
    for name in PRESETS:
        with torch.device("meta"):
            wanted = create_model(name, **small).state_dict()
        if all(_kind(tensors.get(part)) == _kind(wanted[part]) for part in ("z_proj.weight", "mask_token")):
            return name
    return None
