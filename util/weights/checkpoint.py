"""Weights on disk: PyTorch and safetensors files in, safetensors files out.

A checkpoint is a stranger's file. Nothing here runs code from it, a file that does not fit the network is refused
before the network is touched, and reading is memory-mapped: the optimizer state and the second copy of the weights
that a training checkpoint carries are never brought into memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import safetensors
import safetensors.torch
import torch
from torch import nn

from util.errors import InputError, why_unreadable
from util.files import atomic_write
from util.weights.download import FILES, OUTPUT_DIR, looks_like_web_page

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class LoadedWeights:
    """Where weights came from."""

    path: Path  # the file, also where a folder was named
    entry: str  # "model_ema" or "model" of a training checkpoint; "flat" for a plain state dict
    is_marked_as_ema: bool  # by its entry, the file's name or its metadata
    metadata: Mapping[str, str]  # what a `.safetensors` file says about itself


def load_weights(
    module: nn.Module,
    path: str | os.PathLike,
    *,
    what: str,
    ignore_prefixes: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    identify: Callable[[Shapes], str | None] | None = None,
) -> LoadedWeights:
    """Fill `module` with the weights of a file, all of them or none.

    The file is a PyTorch checkpoint (`.pth`, `.ckpt`) or a `.safetensors` file, told apart by content. It holds a state
    dict, or a training checkpoint with the state dicts `model_ema` (preferred) or `model`.

    Every parameter is replaced by a new one, so make optimizers afterwards. A module on the `meta` device costs nothing
    before: the peak is then the module itself and one tensor more.

    Args:
        module:          The network, on any device.
        path:            File, or folder with `checkpoint-last.pth` or `checkpoint-last.safetensors`.
        what:            What the weights are for, in messages: "mar_huge", "the VAE".
        ignore_prefixes: Entries of the file that may be there and are not read, e.g. ("loss.",).
        dtype:           Type of floating-point entries. Default: as in `module`.
        device:          Where to. Default: where `module` is, or the CPU if that is `meta`.
        identify:        Given the shapes in a file that does not fit, names what it is for ("mar_base"), or None.

    Raises:
        InputError: The file is missing, unreadable, damaged, would run code, or has other names or shapes.
    """
    path = find_weights(path, what)
    entry, tensors = _select_entry(path, _read(path))
    tensors = {name: value for name, value in tensors.items() if not str(name).startswith(tuple(ignore_prefixes))}
    expected = module.state_dict()
    _check_fit(path, what, expected, tensors, identify)

    for name in list(tensors):
        tensor, current = tensors.pop(name), expected.pop(name)
        target_dtype = dtype if dtype is not None and current.is_floating_point() else current.dtype
        target_device = device if device is not None else "cpu" if current.is_meta else current.device
        # `copy` detaches the weights from the mapped file, which may be replaced while we run.
        tensor = tensor.detach().to(target_device, target_dtype, copy=True).contiguous()
        owner_name, _, attribute = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        parameter = owner._parameters.get(attribute)
        if parameter is not None:
            tensor = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        setattr(owner, attribute, tensor)

    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            assert not buffer.is_meta, f"{type(owner).__name__}.{name} is on the meta device and in no checkpoint"
            if device is not None:
                setattr(owner, name, buffer.to(device))
    metadata = _read_metadata(path)
    is_ema = entry == "model_ema" or (entry == "flat" and _is_marked_as_ema(f"{path.name} {metadata}"))
    return LoadedWeights(path, entry, is_ema, metadata)


def save_safetensors(
    state_dict: Mapping[str, torch.Tensor], path: str | os.PathLike, metadata: Mapping[str, str]
) -> None:
    """Write tensors, from any device, and the strings of `metadata` to a `.safetensors` file, atomically.

    Raises:
        InputError: The file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    try:
        with atomic_write(path) as partial:
            safetensors.torch.save_file(tensors, partial, metadata=dict(metadata))
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from error


def find_weights(path: str | os.PathLike, what: str) -> Path:
    """Find the file of weights that a path names: the file itself, or a folder with `checkpoint-last.pth` in it.

    `what` is what the weights are for, in messages. Raises InputError if there is no such file, or if it is a
    placeholder: empty, a Git LFS pointer or a web page.
    """
    file = path = Path(path)
    if path.is_dir():
        candidates = [path / "checkpoint-last.pth", path / "checkpoint-last.safetensors"]
        file = next((candidate for candidate in candidates if candidate.exists()), candidates[0])
    fetch = _download_command(file)
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
    if looks_like_web_page(head):
        way_out = fetch or "get the file itself (a Dropbox link must end in dl=1)"
        raise InputError(f"{file} is a web page saved under this name; delete it and {way_out}")
    return file


