"""An export: refuse early, measure the run, write each target aside, load it again, keep what passed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.data.read import heldout_source, read_pairs
from mlxdpo.data.sources import is_hub_dataset, read_rows
from mlxdpo.exporters import gguf, hf, lmstudio, mlx, modelfile, peft
from mlxdpo.exporters.ask import ClientReport, asker, questions_of
from mlxdpo.exporters.card import write_card
from mlxdpo.exporters.record import CARD, HELDOUT, RECORD, RUN, Exported, Fidelity, Target, write_record
from mlxdpo.exporters.sections import Licences
from mlxdpo.exporters.source import Choices, ExportSource
from mlxdpo.exporters.usage import REPO
from mlxdpo.exporters.verify import RunReference, measure_fidelity, measure_on_packed_base, run_reference
from mlxdpo.inference.trained_run import TrainedRun, encode_pairs, heldout_pairs, open_trained_run
from mlxdpo.io.atomic import asking_why, write_text
from mlxdpo.io.staging import publish_folder, staging_folder
from mlxdpo.machine.device import versions
from mlxdpo.runs import Run
from mlxdpo.types import Example, Preference, UserError

Write = Callable[[ExportSource, Path], str | None]


class Exporter(NamedTuple):
    """One kind of artefact: what it refuses, how it is written into an empty folder, how it is loaded back.

    `others` are further ways to write it, by name, tried when the gate (`measure`) refuses the first.
    """

    refuse: Callable[[ExportSource], None]
    write: Write
    reload: Callable[[ExportSource, Path], nn.Module]
    relation: str
    others: Callable[[ExportSource], Mapping[str, Write]] = lambda source: {}
    measure: Callable[[RunReference, nn.Module, bool], Fidelity] = measure_fidelity


def _accepts(source: ExportSource) -> None:
    """Anything that mlx-lm trains goes into its own formats."""


EXPORTERS = {
    "mlx": Exporter(mlx.refuse_adapter, mlx.write_adapter, mlx.reload_adapter, "adapter"),
    "peft": Exporter(peft.refuse_peft, peft.write_peft, peft.reload_peft, "adapter"),
    "hf": Exporter(hf.refuse_hf, hf.write_hf, hf.reload_hf, "finetune"),
    "fused": Exporter(_accepts, mlx.write_fused, mlx.reload_model, "finetune"),
    "quantized": Exporter(mlx.refuse_quantized, mlx.write_quantized, mlx.reload_model, "quantized", mlx.other_packings),
    "packed-base": Exporter(
        mlx.refuse_packed_base,
        mlx.write_packed_base,
        mlx.reload_packed_base,
        "quantized",
        measure=measure_on_packed_base,
    ),
    "gguf": Exporter(gguf.refuse_gguf, gguf.write_gguf, gguf.reload_gguf, "quantized"),
    "gguf-lora": Exporter(gguf.refuse_lora, gguf.write_lora, gguf.reload_lora, "adapter"),
    "ollama": Exporter(modelfile.refuse_ollama, modelfile.write_ollama, modelfile.reload_ollama, "quantized"),
    "lmstudio": Exporter(lmstudio.refuse_lmstudio, lmstudio.write_lmstudio, lmstudio.reload_lmstudio, "finetune"),
    "server": Exporter(_accepts, mlx.write_served, mlx.reload_served, "adapter"),
}
# The Hub's libraries look at the root of a repository: transformers first (it would take a PEFT adapter beside its own
# weights for the thing to load), then PEFT. Everything else is asked for by its folder.
AT_ROOT = ("hf", "peft")
DEFAULT_PAIRS = 32
WAS = ".was"  # the earlier export, while a new one takes its place


def export(
    run: Run,
    to: Sequence[str],
    out: str | Path,
    *,
    data: str | None = None,
    pairs: int = DEFAULT_PAIRS,
    ask: int = 0,
    choices: Choices = Choices(),  # noqa: B008 (frozen)
    licences: Licences = Licences(),  # noqa: B008
    repo: str | None = None,
    with_heldout: bool = False,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write a run as the targets `to` below `out`, each reloaded and measured on held-out pairs before it is kept.

    `pairs` held-out pairs (0: all) of `data`, or of the run's own. The client of each target is asked `ask` of their
    prompts, where it is on this machine (`server` always; `exporters.ask`). A target that fails the gate leaves no
    files unless `force` is set; the record says so either way. `out` appears whole, in place of an earlier export, or
    not at all. It holds a model card too, for the Hub repository `repo`; what the user wrote in an earlier card stays.
    `with_heldout` publishes the held-out pairs with the run; without it their texts stay here.
    Raises `UserError`, before anything is written, for a target that this run cannot become.
    """
    names, out = _known_targets(to), Path(out)
    _check_out(out)
    rows, _, where = heldout_pairs(run, data)
    published = heldout_lines(run, data, rows) if with_heldout else None
    trained = open_trained_run(run)
    source = ExportSource(trained, choices)
    for name in names:
        EXPORTERS[name].refuse(source)
    rows, examples = _some(trained, rows, pairs)
    ask_of = asker(source, questions_of(source, rows, examples), ask)
    say(f"measuring the run on {len(examples)} pairs of {where}")
    reference = run_reference(trained, examples, say)
    with staged_export(out) as folder:
        targets = {}
        for number, name in enumerate(names, 1):
            say(f"{name} ({number} of {len(names)}): writing, loading again, measuring")
            targets[name] = _make(name, source, reference, folder / target_folder(name, names), force, ask_of)
        exported = _describe(source, out, where, targets)
        write_record(exported, folder)
        if (out / CARD).exists():
            shutil.copyfile(out / CARD, folder / CARD)
        write_card(run, folder, licences, repo or REPO)
        if published is not None:
            write_text(folder / RUN / HELDOUT, published)
        _replace(folder, out)
    return exported


