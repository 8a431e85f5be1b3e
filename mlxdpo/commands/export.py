"""`mlxdpo export RUN --to mlx,peft,hf --out DIR [--push USER/REPO]`"""

from __future__ import annotations

import contextlib
import json as jsonlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators
from pydantic import Field, field_validator

from mlxdpo.commands.generate import Strength
from mlxdpo.config import Section
from mlxdpo.runs import Run
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from mlxdpo.exporters import Exported, Fidelity
    from mlxdpo.exporters.source import Choices

Pairs = Annotated[int, Parameter(validator=validators.Number(gte=0))]
# The command line writes --data out as --data.path, which has to stand first.
Data = Annotated[str | None, Parameter(name=["--data.path", "--data"])]


class Making(Section):
    """What the artefacts are made of."""

    base: str | None = None
    """Full-precision model (folder or Hub id) that a run on quantised weights is put onto; targets hf, peft, gguf."""
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    """Bits of the target `quantized`."""
    group_size: Literal[32, 64, 128] = 64
    """Weights that share a scale in the target `quantized`."""
    gguf_type: Literal[
        "auto",
        "f32",
        "f16",
        "bf16",
        "q8_0",
        "q5_1",
        "q5_0",
        "q4_1",
        "q4_0",
        "q6_k",
        "q5_k_m",
        "q4_k_m",
        "q3_k_m",
        "q2_k",
    ] = "auto"
    """Number type of the target `gguf`; auto is that of the weights. Those with a k are packed by `llama-quantize`."""

    ollama_base: str | None = None
    """Model of Ollama's (such as llama3.2:1b) that the target `ollama` puts the adapter alone onto."""
    lmstudio: Literal["mlx", "gguf"] = "mlx"
    """Weights of the target `lmstudio`."""
    ask: Annotated[int, Field(ge=0)] = 0
    """Ask each target's client, where it is installed, so many held-out prompts; `server` is asked 20 anyway."""
    run: bool = False
    """Run `ollama create` on the finished target `ollama`."""

    @field_validator("bits", "group_size", "ask", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        # The command line brings text, and a Literal, unlike an int, takes none.
        return int(value) if isinstance(value, str) and value.isdigit() else value


class Publishing(Section):
    """Where it goes, and what the card says about licences."""

    push: str | None = None
    """Upload to this repository, USER/REPO, when every target passed."""
    public: bool = False
    """Make the repository public; without it a new one is private."""
    dry_run: bool = False
    """With --push: list what would be uploaded, with sizes, and upload nothing."""
    revision: str | None = None
    """Branch to upload to, or a pull request of yours to continue (refs/pr/3)."""
    tag: str | None = None
    """Tag for the uploaded commit."""
    with_heldout: bool = False
    """With --push: publish the held-out pairs too; a run that was pulled is then evaluated without --data."""
    pull_request: bool = False
    """Propose the upload as a pull request."""
    license: str | None = None
    """Licence of the base model, as the Hub spells it; looked up in its card when not given."""
    data_license: str | None = None
    """Licence of the preference data."""


AS_TRAINED, HERE = Making(), Publishing()


def run(
    path: Path,
    /,
    *,
    to: str,
    out: Path,
    strength: Strength = 1.0,
    data: Data = None,
    pairs: Pairs = 32,
    making: Annotated[Making, Parameter(name="*")] = AS_TRAINED,
    publishing: Annotated[Publishing, Parameter(name="*")] = HERE,
    force: bool = False,
    json: bool = False,
) -> int:
    """Write a run in formats that other programs load, and verify each on held-out pairs.

    Targets: mlx (adapter for mlx_lm), peft (adapter for torch), hf (fused Hugging Face weights), fused (fused MLX
    weights), quantized (fused, then packed again), gguf (llama.cpp), gguf-lora (the adapter alone for llama.cpp),
    ollama (Modelfile and weights), lmstudio (the folder that it scans, and a preset), server (for
    mlx_lm.server). Exit status 1: a target lost the tuning.

    Args:
        path: Run directory.
        to: Targets, separated by commas.
        out: Folder to create; an earlier export in it is replaced.
        strength: Export the run at this strength (mlxdpo dial); the gate compares with the run at that strength.
        data: Held-out pairs to measure on; default: those of the run's recipe.
        pairs: Number of pairs; 0 uses all.
        force: Also keep targets that failed. They are never pushed.
        json: Print the record as JSON.
    """
    from mlxdpo.commands.terminal import console, warn
    from mlxdpo.exporters import export
    from mlxdpo.inference.mixtures import run_at

    check_switches(making, publishing, to)
    if strength == 0:
        raise UserError("--strength 0 is the model before tuning; there is nothing to export")
    source = run_at(Run.open(path), strength)
    # mlx-lm prints a line when it packs weights, where a machine reads JSON.
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        exported = export(
            source,
            [name for name in to.replace(" ", "").split(",") if name],
            out,
            data=data,
            pairs=pairs,
            ask=making.ask,
            choices=_choices(making, publishing),
            **_published(publishing),
            force=force,
            say=warn if json else (lambda text: console.print(text, style="dim", markup=False)),
        )
    show_export(exported, json, source.config().model.path)
    _create_model(exported, making)
    if exported.passed and publishing.push:
        publish_export(out, publishing, json)
    return 0 if exported.passed else 1


def _choices(making: Making, publishing: Publishing) -> Choices:
    from mlxdpo.exporters.source import Choices

    publisher: dict[str, Any] = {"publisher": publishing.push.split("/")[0]} if publishing.push else {}
    return Choices(**making.model_dump(exclude={"ask", "run"}), **publisher)


def _published(publishing: Publishing) -> dict[str, Any]:
    from mlxdpo.exporters.sections import Licences

    licences = Licences(publishing.license, publishing.data_license)
    return {"licences": licences, "repo": publishing.push, "with_heldout": publishing.with_heldout}


def _check_ollama(making: Making, to: str) -> None:
    from mlxdpo.exporters.modelfile import refuse_run_without_tool

    if not making.run:
        return
    if "ollama" not in to.split(","):
        raise UserError("--run makes a model of the target ollama; add it to --to, or drop --run")
    refuse_run_without_tool()


def _create_model(exported: Exported, making: Making) -> None:
    from mlxdpo.exporters.modelfile import create_model

    if making.run and exported.passed:
        create_model(exported.out / exported.targets["ollama"].folder, exported.run)


def show_export(exported: Exported, json: bool, base: str) -> None:
    """The figures on standard output, failures on standard error."""
    from mlxdpo.commands.terminal import console, warn

    if json:
        print((exported.out / "export.json").read_text("utf-8"), end="")
    else:
        console.print(gate_table(exported))
        show_files(exported, console, base)
    for name, target in exported.targets.items():
        if target.fidelity.reason:
            kept = "kept by --force" if target.kept else "its files were deleted"
            warn(f"{name}: {target.fidelity.reason}; {kept}")


def check_switches(making: Making, publishing: Publishing, to: str) -> None:
    """Raise `UserError` for a switch that has nothing to act on, before the work begins."""
    from mlxdpo.exporters.client import check_repo_id

    _check_ollama(making, to)

    if publishing.push:
        check_repo_id(publishing.push)
    asked = publishing.model_dump(include={"public", "dry_run", "revision", "tag", "with_heldout", "pull_request"})
    if not publishing.push and (idle := [name for name, value in asked.items() if value]):
        raise UserError(f"--{idle[0].replace('_', '-')} needs --push USER/REPO; add it or drop the switch")
    if publishing.pull_request and (publishing.revision or publishing.tag):
        raise UserError("--pull-request makes its own branch; drop --revision and --tag")


def gate_table(exported: Exported) -> Any:
    """What the gate measured, one row a target."""
    from rich.table import Table

    from mlxdpo.exporters.usage import client_words

    columns = ("target", "MB", "token KL", "lost", "slope", "corr.", "accuracy", "gate", "client")
    sheet = Table(*columns, box=None, padding=(0, 1, 0, 0), pad_edge=False)  # all of them fit 80 columns
    for name, target in exported.targets.items():
        verdict = "passed" if target.fidelity.passed else "forced" if target.kept else "FAILED"
        size = f"{sum(target.files.values()) / 1e6:.1f}" if target.kept else "-"
        sheet.add_row(name, size, *gate_figures(target.fidelity), verdict, client_words(target))
    return sheet


def next_command(exported: Exported, name: str, base: str) -> str | None:
    """The command that starts the target's client, where it takes one; `base` is the model under an adapter."""
    from mlxdpo.exporters.modelfile import create_command
    from mlxdpo.model.policy import find_model

    folder = exported.out / exported.targets[name].folder
    if name == "ollama":
        return shlex.join(create_command(folder, exported.run))
    if name == "server":
        adapter = "adapters.safetensors" in exported.targets[name].files
        model = (
            ["--model", str(find_model(base)), "--adapter-path", str(folder)] if adapter else ["--model", str(folder)]
        )
        return shlex.join(["mlx_lm.server", *model])
    return None


def gate_figures(fidelity: Fidelity) -> list[str]:
    """The numbers of one target: KL in nats a token, its share of what was learned, slope, correlation, accuracy."""
    kl, learned = fidelity.token_kl, fidelity.policy_reference_kl
    number = lambda value: "-" if value is None else f"{value:.4f}"  # noqa: E731
    change = fidelity.accuracy_artefact - fidelity.accuracy_run
    return [
        f"{kl:.2e}",
        f"{kl / learned:.2%}" if learned else "-",
        number(fidelity.slope),
        number(fidelity.correlation),
        f"{fidelity.accuracy_artefact:.3f} {change:+.3f}",
    ]


def show_files(exported: Exported, console: Any, base: str) -> None:
    """What was measured on which data, where the files are, the exporters' remarks, and the next command."""
    first = next(iter(exported.targets.values())).fidelity
    console.print(
        f"on {first.pairs} pairs, {first.tokens} tokens of {exported.data}; lost: token KL to the run as a share of "
        f"{first.policy_reference_kl:.3g} nats, which training moved the model by",
        markup=False,
    )
    for name, target in exported.targets.items():
        if target.kept:
            note = f": {target.note}" if target.note else ""
            console.print(f"{name} -> {exported.out / target.folder}{note}", markup=False)
            if command := next_command(exported, name, base):
                console.print(f"    {command}", markup=False, soft_wrap=True)
    console.print(f"model card -> {exported.out / 'README.md'}", markup=False)


def publish_export(out: Path, publishing: Publishing, json: bool) -> None:
    """Upload, propose or list, as asked."""
    from mlxdpo.commands.terminal import console, warn
    from mlxdpo.exporters.hub import dry_run, propose, push

    say = warn if json else (lambda text: console.print(text, markup=False))
    assert publishing.push is not None
    visibility = "public" if publishing.public else "private"
    if publishing.dry_run:
        files, left = dry_run(out)
        for file in files:
            say(f"{file.size:>14,}  {file.name}")
        for file in left:
            say(f"     stays here  {file.name}: {file.reason}")
        say(f"dry run: {len(files)} files, {sum(f.size for f in files):,} bytes for {publishing.push} ({visibility})")
        return
    if publishing.pull_request:
        done = propose(out, publishing.push, visibility=visibility, say=say)
    else:
        done = push(
            out, publishing.push, visibility=visibility, revision=publishing.revision, tag=publishing.tag, say=say
        )
    say(f"pushed {len(done.files)} files: {done.pull_request or done.url}")
    if json:
        warn(jsonlib.dumps({"commit": done.commit, "revision": done.revision, "tag": done.tag}))
