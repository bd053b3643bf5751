"""A file that cannot be read is named in one sentence, without a library's advice to read it unsafely."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from util.errors import InputError
from util.scoring.scores import Statistics, load_extractor
from util.training.loop import fit
from util.weights.checkpoint import load_weights


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.abort, ()


def text(path: Path) -> None:
    path.write_text("hello world")


def nothing(path: Path) -> None:
    path.touch()


def half_a_checkpoint(path: Path) -> None:
    torch.save({"weight": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def pickled_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Code()))


def checkpoint_with_code(path: Path) -> None:
    torch.save({"model": Code()}, path)


def arrays_of_objects(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, mu=np.array([Code()]), sigma=np.array([Code()]))


READERS = {
    "weights": lambda path: load_weights(torch.nn.Linear(1, 1), path, what="a layer"),
    "Inception": lambda path: load_extractor("inception", path),
    "statistics": lambda path: Statistics.load(path, 3),
    "training": lambda path: fit(
        torch.nn.Linear(1, 1), None, folder=path.parent, steps=1, lr=0.1, device=torch.device("cpu")
    ),
}
FILES = (text, nothing, half_a_checkpoint, pickled_code, checkpoint_with_code, arrays_of_objects)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", FILES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_it_is_named_without_advice_to_read_it_unsafely(read, write, tmp_path):
    path = tmp_path / "training.pt"
    write(path)
    with pytest.raises(InputError) as refused:
        read(path)
    message = str(refused.value)
    assert str(path) in message and "\n" not in message
    assert not any(advice in message for advice in ("weights_only", "allow_pickle", "unsafe", "trust the file"))
