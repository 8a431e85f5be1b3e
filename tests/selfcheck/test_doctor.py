"""`mlxdpo doctor`: its golden numbers are made again, every check holds here, and a fault planted for it is found."""

import ast
import io
import json
import shutil
import types
from collections import Counter
from pathlib import Path

import fake_mac
import float64_llama
import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from mlxdpo import selfcheck
from mlxdpo.cli import run
from mlxdpo.commands import doctor
from mlxdpo.forward import fused_head as heads
from mlxdpo.forward import packed
from mlxdpo.machine import device
from mlxdpo.machine.device import Machine, float32_matmul
from mlxdpo.machine.errors import SHORT_ROWS
from mlxdpo.machine.openblas import Blas
from mlxdpo.selfcheck import CHECKS, Check, Finding, golden_model, machine, material, numbers, run_checks, training
from mlxdpo.selfcheck.registry import plain_line


@pytest.fixture(autouse=True)
def quiet_cache(cache):
    """The cache folder of these tests."""


def test_weights_and_words_are_those_of_the_float64_side():
    assert golden_model.bytes_of("model.norm.weight", 500).tolist() == float64_llama.drawn("model.norm.weight", 500)
    for name in ("model.norm.weight", "model.embed_tokens.weight", "a.lora_b", "a.q_proj.weight"):
        assert np.array_equal(golden_model.value(name, (5, 7)), float64_llama.array(name, 5, 7))
    assert material.LENGTHS == float64_llama.LENGTHS
    for example, (prompt, chosen, rejected) in zip(material.examples(), float64_llama.pairs(), strict=True):
        assert [a.tolist() for a in (example.prompt, example.chosen, example.rejected)] == [prompt, chosen, rejected]


def test_no_weight_is_rounded_by_bfloat16():
    model = golden_model.arithmetic_model()
    arrays = [a for _, a in golden_model.tree_flatten(model.parameters())]
    assert all(mx.array_equal(a, a.astype(mx.bfloat16).astype(mx.float32)).item() for a in arrays)


def test_the_golden_file_is_what_float64_numpy_gives():
    made, stored = float64_llama.golden(), json.loads(float64_llama.FILE.read_text("utf-8"))
    assert made.keys() == stored.keys() and made["gradient"].keys() == stored["gradient"].keys()
    for name in ("policy", "reference", "loss", "probed"):
        assert np.allclose(made[name], stored[name], rtol=1e-11, atol=0)
    for name, slopes in made["gradient"].items():
        assert np.allclose(slopes, stored["gradient"][name], rtol=1e-6, atol=1e-9), name


def test_the_golden_pairs_exercise_what_training_does():
    rows = material.batch()
    assert rows.prefix.shape[1] > 0 and len(rows.chosen) == 4 and len(rows.group) == 7  # a completion in two pairs
    policy, reference = (np.array(float64_llama.golden()[name]) for name in ("policy", "reference"))
    assert np.abs(policy - reference).min() > 0.2  # the adapters matter in every row


def worse(number, **changes):
    """The golden file with changes."""
    return lambda: dict(number) | changes


def shifted(name, at, by):
    """The golden file with one number off."""
    stored = json.loads(float64_llama.FILE.read_text("utf-8"))
    values = np.array(stored[name])
    values[at] += by
    return worse(stored, **{name: values.tolist()})


def wrong_gradient():
    stored = json.loads(float64_llama.FILE.read_text("utf-8"))
    gradient = {key: [value * 1.01 for value in values] for key, values in stored["gradient"].items()}
    return worse(stored, gradient=gradient)


def drifting():
    """Batches whose shape never comes back."""
    turns = iter([(0, 1), (2,), (3,), (0, 2), (1, 3), (0, 1, 2, 3)])
    real = material.batch
    return lambda indices: real(indices=next(turns))


def tilted_head(real):
    """The fused head with a gradient 1 % too long."""

    def rows(*given):
        logp, row, *rest = real(*given)
        return logp, row * 1.01, *rest

    return rows


def deaf_head(real):
    """A head that gives every token the same 0.01 nats too many."""

    def softmax(z, y):
        logp, *rest = real(z, y)
        return logp + 0.01, *rest

    return softmax


