"""The sections of a model card: Markdown built from a run's own files. What is not known is said to be not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import Config, names_of
from mlxdpo.exporters.findings import CardNumber, CardNumbers
from mlxdpo.exporters.record import CURVE, RUN, Exported, Target
from mlxdpo.exporters.redact import card_metadata, command, public_name, without_paths
from mlxdpo.io.names import is_hub_id
from mlxdpo.losses import LOSSES
from mlxdpo.model.policy import BUILTIN, find_model


class Licences(NamedTuple):
    """Identifiers as the Hub spells them (apache-2.0) of the base model's and the data's licence; None: not known.

    They are what the user says, else what the base model's own card says, and never a guess.
    """

    model: str | None = None
    data: str | None = None


def known(config: Config, given: Licences) -> Licences:
    """`given`, with the base model's licence filled in from its card where that lies on this machine."""
    return given if given.model is not None else given._replace(model=_licence_of(_card_of(config)))


def _card_of(config: Config) -> Path | None:
    path = config.model.path
    if path in BUILTIN or Path(path).is_dir():
        return find_model(path) / "README.md"
    if not is_hub_id(path):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "README.md", revision=config.model.revision)
    return Path(found) if isinstance(found, str) else None


def _licence_of(card: Path | None) -> str | None:
    licence = card_metadata(card).get("license") if card else None
    return licence if isinstance(licence, str) else None


REPO = "USER/REPO"  # in the commands of a card that is not meant for a known repository