def heldout_lines(run: Run, data: str | None, rows: Sequence[Preference]) -> str:
    """The held-out pairs `rows` as JSON lines: the rows of their source as they stand, which the recipe reads again.

    Raises `UserError` for those of a Hub dataset, and where the lines alone do not give the same pairs.
    """
    config = run.config().data
    path, split = (data, config.split) if data else heldout_source(config) or (config.path, config.split)
    if is_hub_dataset(path):
        raise UserError(f"--with-heldout: the held-out pairs are in {path} on the Hub, where others find them; drop it")
    wanted = {row.where for row in rows}
    try:
        lines = [json.dumps(row, ensure_ascii=False) for where, row in read_rows(path, split) if where in wanted]
    except TypeError as error:
        raise UserError(f"--with-heldout: {path} holds what JSON has no form of ({error}); convert it first") from None
    text = "".join(f"{line}\n" for line in lines)
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder, HELDOUT), text)
        again = read_pairs(config, str(Path(folder, HELDOUT)))[0] if lines else []
    if [(row.prompt, row.chosen, row.rejected) for row in again] != [(r.prompt, r.chosen, r.rejected) for r in rows]:
        raise UserError(
            f"--with-heldout: {len(rows)} pairs of {path} are held out, and their rows alone give {len(again)}; "
            f"write them to a file, name it with data.eval, and train again"
        )
    return text


def target_folder(name: str, names: Sequence[str]) -> str:
    """Where a target lies below the export: at its root for what the Hub's libraries look for there."""
    at_root = next((other for other in AT_ROOT if other in names), None)
    return "." if name == at_root else name


def _known_targets(to: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(to))
    if not names or (unknown := [name for name in names if name not in EXPORTERS]):
        wrong = f"`{unknown[0]}` is not a target" if names else "no target given"
        raise UserError(f"--to: {wrong}; known: {', '.join(EXPORTERS)}")
    return names


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).exists():
        raise UserError(f"{out} exists and is not an earlier export; choose another --out")


