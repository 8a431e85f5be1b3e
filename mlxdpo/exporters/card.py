"""The model card: what was done to which model with what data, and numbers with their intervals.

README.md      Hub metadata (with a model-index) and text; a part between marks is the user's and survives
training.png   the training curve
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxdpo.config import Config
from mlxdpo.exporters import sections
from mlxdpo.exporters.client import redact
from mlxdpo.exporters.record import CARD, CURVE, Exported, pack_run, read_record
from mlxdpo.exporters.sections import CardNumber, CardNumbers, Licences, known, read_card_numbers
from mlxdpo.io.atomic import write_atomic, write_text
from mlxdpo.io.names import is_hub_id
from mlxdpo.runs import Run
from mlxdpo.types import UserError

# The training curve as a small picture for the card: loss and reward accuracy over steps, held-out points on top.

Lines = Sequence[dict[str, Any]]
INCHES, DPI = (7.2, 2.6), 120
PANELS = (("loss", "loss"), ("rewards/accuracies", "reward accuracy"), ("rewards/margins", "reward margin"))


def draw_curve(metrics: Lines, file: Path) -> bool:
    """Write the picture; False, and no picture, where the metrics hold no training step."""
    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _panel(axes, steps, metrics, name, title)
    write_atomic(file, lambda copy: figure.savefig(copy, format="png", metadata={"Software": None}))
    return True


def _panel(
    axes: Any, steps: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]], name: str, title: str
) -> None:
    shown = [(line["step"], line[name]) for line in steps if line.get(name) is not None]
    held = [(line["step"], line[f"eval_{name}"]) for line in metrics if line.get(f"eval_{name}") is not None]
    if shown:
        axes.plot(*zip(*shown, strict=True), linewidth=1.2, color="#3b6ea5", label="training")
    if held:
        axes.plot(*zip(*held, strict=True), "o", markersize=3.5, color="#c2571a", label="held out")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if name == "loss" and (shown or held):
        axes.legend(fontsize=7, frameon=False)


if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

BEGIN = "<!-- yours: begin (text between these two marks is kept by the next export) -->"
END = "<!-- yours: end -->"
OFFER = "*Write here what this model is for, and what you saw it do well and badly.*"
LIBRARIES = {"hf": "transformers", "peft": "peft", "mlx": "mlx", "fused": "mlx", "quantized": "mlx"}
TAGS = ["dpo", "preference-optimization", "mlx", "mlxdpo"]


def write_card(run: Run, out: Path, licences: Licences | None = None, repo: str = sections.REPO) -> Path:
    """Write the card of an export (`out`/README.md), its picture, and the run it tells of (`out`/run); the card's path.

    `repo` is the repository that its commands name. What `licences` leaves open is looked up in the base's own card.
    Raises `UserError` when `out` holds no export, or a README that is not a card of ours: it would be lost.
    """
    record, config, manifest, metrics = read_record(out), run.config(), run.manifest(), run.metrics()
    findings, named = read_card_numbers(run), known(config, licences or Licences())
    yours = own_part(out / CARD)
    draw_curve(metrics, out / CURVE)
    pack_run(run, out)
    parts = [
        sections.introduction(record, config, findings),
        f"{BEGIN}\n\n{yours}\n\n{END}",
        sections.contents(record, repo),
        sections.evaluation_section(findings),
        sections.fidelity(record),
        sections.training(config, manifest, metrics),
        sections.data(config, manifest, named),
        sections.base(record, manifest, named),
        sections.limits(config, findings),
    ]
    head = metadata(record, config, findings, named).to_yaml()
    write_text(out / CARD, redact(f"---\n{head}\n---\n\n" + "\n\n".join(parts) + "\n"))
    return out / CARD


def own_part(file: Path) -> str:
    """What the user wrote between the marks of an earlier card. Raises `UserError` where marks are missing."""
    if not file.exists():
        return OFFER
    if (found := between_marks(file.read_text("utf-8"))) is None:
        raise UserError(
            f"{file} was not written by mlxdpo, or lacks its marks `{BEGIN}` and `{END}`; restore them or move it"
        )
    return found


def between_marks(text: str) -> str | None:
    """The user's part of a card, or None where the marks are not both there."""
    found = re.search(re.escape(BEGIN) + r"(.*)" + re.escape(END), text, re.DOTALL)
    return found[1].strip() if found else None


def metadata(record: Exported, config: Config, findings: CardNumbers | None, licences: Licences) -> ModelCardData:
    """What the Hub reads: base model and relation, library, data, licence, and the evaluation as a model-index."""
    from huggingface_hub import ModelCardData

    fields: dict[str, Any] = {"tags": TAGS, "pipeline_tag": "text-generation", "model_name": record.run}
    if is_hub_id(record.base_model):
        fields |= {"base_model": record.base_model, "base_model_relation": record.relation}
    if (library := _library(record)) is not None:
        fields["library_name"] = library
    if is_hub_id(config.data.path):
        fields["datasets"] = [config.data.path]
    if licences.model is not None:
        fields["license"] = licences.model
    if results := _results(config, findings):
        fields["eval_results"] = results
    return ModelCardData(**fields)


def _library(record: Exported) -> str | None:
    """That of the target in the root of the repository, which the Hub's button loads; else of the first one known."""
    ordered = sorted(record.targets.items(), key=lambda item: item[1].folder != ".")
    return next((LIBRARIES[name] for name, _ in ordered if name in LIBRARIES), None)


def _results(config: Config, findings: CardNumbers | None) -> list[Any]:
    from huggingface_hub import EvalResult

    subject = findings.data if findings else ""
    source = config.data.path if is_hub_id(config.data.path) else "preference-pairs"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=source,
            dataset_name=subject,
            metric_type=f.metric,
            metric_name=f.name,
            metric_value=f.value,
            metric_args=_arguments(f),
        )
        for f in (findings.findings if findings else ())
        if f.metric
    ]


def _arguments(finding: CardNumber) -> dict[str, Any] | None:
    """The interval and n beside the number: the Hub's format has no other place for them."""
    known = {"low": finding.low, "high": finding.high, "n": finding.n or None}
    if finding.low is not None:
        known["interval"] = "95 %, clustered by prompt"
    return {name: value for name, value in known.items() if value is not None} or None
