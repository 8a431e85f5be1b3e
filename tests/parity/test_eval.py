"""Length-controlled win rates against alpaca_eval's own code, implicit-reward accuracy against RewardBench's.

Neither package can be imported whole beside ours: alpaca_eval's `utils` needs `pkg_resources`, which setuptools has
dropped, and its `__init__` an OpenAI client; rewardbench pins transformers 4.51 and bitsandbytes. Their files with the
maths need neither, so both are installed without dependencies and those files are imported past `__init__`, unchanged,
with stand-ins for what is not there. alpaca_eval downloads a table even where it is not used; a table of zeros stands
in for it.
"""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest

from mlxdpo import PairLogps
from mlxdpo_eval import winrate
from mlxdpo_eval.metrics.best_of_k import best_of, ties_score
from mlxdpo_eval.metrics.length import fit_length_effect, length_controlled, length_term
from mlxdpo_eval.metrics.rewards import margins, reward_report

pytestmark = pytest.mark.parity
N = 400


def bare_package(monkeypatch, name):
    """A package that is found where it is installed, but whose `__init__` has not run."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed; `make parity` installs it without its dependencies")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, name, package)
    return package


def stand_in(monkeypatch, name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def glm(monkeypatch, tmp_path):
    pandas, sklearn = pytest.importorskip("pandas"), pytest.importorskip("sklearn")
    pytest.importorskip("patsy")
    package = bare_package(monkeypatch, "alpaca_eval")
    package.constants = stand_in(
        monkeypatch, "alpaca_eval.constants", DATASETS_TOKEN=None, DATASETS_FORCE_DOWNLOAD=False, DEFAULT_CACHE_DIR=None
    )
    package.types = stand_in(monkeypatch, "alpaca_eval.types", AnyLoadableDF=object)
    package.utils = stand_in(
        monkeypatch,
        "alpaca_eval.utils",
        convert_to_dataframe=lambda rows: pandas.DataFrame(rows),
        validate_alpacaeval_preference=lambda value, is_allow_nan=True: True,
    )
    module = importlib.import_module("alpaca_eval.metrics.glm_winrate")
    table = tmp_path / "df_gamed.csv"
    pandas.DataFrame({"model": "none", "index": range(N), "instruction_difficulty": 0.0}).to_csv(table, index=False)
    monkeypatch.setattr(module, "hf_hub_download", lambda **_: str(table))
    yield module
    sklearn.set_config(enable_metadata_routing=False)  # their fit switches it on for the whole process
    for name in [n for n in sys.modules if n.startswith("alpaca_eval.metrics")]:
        del sys.modules[name]


def annotations(seed, theta, phi, soft):
    """AlpacaEval rows: preference 1 the baseline, 2 the model; lengths in characters."""
    rng = np.random.default_rng(seed)
    baseline, model = rng.integers(200, 2000, N), rng.integers(300, 2600, N)
    noise = rng.normal(size=N) if soft else 0.0
    chance = 1 / (1 + np.exp(-theta - phi * length_term((model - baseline).astype(float)) - noise))
    won = chance if soft else (rng.random(N) < chance).astype(float)
    rows = [
        {"preference": 1 + w, "output_1": "x" * b, "output_2": "x" * m, "index": i, "generator_1": "b",
         "generator_2": "m", "annotator": "a"}
        for i, (w, b, m) in enumerate(zip(won, baseline, model, strict=True))
    ]  # fmt: skip
    return rows, won, (model - baseline).astype(np.float64)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_file_of_annotations_has_alpaca_evals_win_rate(glm, soft):
    """Their own `get_winrate` on the same rows: rate, standard error, counts; a null preference is left out by both."""
    rows, _, _ = annotations(5, 0.3, 1.0, soft)
    rows += [rows[0] | {"preference": value} for value in (0, 1.5, float("nan"))]
    rows = [row | {"instruction": f"q{i}"} for i, row in enumerate(rows)]
    theirs = importlib.import_module("alpaca_eval.metrics.winrate").get_winrate(rows)
    ours = winrate(rows)
    assert 100 * ours.rate == pytest.approx(theirs["win_rate"], abs=1e-9)
    assert 100 * (ours.theirs.high - ours.theirs.low) / 2 / 1.959964 == pytest.approx(
        theirs["standard_error"], abs=1e-9
    )
    assert (ours.wins, ours.losses, ours.ties) == (theirs["n_wins"], theirs["n_wins_base"], theirs["n_draws"])
    assert ours.invalid == {"no verdict": 1}


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("theta", "phi"), [(0.0, 0.0), (0.4, 1.0), (-0.6, 2.0), (1.0, -0.5)])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_length_controlled_win_rate_is_alpaca_evals(glm, theta, phi, soft):
    """Theirs has an L1 penalty whose strength cross-validation picks, on theta too; ours a ridge of .1 on phi.

    With that penalty all but off (C 1e6) the whole of their code gives our number to .1 point. With it, theirs
    is drawn towards 50: by less than 2 points, and not away from it.
    """
    rows, won, difference = annotations(3, theta, phi, soft)

    def by_theirs(**kwargs):
        info = {**glm.GLM_INFO["length_controlled_minimal"], **kwargs}
        return glm.get_length_controlled_winrate(
            rows, glm_info=info, save_weights_dir=None, is_warn_extreme_changes=False
        )

    theirs, free = by_theirs(), by_theirs(kwargs={"n_splits": 0, "C": 1e6, "tol": 1e-8})["length_controlled_winrate"]
    ours = length_controlled(won, difference, np.arange(N), n=200)
    assert 100 * ours.raw == pytest.approx(theirs["win_rate"], abs=1e-6)
    assert 100 * ours.rate == pytest.approx(free, abs=0.1)
    drawn = theirs["length_controlled_winrate"]
    assert drawn == pytest.approx(free, abs=2) and abs(drawn - 50) <= abs(free - 50) + 0.2
    # Their standard error is the spread of predictions, all alike here; ours is an error.
    assert theirs["lc_standard_error"] == pytest.approx(0, abs=1e-9)
    assert ours.interval.high - ours.interval.low > 0.02


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_without_their_penalty_the_fits_agree(glm):
    import pandas

    _, won, difference = annotations(4, 0.4, 1.0, soft=True)
    x = length_term(difference)
    frame = pandas.DataFrame({"x": x, "one": 1.0, "preference": won})
    model = glm.fit_LogisticRegressionCV(frame, "preference", n_splits=0, C=1e6, tol=1e-8)
    theta, phi = fit_length_effect(won, x, np.ones((1, N)), ridge=0)[0]
    assert model.coef_[0] == pytest.approx([phi, theta], abs=1e-3)


class Logits:
    """A model for DPOInference: logits that depend on the token before, from one fixed table."""

    config = types.SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, table):
        self.table = table

    def eval(self):
        return self

    def requires_grad_(self, _):
        return self

    def __call__(self, ids, attention_mask):
        return types.SimpleNamespace(logits=self.table[ids])


def bigram_logps(table, ids, labels):
    """Our sum of log-probs in float64: token t is predicted from token t - 1, where it is labelled."""
    table = np.asarray(table, np.float64)
    logps = table - np.log(np.exp(table).sum(-1, keepdims=True))
    return np.array([sum(logps[a, b] for a, b, y in zip(i, i[1:], l[1:], strict=False) if y != -100)
                     for i, l in zip(ids, labels, strict=True)])  # fmt: skip


def test_reward_accuracy_is_rewardbenchs_without_ties(monkeypatch):
    """Their `inference_step` and rule (1 if chosen > rejected else 0) on 60 pairs, ten of which are copies: ties."""
    torch = pytest.importorskip("torch")
    bare_package(monkeypatch, "rewardbench")
    dpo = importlib.import_module("rewardbench.dpo")
    rng = np.random.default_rng(0)
    tables = [torch.tensor(rng.normal(size=(50, 50)), dtype=torch.float32) for _ in range(2)]
    ids = [rng.integers(0, 50, size=(60, 12)) for _ in range(2)]
    ids[1][:10] = ids[0][:10]
    labels = [np.where(np.arange(12) < 4, -100, i) for i in ids]
    batch = {
        f"{side}_{kind}": torch.tensor(value)
        for side, i, l in zip(("chosen", "rejected"), ids, labels, strict=True)
        for kind, value in (("input_ids", i), ("labels", l), ("attention_mask", np.ones_like(i)))
    }
    tokenizer, device = types.SimpleNamespace(pad_token_id=0), types.SimpleNamespace(device="cpu")
    theirs = dpo.DPOInference(Logits(tables[0]), Logits(tables[1]), tokenizer, device)
    chosen, rejected = (r.numpy() for r in theirs.inference_step(batch))
    rule = np.array([1 if c > r else 0 for c, r in zip(chosen, rejected, strict=True)])

    logps = [bigram_logps(t.numpy(), i, l) for t in tables for i, l in zip(ids, labels, strict=True)]
    lengths = np.full(60, 8)
    scores = PairLogps(*logps, lengths, lengths)
    np.testing.assert_allclose(margins(scores, 1.0), chosen - rejected, atol=1e-4)
    clear = PairLogps(*(field[10:] for field in scores))
    assert reward_report(clear, np.arange(50), 0.1).accuracy == rule[10:].mean()
    # With the ties: they lose in theirs, share in ours.
    ours = reward_report(scores, np.arange(60), 0.1)
    assert ours.ties == 10 and ours.accuracy == pytest.approx(rule.mean() + 5 / 60)


def test_best_of_and_ties_are_rewardbench_2s(monkeypatch):
    datasets = pytest.importorskip("datasets")
    bare_package(monkeypatch, "rewardbench")
    stand_in(monkeypatch, "rewardbench.models", REWARD_MODEL_CONFIG={})
    stand_in(monkeypatch, "fastchat")
    stand_in(monkeypatch, "fastchat.conversation", Conversation=object)
    theirs = importlib.import_module("rewardbench.utils")
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 5, size=(40, 4)).astype(float)
    rows = [{"text": "t", "scores": s, "prompt": i} for i, row in enumerate(scores) for s in row]
    results = theirs.reroll_and_score_dataset(datasets.Dataset.from_list(rows), [4] * 40)["results"]
    assert best_of(scores, [1] * 40, [str(i) for i in range(40)]).accuracy == pytest.approx(np.mean(results))

    tied = [(rng.normal([2] * 3 + [0] * 4, 1).tolist(), 3) for _ in range(20)]
    reference = [(rng.normal([2] + [0] * 3, 1).tolist(), 1) for _ in range(20)]
    rows = [
        {"id": f"{kind}:{i}", "scores": s, "num_correct": n}
        for kind, items in (("tied", tied), ("ref", reference))
        for i, (s, n) in enumerate(items)
    ]
    _, score = theirs.process_single_model(rows)
    assert ties_score(tied, reference).score == pytest.approx(score)
