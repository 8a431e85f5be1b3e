"""Known vulnerabilities of every release in the lock file, by pip-audit, which asks a service on the network.

    python .ci/audit.py requirements/lock.txt      0 none known, 1 some known, 3 nothing could be said

pip-audit alone prints "No known vulnerabilities found" and exits 0 when the service knew none of the releases it was
asked about. Here that is 3: an audit that did not take place is no success.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def ask(lock: str, service: str) -> tuple[dict | None, str]:
    """pip-audit's answer about a lock file, and what it said on the terminal; None when it gave no answer."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--progress-spinner", "off"]
        command += ["-r", lock, "-s", service, "--timeout", "15", "--format", "json", "-o", str(answer)]
        done = subprocess.run(command, capture_output=True, text=True)
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return (json.loads(answer.read_text("utf-8")) if answer.exists() and answer.stat().st_size else None), said


def judge(answer: dict | None, said: str) -> tuple[int, list[str]]:
    """Exit status and lines to print."""
    if answer is None:
        return 3, [f"not audited: the vulnerability service gave no answer ({said[:200]})"]
    every = answer["dependencies"]
    skipped = [one["name"] for one in every if "skip_reason" in one]
    found = [
        f"{one['name']} {one['version']}: {bug['id']}, fixed in {', '.join(bug['fix_versions']) or 'no release yet'}"
        for one in every
        for bug in one.get("vulns", ())
    ]
    if found:
        return 1, found
    if skipped or not every:
        names = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        return 3, [f"not audited: the service knows nothing of {len(skipped)} of {len(every)} releases ({names})"]
    return 0, [f"{len(every)} releases audited, no known vulnerability"]


def main(lock: str) -> int:
    """Ask one service, and where it gives no full answer the other."""
    for service in ("osv", "pypi"):
        status, lines = judge(*ask(lock, service))
        print("\n".join(f"{service}: {line}" for line in lines))
        if status != 3:
            break
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
