"""The real `mlx_lm.server` as judge, with the real SmolLM2: its own refusals, tokens and log-probs."""

import socket
import subprocess
import sys
import time

import pytest

from mlxdpo import UserError
from mlxdpo.model.builtin import smollm2_folder
from mlxdpo_eval.judges import AnswerPair, ask_both, open_judge

pytestmark = [pytest.mark.real, pytest.mark.processes]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(URL, model folder) of a running server, which is ended afterwards."""
    folder = smollm2_folder()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.terminate()
        process.wait()


def test_it_is_asked_by_log_probs_and_its_verdicts_are_those_of_the_model(served, cache):
    url, folder = served
    judge = open_judge(f"endpoint:{folder}@{url}")
    assert judge.spent()["asked_by"] == "log-probs of the labels"
    pairs = [AnswerPair("What is the capital of France?", "I like trains.", "The capital of France is Paris.")]
    ((there,), (here,)) = (ask_both(one, pairs) for one in (judge, open_judge(f"local:{folder}")))
    assert there.first is not None and there.second is not None
    # The server rounds to its own number type, and lists eleven tokens: a label's other spelling may be missing.
    assert there.first == pytest.approx(here.first, abs=0.5) and there.second == pytest.approx(here.second, abs=0.5)


def test_a_model_it_cannot_load_is_said_in_its_own_words(served, monkeypatch):
    url, _ = served
    with pytest.raises(UserError, match=r"the server refuses the test question \(HTTP 404: .+\)"):
        open_judge(f"endpoint:/nowhere/at all@{url}")