def sharp_attention(factor):
    """Attention whose scores are this much too large."""
    real = mx.fast.scaled_dot_product_attention
    return lambda q, k, v, *, scale, mask: real(q, k, v, scale=scale * factor, mask=mask)


def on(kind):
    return lambda: Machine(kind, "a machine", 32 << 30, "system")


KEPT = mx.checkpoint
CUT = lambda function: KEPT(lambda given, *arrays: function(given, *map(mx.stop_gradient, arrays)))  # noqa: E731
HOT = packed.PackedMask.attend
FULL = types.SimpleNamespace(free=1e8)
# For each check, one or more faults: where something is put in the place of something else.
FAULTS = {
    "versions": [(machine.importlib.metadata, "requires", lambda name: ["numpy>=99"]),
                 (machine.importlib.metadata, "requires", lambda name: ["no-such-thing>=1"])],
    "device": [(machine, "gpu_here", lambda: "another")],
    "BLAS": [(machine, "preload_blas", lambda: Blas(False, "no OpenBLAS"))],
    "matmul rate": [(machine, "matmul_rate", lambda repeats: 6e9), (machine, "_matmul_error", lambda: 0.1)],
    "memory": [(mx, "get_active_memory", lambda: 0),
               (machine, "this_machine", lambda: Machine("cpu", "", 1 << 30, ""))],
    "memory limits": [(mx, f"set_{what}_limit", lambda limit: 0) for what in ("wired", "memory", "cache")],
    "mx.compile": [(mx, "compile", lambda function: lambda x: function(x) * 1.001)],
    "cache folder": [(machine.shutil, "disk_usage", lambda folder: FULL)],
    "attention = plain": [(mx.fast, "scaled_dot_product_attention", sharp_attention(1.05)),
                          (mx.fast, "scaled_dot_product_attention", sharp_attention(float("nan")))],
    "log-probs float32 = golden": [(numbers, "golden", shifted("policy", (3, 0), 2e-3)),
                                   (numbers, "golden", shifted("reference", (0, 1), -2e-3)),
                                   (heads, "_head_softmax", deaf_head(heads._head_softmax))],
    "log-probs bfloat16 = golden": [(numbers, "golden", shifted("policy", (2, 1), 0.6))],
    "log-probs float16 = golden": [(numbers, "golden", shifted("policy", (2, 1), 0.1))],
    "loss and gradient = golden": [(numbers, "golden", worse(float64_llama.golden(), loss=0.7)),
                                   (numbers, "golden", wrong_gradient()),
                                   (heads, "_logps_and_rows", tilted_head(heads._logps_and_rows))],
    "fused = plain": [(heads, "_logps_and_rows", tilted_head(heads._logps_and_rows)),
                      (heads, "_head_softmax", deaf_head(heads._head_softmax))],
    "checkpoint = not": [(mx, "checkpoint", CUT)],
    "packed = padded": [(packed.PackedMask, "attend",
                         lambda self, q, k, v, scale, sinks: HOT(self, q, k, v, scale * 1.01, sinks))],
    "training starts at ln 2 and falls": [(training, "make_update", lambda *given: lambda *step: None),
                                          (training, "reference", lambda: np.add(material.reference(), [1.0, 0.0]))],
    "a tiny step": [(training, "SLOWEST", 0.0)],
    "one trace for each shape": [(training, "batch", drifting)],
    "safetensors round trip": [(training, "load_arrays", lambda model, folder: None)],
}  # fmt: skip
PLANTED = [(name, *fault) for name, faults in FAULTS.items() for fault in faults]


def test_every_check_has_a_fault_planted_for_it():
    assert FAULTS.keys() == CHECKS.keys()


@pytest.mark.parametrize(("name", "place", "what", "instead"), PLANTED, ids=[f"{f[0]}: {f[2]}" for f in PLANTED])
def test_a_planted_fault_is_found(name, place, what, instead, monkeypatch, capsys):
    kind = {"memory limits": "metal", "BLAS": "cpu"}.get(name)
    if kind:
        monkeypatch.setattr(machine, "this_machine", on(kind))
    if name == "one trace for each shape":
        monkeypatch.setattr(training, "compiles", lambda: True)
    monkeypatch.setattr(place, what, instead() if instead is drifting else instead)
    (result,) = run_checks([CHECKS[name]])
    assert not result.ok and result.advice == CHECKS[name].advice and len(result.advice) > 20
    assert "Error" not in result.figure  # it was measured, not thrown