def _some(trained: TrainedRun, rows: list, pairs: int) -> tuple[list, list[Example]]:
    """Every k-th of the held-out pairs, so that a sorted file is met all over."""
    chosen = rows if not pairs or pairs >= len(rows) else [rows[i * len(rows) // pairs] for i in range(pairs)]
    return encode_pairs(trained, chosen)[:2]


def staged_export(out: Path) -> contextlib.AbstractContextManager[Path]:
    """A folder beside `out`, removed afterwards unless it was renamed; what killed exports to `out` left goes first.

    One that was killed between the two renames of `_replace` has the earlier export inside: it goes back.
    """

    def rescue(folder: Path) -> None:
        """Put an earlier export back."""
        if (folder / WAS).exists() and not out.exists():
            os.rename(folder / WAS, out)

    return staging_folder(out.parent, f".{out.name}-draft-", rescue)


def _make(
    name: str,
    source: ExportSource,
    reference: RunReference,
    folder: Path,
    force: bool,
    ask_of: Callable[[str, Path], ClientReport | None],
) -> Target:
    folder.mkdir(exist_ok=True)
    before = set(_files(folder))
    note, fidelity = _written_and_measured(name, source, reference, folder, force)
    asked = ask_of(name, folder) if fidelity.passed else None
    if asked is not None and asked.reason is not None:
        fidelity = fidelity._replace(passed=False, reason=asked.reason, forced=force)
    files = {path: size for path, size in _files(folder).items() if path not in before}
    at = folder.name if folder.name == name else "."
    if fidelity.passed or fidelity.forced:
        return Target(at, files, _relation(name, source), fidelity, note, asked=asked and asked._asdict())
    for path in files:
        (folder / path).unlink()
    if at != ".":
        shutil.rmtree(folder)
    return Target(at, {}, _relation(name, source), fidelity, note, False, asked and asked._asdict())


def _written_and_measured(
    name: str, source: ExportSource, reference: RunReference, folder: Path, force: bool
) -> tuple[str | None, Fidelity]:
    """Write a target the first way that the gate lets pass; of several refused ones the last stays."""
    exporter, before, refused = EXPORTERS[name], set(_files(folder)), []
    ways = {"": exporter.write, **exporter.others(source)}
    for way, write in ways.items():
        for path in set(_files(folder)) - before:
            (folder / path).unlink()
        with asking_why(folder):
            note = write(source, folder)
        artefact = exporter.reload(source, folder)
        fidelity = exporter.measure(reference, artefact, force)
        del artefact
        mx.clear_cache()
        if fidelity.passed:
            break
        slope = "none" if fidelity.slope is None else f"{fidelity.slope:.2f}"
        refused.append(f"{way or 'rounded to the nearest'}: slope {slope}, token KL {fidelity.token_kl:.3g} nats")
    if len(ways) == 1 or not refused:
        return note, fidelity
    if fidelity.passed:
        return f"{note} ({'; '.join(refused)}: refused)", fidelity
    hint = "" if source.method == "full" else "; --to packed-base keeps the adapter in floating point"
    return note, fidelity._replace(reason=f"{fidelity.reason} ({'; '.join(refused)}){hint}")


def _files(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}


def _relation(name: str, source: ExportSource) -> str:
    """The Hub's `base_model_relation` of one target."""
    if name in ("fused", "server") and (name == "fused" or mlx.served_whole(source)):
        return "quantized" if source.quantised else "finetune"
    return EXPORTERS[name].relation


def _describe(source: ExportSource, out: Path, where: str, targets: dict[str, Target]) -> Exported:
    # What a reader of the Hub page meets first.
    first = next(name for name in (*AT_ROOT, *EXPORTERS) if name in targets)
    run, config = source.trained.run, source.trained.config
    return Exported(
        out=out,
        run=run.path.resolve().name,
        base_model=source.base_name,
        base_revision=None if source.choices.base else config.model.revision,
        relation=targets[first].relation,
        data=where,
        beta=config.loss.beta,
        versions=versions(),
        targets=targets,
        made_of=run.manifest().get("made_of"),
    )


def _replace(folder: Path, out: Path) -> None:
    """Put the finished folder where `out` is, or was."""
    if not out.exists():
        publish_folder(folder, out)
        return
    with staged_export(out) as old:
        os.rename(out, old / WAS)
        try:
            publish_folder(folder, out)
        except OSError:
            os.rename(old / WAS, out)
            raise
