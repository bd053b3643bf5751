"""Results that outlive the command that measured them: a small JSON file each, whole or known to be damaged."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path

from util.errors import InputError
from util.files import atomic_write

FORMAT = 2  # of what results hold; raised when it changes


class Results:
    """The result files of a folder, by name. Each holds a digest of its content, so that no damage goes unnoticed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def read(self, name: str) -> dict | None:
        """A result; None if there is none. Raises InputError if its file is damaged."""
        path = self.path(name)
        try:
            file = json.loads(path.read_text())
            if file["format"] != FORMAT:
                raise ValueError("another version of this program wrote it")
            if file["digest"] != _digest(file["result"]):
                raise ValueError("its content does not match its digest")
            return file["result"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is damaged or of another version ({error!r}): run reproduce.py again, which makes it anew"
            ) from None

    def write(self, name: str, result: dict) -> None:
        """Add the date and write the result. Raises InputError if that cannot be done."""
        result = {**result, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        try:
            file = {"format": FORMAT, "digest": _digest(result), "result": result}
            with atomic_write(self.path(name)) as partial:
                partial.write_text(json.dumps(file, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path(name)}: {error.strerror}") from error


def _digest(result: dict) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]
