"""The folder of a job that compresses a model part by part: what is done, and whose it is.

- `job.json`: what the job is: model, passes, data, seed, versions.
- `part-003.pt2`: a part that is done.
- `part-003.json`: what its passes did; written last, so that a part without it is not done.
- `values/`: what goes into the part under way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqcompile.errors import FileError
from sqcompile.files import atomic_file
from sqcompile.metrics import Distance
from sqcompile.pipeline.manager import PassRecord
from sqcompile.program import Program
from sqcompile.remarks import Remark
from sqcompile.statistics import Size

_VERSION = 1
_JOB = "job.json"


class WorkDir:
    """The folder of one job.

    Args:
        folder: The folder; made if it is missing.
        job: What decides the result, by name: another job must not go on in this folder.

    Raises:
        FileError: If the folder belongs to another job, holds something else, or cannot be written to.
    """

    def __init__(self, folder: Path, job: Mapping[str, str]) -> None:
        self.folder = folder
        wanted = {"version": str(_VERSION), **job}
        path = folder / _JOB
        if path.is_file():
            _compare(path, wanted)
            return
        others = sorted(item.name for item in folder.glob("*")) if folder.is_dir() else []
        if any(name.startswith("part-") or name == "values" for name in others):
            raise FileError(
                f"'{folder}' holds parts of a job, and nothing says of which.",
                where=str(folder),
                seen=", ".join(others[:5]),
                expected=f"{_JOB} beside them, or a folder without parts",
                next_step="name another work_dir, or remove these files",
            )
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")

    @property
    def values(self) -> Path:
        """Where values between parts lie."""
        return self.folder / "values"

    @property
    def scratch(self) -> Path:
        """Where values inside the part under way may lie."""
        return self.folder / "values" / "inside"

    def is_done(self, index: int) -> bool:
        """Whether a part is done."""
        return self._record(index).is_file()

    def save(self, index: int, program: Program) -> None:
        """Keep a part's result; it counts once `finish` was called.

        Raises:
            FileError: If it cannot be written.
        """
        program.save(self._program(index))

    def finish(self, index: int, facts: Mapping[str, Any], records: list[PassRecord]) -> None:
        """Say that a part is done: its result and the values behind it are on disk.

        Raises:
            FileError: If it cannot be written.
        """
        content = {"facts": dict(facts), "passes": [asdict(record) for record in records]}
        with atomic_file(self._record(index)) as temporary:
            temporary.write_text(json.dumps(content, default=str) + "\n", encoding="utf-8")

    def load(self, index: int) -> Program:
        """Return a part's result; its tensors are mapped from the file.

        Raises:
            FileError: If it is missing or damaged.
        """
        return Program.load(self._program(index))

    def record(self, index: int) -> tuple[dict[str, Any], list[PassRecord]]:
        """Return the facts of a part, and what its passes did.

        Raises:
            FileError: If it is damaged.
        """
        path = self._record(index)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return dict(content["facts"]), [_pass_record(item) for item in content["passes"]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise FileError(
                "What a finished part did cannot be read.",
                where=str(path),
                seen=f"{type(error).__name__}: {error}",
                expected="a file that the same job wrote",
                next_step="remove this file: the part is then compressed again, and all behind it",
            ) from error

    def clear_values(self) -> None:
        """Remove the values between parts: all parts are done."""
        shutil.rmtree(self.values, ignore_errors=True)

    def _program(self, index: int) -> Path:
        return self.folder / f"part-{index:03d}.pt2"

    def _record(self, index: int) -> Path:
        return self.folder / f"part-{index:03d}.json"


def _compare(path: Path, wanted: Mapping[str, str]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found = {str(key): str(value) for key, value in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise FileError(
            f"'{path}' describes no job.",
            where=str(path),
            seen=f"{type(error).__name__}: {error}",
            expected="what sqcompile wrote when the job began",
            next_step="name another work_dir, or remove this one to start anew",
        ) from error
    different = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if different:
        raise FileError(
            f"'{path.parent}' belongs to another job.",
            where=str(path),
            seen="; ".join(f"{key}: {found.get(key, 'not there')}" for key in different),
            expected="; ".join(f"{key}: {wanted.get(key, 'not there')}" for key in different),
            next_step="name another work_dir, or remove this one to start anew; nothing in it was changed",
        )


def _pass_record(item: dict[str, Any]) -> PassRecord:
    distance = item["distance"]
    return PassRecord(
        text=item["text"],
        changes=item["changes"],
        seconds=item["seconds"],
        check_seconds=item["check_seconds"],
        size=Size(**item["size"]),
        distance=None if distance is None else Distance(**distance),
        remarks=tuple(Remark(**remark) for remark in item["remarks"]),
        facts=item["facts"],
    )
