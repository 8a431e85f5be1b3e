"""The run directory: the one interface between programs. Every file is whole or absent; metrics are append-only.

runs/NAME/config.yaml  paths.json  manifest.json  metrics.jsonl  checkpoints/  adapter/  eval/  samples/
          continued.json, where a run was made longer
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import Config, TrainConfig, dump_config, load_config
from mlxdpo.io.atomic import append_line, naming, write_first, write_json, write_text
from mlxdpo.io.json_file import as_written, read_json, read_lines
from mlxdpo.types import UserError

HOLDER = ".training"  # in a run directory: the number of the process that trains it


_TEXT_OR_NONE = (str, type(None))
MANIFEST: Mapping[str, Mapping[str, Any]] = {
    "model": {"source": str, "revision": _TEXT_OR_NONE, "digest": str, "dtype": str, "adapter": _TEXT_OR_NONE,
              "quantization": (dict, type(None))},
    "reference": {"digest": str, "dtype": str, "adapter": _TEXT_OR_NONE, "quantization": (dict, type(None))},
    "reference_source": {"model": str, "adapter": _TEXT_OR_NONE},
    "data": {"source": str, "digest": _TEXT_OR_NONE, "pairs": int, "heldout": int, "reports": dict},
    "machine": {"kind": str, "name": str, "memory": int, "system": str},
    "versions": {},
}  # fmt: skip
"""What `manifest.json` holds at least, with the kinds of the values; besides: `template`, text, and `seed`, whole."""


def check_manifest(found: Mapping[str, Any]) -> None:
    """Raise `KeyError` or `TypeError` naming the first thing that is missing in a manifest or of another kind."""
    for part, fields in MANIFEST.items():
        if not isinstance(found[part], dict):
            raise TypeError(f"{part} is not an object")
        for field, kind in fields.items():
            if not isinstance(found[part][field], kind):
                raise TypeError(f"{part}.{field} is {type(found[part][field]).__name__}")
    if not isinstance(found["template"], str) or not isinstance(found["seed"], int):
        raise TypeError("template is not text, or seed is not a number")
    for report in found["data"]["reports"].values():
        if not all(isinstance(report.get(part, {}), dict) for part in ("refused", "changed")):
            raise TypeError("data.reports contains something other than reports")


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A folder, to be locked: a lock on one of its files would be lost when that file is written anew."""
    number = os.open(folder, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)


def _took_lock(file: int, kind: int, patience: float) -> bool:
    """Whether the lock on an open file could be taken within `patience` seconds; it is gone when the file is closed."""
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)


PATHS = "paths.json"
INPUTS = ("model.path", "model.adapter", "reference.model", "reference.adapter", "data.path", "data.eval")
"""Settings that may name a file or folder."""


class InputPlace(NamedTuple):
    """Where an input lay when a run was made: by itself, and from the run's folder `made`."""

    absolute: str
    relative: str
    made: str

    def find(self, name: str, run: Path) -> str | None:
        """Where it is now: as it was named, as it was, as it lies from `run`; None where it is gone."""
        if os.path.abspath(os.path.expanduser(name)) == self.absolute and os.path.exists(self.absolute):
            return name
        beside = os.path.join(os.path.realpath(run), self.relative)
        places = (self.absolute, os.path.normpath(beside))
        return next((place for place in places if os.path.exists(place)), None)


def _input(config: Config, setting: str) -> str:
    """The name that a setting of `INPUTS` has; empty where it has none."""
    section, key = setting.split(".")
    return getattr(getattr(config, section), key) or ""


def input_paths(config: Config, run: Path) -> dict[str, Any]:
    """What `paths.json` holds: the run's folder, and each input that is a file or a folder here."""
    made = os.path.abspath(run)
    found: dict[str, Any] = {"run": made}
    for setting in INPUTS:
        name = _input(config, setting)
        absolute = os.path.abspath(os.path.expanduser(name)) if name else ""
        if name and os.path.exists(absolute):
            real = os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
            relative = os.path.relpath(real, os.path.realpath(run))
            found[setting] = {"given": name, "absolute": absolute, "relative": relative}
    return found