def cell(text: Any) -> str:
    """Text that cannot break out of a table's cell, nor carry markup of its own."""
    plain = " ".join(str(text).split())
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def card_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def linked(name: str) -> str:
    """A model or data set, as a link where it is on the Hub."""
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{cell(name)}`"


ONLINE = {"ppo": "PPO (arXiv 1707.06347)", "rloo": "RLOO (arXiv 2402.14740)"}


def objective(config: Config) -> str:
    """What was minimised, with its paper."""
    if config.stage == "sft":
        return "supervised fine-tuning on the chosen completions (cross entropy)"
    if config.stage == "reward":
        return "a reward model (Bradley-Terry, arXiv 2203.02155)"
    if config.stage in ONLINE:
        return f"reward of the model's own samples: {ONLINE[config.stage]}, KL cost {config.rollout.kl:g}"
    terms = [f"{name}: {LOSSES[name].title} (arXiv {LOSSES[name].paper})" for name in names_of(config.loss.name)]
    settings = config.loss.model_dump(exclude_defaults=True, exclude={"name"}) | {"beta": config.loss.beta}
    return ", ".join([" + ".join(terms), *(f"{name} {value}" for name, value in sorted(settings.items()))])


def introduction(record: Exported, config: Config, findings: CardNumbers | None) -> str:
    """What this is, and the verdict of its evaluation."""
    title = cell(record.run)
    verdict = findings.headline if findings and findings.headline else ""
    missing = "" if findings else " **It has not been evaluated**: nothing here says that it got better."
    return (
        f"# {title}\n\n{linked(record.base_model)}, tuned on preference pairs by mlxdpo. "
        f"Objective: {cell(objective(config))}.{missing}" + (f"\n\n> {cell(verdict)}" if verdict else "")
    )


def contents(record: Exported, repo: str) -> str:
    """What the repository holds and how each part is loaded."""
    rows = [(_folder_of(target), name, target.relation, target.note or "") for name, target in record.targets.items()]
    rows.append((f"{RUN}/", "run", "", "recipe, manifest and adapter: `mlxdpo pull` makes a run directory of it"))
    snippets = [USAGE[name](record, target) for name, target in record.targets.items() if name in USAGE]
    snippets = [snippet.replace(REPO, repo) for snippet in snippets]
    pull = f"mlxdpo pull {repo} --out runs/pulled\nmlxdpo generate runs/pulled --prompt '...'"
    parts = [
        card_table(("folder", "target", "relation to the base", "note"), rows),
        *snippets,
        _code_block("sh", pull),
    ]
    return "## What is here\n\n" + "\n\n".join(parts)


def _folder_of(target: Target) -> str:
    return "(root)" if target.folder == "." else f"{target.folder}/"


def _code_block(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _subfolder(target: Target) -> str:
    return "" if target.folder == "." else f', subfolder="{target.folder}"'


def _mlx(record: Exported, target: Target) -> str:
    at = "." if target.folder == "." else target.folder
    adapter = "adapters.safetensors" in target.files
    model = f"{record.base_model} --adapter-path here/{at}" if adapter else f"here/{at}"
    return _code_block("sh", f"hf download {REPO} --local-dir here\nmlx_lm.generate --model {model} --prompt '...'")


def _peft(record: Exported, target: Target) -> str:
    return _code_block(
        "python",
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{record.base_model}")\n'
        f'model = PeftModel.from_pretrained(base, "{REPO}"{_subfolder(target)})',
    )


def _hf(record: Exported, target: Target) -> str:
    load = f'"{REPO}"{_subfolder(target)}'
    return _code_block(
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({load})\ntokenizer = AutoTokenizer.from_pretrained({load})",
    )


def _gguf(record: Exported, target: Target) -> str:
    return _code_block("sh", f"llama-cli -hf {REPO}")


USAGE = {"mlx": _mlx, "fused": _mlx, "quantized": _mlx, "peft": _peft, "hf": _hf, "gguf": _gguf}


def base(record: Exported, manifest: Mapping[str, Any], licences: Licences) -> str:
    """The base model: what it is, which weights, and whose licence."""
    model = manifest["model"]
    bits = "none" if not model["quantization"] else f"{model['quantization']['bits']} bits"
    rows = [
        ("model", record.base_model if is_hub_id(record.base_model) else f"{record.base_model} (not a Hub id)"),
        ("revision", record.base_revision or model["revision"] or "not recorded"),
        ("trained from", public_name(model["source"])),
        ("digest of its weights", model["digest"]),
        ("trained in", f"{model['dtype']}, quantisation: {bits}"),
        ("relation", record.relation),
        ("licence", licences.model or "not known: look at the base model's page before you use this"),
        ("reference of the rewards", _reference_of(manifest)),
    ]
    return "## Base model\n\n" + card_table(("", ""), rows)


def _reference_of(manifest: Mapping[str, Any]) -> str:
    source = manifest["reference_source"]
    adapter = " with the adapter that training began from" if source["adapter"] else ""
    return f"{public_name(source['model'])}{adapter}, digest {manifest['reference']['digest']}"


def data(config: Config, manifest: Mapping[str, Any], licences: Licences) -> str:
    """The preference pairs: source, counts, what was left out, licence."""
    found = manifest["data"]
    rows = [
        ("source", public_name(found["source"])),
        ("training pairs", found["pairs"]),
        ("held-out pairs", found["heldout"]),
        ("digest", found["digest"]),
        ("licence", licences.data or "not known: whoever publishes this model should find out"),
    ]
    lines = [f"- {cell(line)}" for line in _left_out(found["reports"])]
    rest = "\n\nRows left out or changed:\n\n" + "\n".join(lines) if lines else ""
    return f"## Data\n\n{card_table(('', ''), rows)}{rest}"


def _left_out(reports: Mapping[str, Any]) -> Iterable[str]:
    for name, report in reports.items():
        for verb in ("refused", "changed"):
            for reason, count in report.get(verb, {}).items():
                yield without_paths(f"{name}: {count} {verb}: {reason}")


def training(config: Config, manifest: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """Objective, adapters, steps, the exact command, hardware, and the curve."""
    lora, steps = config.lora, [m for m in metrics if "loss" in m]
    shape = "every weight" if lora.method == "full" else f"{lora.method}, rank {lora.rank}, scale {lora.multiplier:g}"
    machine, versions = manifest["machine"], manifest["versions"]
    done = max((m["step"] for m in steps), default=0)
    rows = [
        ("objective", objective(config)),
        ("trained", f"{shape}; layers: {', '.join(lora.keys) if lora.keys else 'all linear ones in the blocks'}"),
        ("steps", f"{done}, {config.train.batch_size} x {config.train.gradient_accumulation} pairs each"),
        ("learning rate", f"{config.optim.lr:g}, {config.optim.schedule}, {config.optim.name}"),
        ("seed", manifest["seed"]),
        ("hardware", f"{machine['kind']}: {machine['name']}, {machine['memory'] / 1e9:.0f} GB, {machine['system']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        *_ends(metrics),
    ]
    parts = [
        "## Training",
        card_table(("", ""), rows),
        "The command, on the data named above:",
        _code_block("sh", command(config)),
    ]
    return "\n\n".join([*parts, f"![loss, reward accuracy and margin over the steps]({CURVE})"] if steps else parts)


def _ends(metrics: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    held = [m for m in metrics if m.get("eval_loss") is not None]
    if held:
        ends = [f"{m['eval_loss']:.4f} at step {m['step']}" for m in (held[0], held[-1])]
        yield "held-out loss", ", ".join(ends)


def evaluation_section(findings: CardNumbers | None) -> str:
    """The table of numbers, each with interval and n, and what the judges are worth."""
    if findings is None:
        return "## Evaluation\n\nNot evaluated. `mlxdpo eval` measures it, with intervals."
    rows = [(f.name, f"{f.value:.4g}", interval_text(f), f.n or "not recorded", f.beside) for f in findings.findings]
    note = (
        f"Held-out pairs: {cell(without_paths(findings.data))}. Intervals are 95 %, clustered by prompt; "
        f"`none` means that the data could not carry one. Source: eval/{cell(findings.file)} of the run."
    )
    parts = ["## Evaluation", card_table(("number", "value", "95 % interval", "n", "beside it"), rows), note]
    parts += [f"### Judge: {cell(c.judge)}\n\n{card_table(('', ''), without_paths(c.rows))}" for c in findings.cards]
    if not findings.cards:
        parts.append("No judge was asked, so whether its answers are better is not known.")
    return "\n\n".join(parts)


def interval_text(finding: CardNumber) -> str:
    """The bounds, or that there are none."""
    if finding.low is None or finding.high is None:
        return "none"
    return f"{finding.low:.4g} to {finding.high:.4g}"


def fidelity(record: Exported) -> str:
    """How each artefact, reloaded, differs from the run that it was made from."""
    rows = []
    for name, target in record.targets.items():
        f = target.fidelity
        verdict = "passed" if f.passed else f"**failed**: {f.reason or 'no reason recorded'}"
        figures = (
            _card_value(f.token_kl, ".2e"),
            _card_value(f.policy_reference_kl, ".2e"),
            _card_value(f.slope, ".4f"),
        )
        change = f"{f.accuracy_run:.3f} to {f.accuracy_artefact:.3f}"
        n = f"{f.pairs} pairs, {f.tokens} tokens"
        rows.append((name, *figures, _card_value(f.correlation, ".4f"), change, n, verdict))
    header = ("target", "KL(run, artefact)", "KL(run, reference)", "slope", "correlation", "accuracy", "n", "gate")
    note = (
        "Each artefact was loaded again and held against the run on held-out pairs: mean KL per token in nats, slope "
        f"and correlation of its DPO margins over the run's. Pairs: {cell(without_paths(record.data))}."
    )
    return f"## Fidelity of the export\n\n{card_table(header, rows)}\n\n{note}"


def _card_value(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def limits(config: Config, findings: CardNumbers | None) -> str:
    """What nobody should read into this card."""
    lines = [
        "**Not safety evaluated.** Preference tuning can weaken refusals that the base model had, and nobody looked.",
        "Better by the judges and pairs above is all that was measured; other tasks, languages and lengths were not.",
        "An implicit reward says how the model ranks given answers, not how well it writes.",
        "The base model's limits and licence, and those of the data, hold here too.",
    ]
    if findings is None:
        lines[1] = "Nothing was measured besides the training's own metrics."
    if config.lora.method == "full":
        lines.append("Every weight was trained: the base cannot be had back by switching an adapter off.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