def _download_command(file: Path) -> str | None:
    """Say how to fetch `file`, if it is where a public download goes; None if it is not."""
    for name, remote in FILES.items():
        if file.match(remote.path):
            root = file.absolute().parents[len(Path(remote.path).parts) - 1]
            option = "" if root == Path(OUTPUT_DIR).absolute() else f" --output_dir {root}"
            return f"fetch it with `python -m util.weights.download {name}{option}`"
    return None


def _read(path: Path) -> dict:
    """Read a PyTorch or safetensors file; tensors stay in the mapped file until they are used."""
    with path.open("rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{":  # safetensors: 8 bytes of length, then JSON
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        with _namespace_allowed():
            contents = torch.load(str(path), map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    # A damaged file can fail anywhere in the reader, with whatever that line of the reader raises.
    except Exception as error:
        refused = re.search(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]+)", str(error))
        if refused is None:
            raise InputError(
                f"{path} is truncated, damaged or no checkpoint at all ({why_unreadable(error)}); "
                f"delete it and {_download_command(path) or 'get it again'}"
            ) from error
        name = refused[1].rstrip(".")
        way_out = "get it from a source you trust, saved as a state dict or .safetensors"
        if name == "argparse.Namespace":
            way_out = f"upgrade torch {torch.__version__} to 2.4 or newer, or save its state dict alone"
        raise InputError(f"{path} refers to {name}, which could run code, and is not loaded; {way_out}") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds a {type(contents).__name__}, not a dict of weights; get it again")
    return contents


def _read_metadata(path: Path) -> Mapping[str, str]:
    """Return the metadata of a `.safetensors` file; nothing if it has none, or is another file."""
    with contextlib.suppress(safetensors.SafetensorError), safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}
    return {}


def _is_marked_as_ema(words: str) -> bool:
    """True if words about a file, its name among them, say that its weights are averages."""
    return re.search(r"(?<![a-z])ema(?![a-z])", words.lower()) is not None


def _namespace_allowed() -> contextlib.AbstractContextManager:
    """Let `torch.load(weights_only=True)` pass over a training run's `args`; a Namespace is only a bag of values."""
    if hasattr(torch.serialization, "safe_globals"):  # torch >= 2.5
        return torch.serialization.safe_globals([argparse.Namespace])
    if hasattr(torch.serialization, "add_safe_globals"):  # torch 2.4
        torch.serialization.add_safe_globals([argparse.Namespace])
    return contextlib.nullcontext()


def _select_entry(path: Path, contents: dict) -> tuple[str, dict]:
    for entry in ("model_ema", "model"):
        if isinstance(contents.get(entry), dict):
            return entry, dict(contents[entry])
    if contents and all(isinstance(value, torch.Tensor) for value in contents.values()):
        return "flat", contents
    held = ", ".join(str(key) for key in list(contents)[:5]) or "nothing"
    raise InputError(f"{path} has neither a model_ema nor a model entry (it holds {held}); name a file with weights")


def _check_fit(
    path: Path, what: str, expected: Mapping[str, torch.Tensor], tensors: Mapping, identify: Callable | None
) -> None:
    """Raise InputError unless the names and shapes are those of the network, and the values plain tensors."""
    faults = []
    missing = [name for name in expected if name not in tensors]
    unexpected = [str(name) for name in tensors if name not in expected]
    common = [name for name in expected if name in tensors]
    for fault, names in (("lacks", missing), ("has the unknown", unexpected)):
        if names:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            faults.append(f"{fault} {', '.join(names[:2])}{more}")
    unusable = [name for name in common if not _is_plain(tensors[name], expected[name])]
    if unusable:
        faults.append(f"has no usable numbers in {', '.join(unusable[:2])}")
    misshapen = [n for n in common if n not in unusable and tensors[n].shape != expected[n].shape]
    if misshapen:
        name = misshapen[0]
        more = f" ({len(misshapen)} such)" if len(misshapen) > 1 else ""
        faults.append(f"has {name} {list(tensors[name].shape)} for {list(expected[name].shape)}{more}")
    if not faults:
        return
    shapes = {name: value.shape for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    found = identify(shapes) if identify else None
    verdict = f"is a {found} checkpoint, not {what}" if found and found != what else f"does not fit {what}"
    raise InputError(f"{path} {verdict}: it {', '.join(faults)}; name the file and the model that belong together")


def _is_plain(value: object, expected: torch.Tensor) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
        and value.is_floating_point() == expected.is_floating_point()
    )
