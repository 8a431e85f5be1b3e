"""An export folder as `mlxdpo export --to mlx` leaves it, without running one: for tests of what happens to it next."""

import json
import shutil
import struct

from mlxdpo.exporters.card import write_card
from mlxdpo.exporters.record import Exported, Fidelity, Target, write_record

PASSED = Fidelity(
    pairs=8, tokens=120, token_kl=1e-7, policy_reference_kl=0.02, slope=1.0, correlation=1.0,
    accuracy_run=0.75, accuracy_artefact=0.75, passed=True,
)  # fmt: skip
CARD = "---\ntags:\n- dpo\n---\n\n# a card\n"


def safetensors(values: bytes) -> bytes:
    """A file with one array of bytes."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    return struct.pack("<Q", len(header)) + header + values


def record(out, folders, fidelity=PASSED, base="org/base"):
    """Write `export.json` over what lies in `folders` ({target: folder}); returns the value."""
    targets = {}
    for name, folder in folders.items():
        files = {p.name: p.stat().st_size for p in sorted((out / folder).iterdir()) if p.is_file()}
        targets[name] = Target(folder, files, "adapter", fidelity)
    exported = Exported(out, "tiny", base, None, "adapter", "pairs.jsonl", 0.1, {"mlxdpo": "0.1.0"}, targets)
    write_record(exported, out)
    return exported


def small_export(out, fidelity=PASSED, shards=1):
    """mlx/ with an adapter (and more weights for `shards` above 1), a card, and things that must not leave."""
    (out / "mlx").mkdir(parents=True)
    (out / "mlx" / "adapters.safetensors").write_bytes(safetensors(b"adapter" * 500))
    (out / "mlx" / "adapter_config.json").write_text('{"fine_tune_type": "lora"}\n')
    for i in range(1, shards):
        (out / "mlx" / f"model-{i:05d}-of-{shards - 1:05d}.safetensors").write_bytes(safetensors(bytes([i]) * 4000))
    record(out, {"mlx": "mlx"}, fidelity)
    (out / "README.md").write_text(CARD)
    (out / ".env").write_text("HF_TOKEN=hf_" + "x" * 30)
    (out / "votes.jsonl").write_text("{}\n")
    (out / "mlx" / "optimizer.safetensors").write_bytes(safetensors(b"state"))
    (out / "metrics.jsonl").write_text("{}\n")
    return out


NAME = "jane/tiny-dpo"


def exported(run, out):
    """The mlx target with card and run, as the exporter leaves them."""
    shutil.copytree(run.adapter, out / "mlx")
    record(out, {"mlx": "mlx"})
    write_card(run, out, repo=NAME)
    return out


def base_of(run):
    return run.config().model.path
