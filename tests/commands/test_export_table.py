"""What `mlxdpo export` shows of its gate."""

import io
from types import SimpleNamespace as Some

from rich.console import Console

from mlxdpo.commands.export import gate_table


def test_the_gate_s_figures_fit_80_columns(monkeypatch):
    monkeypatch.setattr("mlxdpo.exporters.usage.client_words", lambda target: "not asked")
    measured = Some(
        token_kl=1.234e-5, policy_reference_kl=0.136, slope=1.0, correlation=0.9999, accuracy_artefact=0.875,
        accuracy_run=0.8125, passed=True,
    )  # fmt: skip
    target = Some(fidelity=measured, files={"a": 2_048_000_000}, kept=True)
    out = io.StringIO()
    targets = {"packed-base": target, "gguf-lora": target}
    Console(width=80, file=out).print(gate_table(Some(targets=targets)))
    rows = out.getvalue().splitlines()
    assert rows[1].split() == [
        "packed-base", "2048.0", "1.23e-05", "0.01%", "1.0000", "0.9999", "0.875", "+0.062", "passed", "not", "asked"
    ]  # fmt: skip
    assert len(rows) == 3 and max(map(len, rows)) <= 80