def test_a_healthy_metal_machine_keeps_its_limits(monkeypatch):
    gib, found = 1 << 30, {}
    for name, before in (("wired", 0), ("memory", 48 * gib), ("cache", 40 * gib)):
        limits = found[name] = [before]
        monkeypatch.setattr(mx, f"set_{name}_limit", lambda new, kept=limits: kept.append(new) or kept[-2])
    monkeypatch.setattr(machine, "this_machine", on("metal"))
    assert run_checks([CHECKS["memory limits"]])[0].ok
    assert found == {
        "wired": [0, int(32 * gib * 0.9), 0],
        "memory": [48 * gib, 32 * gib, 48 * gib],
        "cache": [40 * gib, 8 * gib, 40 * gib],
    }


def test_on_a_mac_attention_reaches_the_kernels_and_one_refuses_a_gradient_as_it_does(monkeypatch):
    """In bfloat16, and where Metal raises: of the six sizes the three with 8 queries."""
    fake_mac.install(monkeypatch.setattr)
    seen = Counter()
    routed = mx.fast.scaled_dot_product_attention

    def attention(q, *more, **options):
        seen[q.shape[-1], q.shape[2], q.dtype] += 1
        return routed(q, *more, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    (result,) = run_checks([CHECKS["attention = plain"]])
    assert result.ok and result.figure.startswith("bfloat16: ")
    assert result.figure.endswith("; no gradient for 8 queries (3 of 6), which train avoids")
    assert seen.keys() == {(dim, queries, mx.bfloat16) for dim in (64, 128, 256) for queries in (8, 16)}


def test_attention_that_refuses_16_queries_is_a_fault(monkeypatch):
    def refuse(*given, **options):
        raise RuntimeError(f"the {SHORT_ROWS}")

    monkeypatch.setattr(mx, "vjp", refuse)
    (result,) = run_checks([CHECKS["attention = plain"]])
    assert not result.ok and SHORT_ROWS in result.figure


def test_who_imports_the_package_has_all_checks():
    """Not only those whose file something else imports: the table once had half of its rows, and looked as sound."""
    folder = Path(selfcheck.__file__).parent
    holding = {file.stem for file in folder.glob("*.py") if "\n@self_check(" in file.read_text("utf-8")}
    tree = ast.parse((folder / "__init__.py").read_text("utf-8"))
    imported = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "mlxdpo.selfcheck"
        for alias in node.names
    }
    assert len(holding) > 3 and imported == holding


def test_tf32_is_told_and_allowed_for(monkeypatch, capsys):
    """10 bits: a product that needs 12 comes out as 1. Float32 log-probs are then held to what TF32 can give."""
    assert float32_matmul.__wrapped__() == "float32"
    real = mx.eye
    monkeypatch.setattr(mx, "eye", lambda size: real(size) * (1 / (1 + 2.0**-12)))
    assert float32_matmul.__wrapped__() == "TF32"
    for kind, matmul, expected in (("metal", "TF32", 3e-2), ("metal", "float32", 1e-3), ("cpu", "float32", 2e-4)):
        monkeypatch.setattr(numbers, "this_machine", on(kind))
        monkeypatch.setattr(numbers, "float32_matmul", lambda matmul=matmul: matmul)
        assert numbers.limit_of("float32") == expected


MAC = {
    "machine": Machine("metal", "Apple M5", 24 << 30, "Darwin 25.2.0 arm64")._asdict(), "macos": "26.2",
    "versions": {"mlxdpo": "1.0", "mlx": "0.32.4", "mlx-lm": "0.32.2", "python": "3.12.8"}, "optional": {},
    "library": "mlx-metal macosx_15_0_arm64", "float32_matmul": "TF32", "matmul_gflops": 4000.0,
    "checks": [{"check": "device", "ok": True, "figure": "", "limit": "", "seconds": 0.1, "advice": ""},
               {"check": "memory", "ok": False, "figure": "", "limit": "", "seconds": 0.1, "advice": ""}],
}  # fmt: skip
"""What is found on a made-up M5 with macOS 26.2 whose pip brought the wheel for macOS 15."""