def _places_inside(config: Config) -> dict[str, InputPlace]:
    """Of a run without `paths.json`: the inputs below the place where it was made."""
    found = {}
    for setting in INPUTS:
        name = _input(config, setting)
        if name and config.out and Path(name).is_relative_to(config.out):
            found[setting] = InputPlace(os.path.abspath(name), str(Path(name).relative_to(config.out)), config.out)
    return found


CONTINUED = "continued.json"
LENGTH = ("epochs", "steps", "patience")
"""The settings of `train` that may change when a run goes on: how long it trains, not what a step computes."""


def with_length(config: Config, given: Mapping[str, Any]) -> Config:
    """`config` with what `given` says of `LENGTH`; of epochs and steps, what is not given is not asked for any more."""
    known = {name: given[name] for name in LENGTH if name in given}
    if known.get("epochs", "auto") != "auto" or known.get("steps") is not None:
        known = {"epochs": "auto", "steps": None} | known
    train = TrainConfig.model_validate(config.train.model_dump() | known)
    return config.model_copy(update={"train": train})


@dataclass(frozen=True)
class Run:
    """A run directory. Paths only; reading and writing go through its methods."""

    path: Path

    @classmethod
    def create(cls, config: Config) -> Run:
        """Make the directory named by `config.out`, or the next free runs/<model>-<data>-<number>.

        Raises `UserError` when it already holds a run.
        """
        if config.out:
            path = Path(config.out)
            if (path / "config.yaml").exists():
                raise UserError(f"{path} already holds a run; choose another --out or continue it with --resume {path}")
        else:
            stem = f"{Path(config.model.path).name}-{Path(config.data.path).stem}".lower()
            path = next(p for n in range(1, 10**6) if not (p := Path("runs") / f"{stem}-{n}").exists())
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot make the run directory ({error.strerror})") from None
        try:
            write_first(path / "config.yaml", dump_config(config))
        except FileExistsError:
            raise UserError(f"{path}: another process just started a run there; choose another --out") from None
        write_json(path / PATHS, input_paths(config, path))
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run. Raises `UserError` when the directory holds none."""
        run = cls(Path(path))
        if not os.path.exists(run.path / "config.yaml"):  # unlike Path.exists, it answers for every name
            raise UserError(f"{path}: no config.yaml in it; expected a run directory such as runs/NAME")
        return run

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the run directory for writing while the context lasts; the system lets go when the process ends.

        Raises `UserError` naming the process that holds it. What a killed one left behind holds nothing.
        """
        with _opened(self.path) as lock:
            if not _took_lock(lock, fcntl.LOCK_EX, patience=1.0):  # `held` takes it for an instant
                raise UserError(f"{self.path}: {self._holder()} is training this run; stop it first, or wait")
            note = self.path / HOLDER
            with naming(note):
                note.write_text(f"{os.getpid()}\n")
            try:
                yield
            finally:
                note.unlink(missing_ok=True)

    def _holder(self) -> str:
        """Who holds the lock, in words; the note beside it counts only while the lock is held."""
        try:
            return f"process {int((self.path / HOLDER).read_text())}"
        except (OSError, ValueError):
            return "another process"

    def held(self) -> bool:
        """Whether a process holds the run directory for writing now."""
        if not os.path.isfile(self.path / "config.yaml"):  # a pipe would be waited for
            return False
        with _opened(self.path) as lock:
            return not _took_lock(lock, fcntl.LOCK_SH, patience=0.0)

    def config(self) -> Config:
        """The resolved configuration; what it names is looked for where it was, then where it lies from the run."""
        config = self._settings()
        for name, place in self._places(config).items():
            section, key = name.split(".")
            found = place.find(_input(config, name), self.path) or place.absolute
            changed = getattr(config, section).model_copy(update={key: found})
            config = config.model_copy(update={section: changed})
        return config

    def check_trained(self) -> None:
        """Raise `UserError` for a run that is made of others (`inference.mixtures`): nothing in it can go on."""
        if (self.path / "manifest.json").exists() and "made_of" in read_json(self.path / "manifest.json"):
            raise UserError(
                f"{self.path}: is made of other runs and was not trained; start a new run from it with "
                f"--model.adapter {self.adapter}"
            )

    def need(self, *names: str, instead: str = "") -> None:
        """Raise `UserError` where one of the inputs `names` (`data.path`, ...) is gone, naming where it was; `instead`
        is another way out."""
        config = self._settings()
        for name, place in self._places(config).items():
            if name in names and place.find(_input(config, name), self.path) is None:
                raise UserError(
                    f"{self.path}: its {name} no longer exists: the run was made in {place.made} with "
                    f"{place.absolute}; restore it there, or at {place.relative} relative to the run{instead}"
                )

    def _places(self, config: Config) -> dict[str, InputPlace]:
        """Where the files and folders that the run was given lay, by setting; not of those changed in config.yaml."""
        file = self.path / PATHS
        if not file.exists():
            return _places_inside(config)
        found = read_json(file)
        with as_written(file):
            kept = [n for n in INPUTS if n in found and found[n]["given"] == _input(config, n)]
            return {n: InputPlace(found[n]["absolute"], found[n]["relative"], found["run"]) for n in kept}

    def _settings(self) -> Config:
        """What the run was asked to do, as it was given."""
        config = load_config(self.path / "config.yaml")
        if not (longer := self.continued()):
            return config
        with as_written(self.path / CONTINUED):
            return with_length(config, longer[-1])

    def continued(self) -> list[dict[str, Any]]:
        """How the run was made longer, oldest first: its settings of `LENGTH` since then, and the `step` from which."""
        file = self.path / CONTINUED
        if not file.exists():
            return []
        with as_written(file):
            return [{name: entry[name] for name in ("step", *LENGTH)} for entry in read_json(file)["continued"]]

    def make_longer(self, config: Config, step: int) -> None:
        """From `step` on the run trains as long as `config` says; config.yaml stays as it was given."""
        entry = {"step": step} | {name: getattr(config.train, name) for name in LENGTH}
        write_json(self.path / CONTINUED, {"continued": [*self.continued(), entry]})

    def settle(self, section: str, **values: Any) -> None:
        """Write settings that the recipe left open into the configuration, as they were found."""
        file = self.path / "config.yaml"
        write_text(file, dump_config(load_config(file, {section: values})))

    def manifest(self) -> dict[str, Any]:
        """What the run was made of: versions, machine, base model, reference, template, data, seed."""
        file = self.path / "manifest.json"
        if not file.exists():
            raise UserError(f"{file}: missing; the run stopped before its first step, start it again")
        found = read_json(file)
        with as_written(file):
            check_manifest(found)
        return found

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Save the manifest."""
        write_json(self.path / "manifest.json", manifest)

    @property
    def adapter(self) -> Path:
        """The final adapter's folder."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line of metrics."""
        append_line(self.path / "metrics.jsonl", values)

    def metrics(self) -> list[dict[str, Any]]:
        """All metrics so far. Lines of steps that a resume went back behind are history, and left out.

        Raises `UserError` naming the first line that is damaged or says no step.
        """
        kept: list[dict[str, Any]] = []
        for number, line in enumerate(read_lines(self.path / "metrics.jsonl"), 1):
            if not isinstance(line.get("resumed_from", line.get("step")), int):
                raise UserError(f"{self.path / 'metrics.jsonl'}:{number}: has no step; remove the line")
            if other := next((n for n, v in line.items() if not isinstance(v, int | float | None)), None):
                raise UserError(f"{self.path / 'metrics.jsonl'}:{number}: `{other}` is not a number; remove the line")
            if "resumed_from" in line:
                back = line["resumed_from"]  # from 0 everything is done again, the evaluation of step 0 too
                kept = [old for old in kept if old["step"] <= back] if back else []
            else:
                kept.append(line)
        return kept