def test_one_line_says_what_a_report_needs():
    assert doctor.summary_line(MAC) == (
        "mlxdpo 1.0; mlx 0.32.4; mlx-lm 0.32.2; mlx-metal macosx_15_0_arm64; Python 3.12.8; macOS 26.2; "
        "Apple M5 26 GB; 4000 GFLOP/s in TF32; 1 of 2 checks hold; FAIL: memory"
    )


def test_the_table_of_a_mac_has_wheel_tf32_and_the_watchdog():
    rows = {name: figure for name, _, figure, *_ in doctor.doctor_rows(MAC)}
    assert "macosx_26 wheel: pip install" in rows["MLX's kernels"]
    assert "MLX_ENABLE_TF32=0" in rows["float32 matmuls"] and "--keep-awake" in rows["long runs"]
    for other in (MAC | {"library": "mlx-metal macosx_26_0_arm64"}, MAC | {"macos": "15.5"}, MAC | {"macos": ""}):
        assert "macosx_26 wheel" not in str(doctor.doctor_rows(other))
    here = MAC | {"machine": on("cpu")()._asdict(), "float32_matmul": "float32"}
    rows = {name: figure for name, _, figure, *_ in doctor.doctor_rows(here)}
    assert "long runs" not in rows and rows["float32 matmuls"] == "float32"


@pytest.mark.parametrize(
    ("wheel", "expected"),
    [
        ("Root-Is-Purelib: false\nTag: py3-none-macosx_26_0_arm64\n", "mlx-metal macosx_26_0_arm64"),
        ("", "mlx-metal of no known tag"),
        (None, "mlx-metal of no known tag"),
    ],
)
def test_the_wheel_is_told_by_its_tag(wheel, expected, monkeypatch):
    there = types.SimpleNamespace(read_text={"WHEEL": wheel}.get)
    monkeypatch.setattr(device.importlib.metadata, "distribution", lambda name: there)
    assert device.library_wheel() == expected


def test_an_mlx_of_ones_own_has_no_wheel(monkeypatch):
    def missing(name):
        raise device.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(device.importlib.metadata, "distribution", missing)
    assert device.library_wheel() == "none: MLX was built here"


def test_a_virtual_macs_gpu_may_be_slow(monkeypatch):
    """As the runners have that test this project: MLX computes on it, slowly."""
    monkeypatch.setattr(machine, "matmul_rate", lambda repeats: 50e9)
    for name, healthy in (("Apple Paravirtual device", True), ("Apple M1", False)):
        monkeypatch.setattr(machine, "this_machine", lambda name=name: Machine("metal", name, 5 << 30, "Darwin"))
        assert run_checks([CHECKS["matmul rate"]])[0].ok == healthy


def test_without_a_compiler_nothing_is_wrong(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine, "this_machine", on("cpu"))
    (result,) = run_checks([CHECKS["mx.compile"]])
    assert result.ok and "no g++" in result.figure


def test_where_compiling_does_nothing_no_traces_are_asked_for(monkeypatch):
    assert training.compiles() == bool(mx.default_device() == mx.gpu or shutil.which("g++"))
    monkeypatch.setattr(mx, "compile", lambda function, **options: function)
    monkeypatch.setattr(training, "most_traces", lambda: None)
    monkeypatch.setattr(training, "count_traces", lambda: 6)
    assert not training.compiles() and run_checks([CHECKS["one trace for each shape"]])[0].ok
    monkeypatch.setattr(training, "most_traces", lambda: 24)  # a GPU that does not compile is a fault
    assert not run_checks([CHECKS["one trace for each shape"]])[0].ok


def test_an_unwritable_cache_is_found(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXDPO_CACHE", str(tmp_path / "file"))
    (result,) = run_checks([CHECKS["cache folder"]])
    assert not result.ok and result.figure.startswith("FileExistsError")


def test_what_the_cache_holds_is_told(monkeypatch, tmp_path):
    """Two files of 0.3 GB, one of them below; a link counts as a link."""
    monkeypatch.setenv("MLXDPO_CACHE", str(tmp_path))
    (tmp_path / "pairs").mkdir()
    for file in (tmp_path / "a", tmp_path / "pairs" / "b"):
        with file.open("wb") as open_file:
            open_file.truncate(300_000_000)  # holes: no disk is filled
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (result,) = run_checks([CHECKS["cache folder"]])
    assert result.figure.endswith(" GB free, 0.6 GB kept, which may be deleted")


def test_all_checks_hold_here_and_the_table_is_markdown(capsys, ticking, monkeypatch, request):
    if request.config.getoption("mac"):  # no made-up Mac has a Mac's matmul rate, nor compiles
        monkeypatch.setattr(device, "_detect_machine", on("cpu"))
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    *lines, blank, summary = lines
    assert blank == "" and summary.endswith(f"; {len(CHECKS)} of {len(CHECKS)} checks hold") and "|" not in summary
    assert len(lines) == len(CHECKS) + 7 and {line.count("|") for line in lines} == {6}
    assert len({len(line) for line in lines}) == 1  # it can be read as it stands
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[7:]]
    assert [row[0] for row in cells] == list(CHECKS) and {row[1] for row in cells} == {"ok"}
    assert all(row[2] and row[3] and float(row[4]) >= 0 for row in cells)
    seconds = {row[0]: row[4] for row in cells}  # two steps of the stopwatch are a check that does not read it
    assert seconds["versions"] == "0.0" and seconds["matmul rate"] == "0.8"


def test_on_a_terminal_of_80_columns_no_cell_is_cut(monkeypatch, capsys):
    name = "openblas-" + "0123456789abcdef" * 3 + ".so"
    check = {"check": "BLAS", "ok": True, "figure": name, "limit": "none", "seconds": 0.1}
    shown = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80, soft_wrap=True)
    monkeypatch.setattr("mlxdpo.commands.terminal.console", shown)
    doctor.show_findings(MAC | {"checks": [check], "problems": []})
    facts, _, table = shown.file.getvalue().partition(" check ")
    assert doctor.WATCHDOG in facts and "|" not in table
    assert max(map(len, table.splitlines())) <= 80
    assert name in "".join(table.replace(" none ", "").split())
    assert "1 of 1 checks hold" in capsys.readouterr().out


def test_a_failing_and_a_raising_check_are_rows_with_a_sentence_and_exit_status_1(monkeypatch, capsys):
    def broken():
        raise ValueError("no | such `thing`\nin two <b>lines</b>")

    def failing():
        return Finding(False, "3 off", "2")

    for planted in (Check("broken", "mend it", broken), Check("failing", "do this", failing)):
        monkeypatch.setitem(CHECKS, planted.name, planted)
    for name in [name for name in CHECKS if name not in ("broken", "failing", "cache folder")]:
        monkeypatch.delitem(CHECKS, name)
    assert run(["doctor"]) == 1
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.out.splitlines() if line.startswith("| ")]
    assert [row[:4] for row in rows[-2:]] == [
        ["broken", "FAIL", "ValueError: no / such 'thing' in two (b)lines(/b)", "no error"],
        ["failing", "FAIL", "3 off", "2"],
    ]
    assert told.out.splitlines()[-2].startswith("FAIL broken (ValueError: ") and told.out.endswith("do this\n")
    assert run(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(one["check"], one["ok"], one["advice"]) for one in found["checks"]][1:] == [
        ("broken", False, "mend it"), ("failing", False, "do this"),
    ]  # fmt: skip
    assert len(found["problems"]) == 2


def test_text_is_safe_to_paste(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.Path, "home", lambda: tmp_path)
    assert plain_line(f"{tmp_path}/x  a|b\n`c` *d*") == "~/x a/b 'c' xdx"
    assert plain_line("y" * 250) == "y" * 200 + " ... (50 more characters)"
    assert doctor.markdown_lines([("a", "b", "c", "d", "e")])[1].strip("|-") == ""
