"""Encoded pairs on disk are the pairs; they are whole or absent; a second start finds them, and only those it may."""

import dataclasses
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outlines import alone
from tiny_runs import finish, recipe, write_pairs
from tiny_tokenizers import base_tokenizer, chatml_tokenizer, llama3_tokenizer

from mlxdpo.config import DataConfig
from mlxdpo.data import dataset, encode, examples, sources
from mlxdpo.data.dataset import STAGING, Spool, encode_split, pairs_folder, publish_dataset, read_split, source_key
from mlxdpo.data.encode import encode_all
from mlxdpo.data.examples import Examples, open_examples, row_digest, write_examples
from mlxdpo.data.planning import outline, plan_epoch, plan_straight
from mlxdpo.data.read import heldout_prompts, read_pairs, split_heldout
from mlxdpo.io import digest
from mlxdpo.io.staging import staging_folder
from mlxdpo.training.reference import read_table, with_reference, write_table
from mlxdpo.types import Example, UserError

pytestmark = pytest.mark.usefixtures("cache")

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(lambda ids: np.array(ids, np.int32))
EXAMPLES = st.lists(st.builds(Example, IDS, IDS, IDS, st.text(st.characters(), max_size=4)), max_size=7)


def plain(examples):
    """Comparable."""
    return [(e.prompt.tolist(), e.chosen.tolist(), e.rejected.tolist(), e.where) for e in examples]


def old_digest(examples):
    """SHA-256 over count and ids of every vector, one pair after the other: what runs had in their manifest before."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt, example.chosen, example.rejected):
            digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("flush", [1, 2, 1000])
def test_what_is_written_is_read(tmp_path_factory, flush, monkeypatch):
    monkeypatch.setattr(examples, "FLUSH", flush)

    @settings(max_examples=40)
    @given(EXAMPLES)
    def round_trip(examples):
        folder = tmp_path_factory.mktemp("store") / "part"
        list(write_examples(folder, iter(examples)))
        for pairs in (open_examples(folder), Examples.of(examples)):
            assert plain(pairs) == plain(examples) and len(pairs) == len(examples)
            assert pairs.digest == old_digest(examples)
            assert pairs.lengths.tolist() == [[len(e.prompt), len(e.chosen), len(e.rejected)] for e in examples]
            assert pairs.row_lengths.tolist() == [
                len(e.prompt) + max(map(len, (e.chosen, e.rejected))) for e in examples
            ]
            digests = [[row_digest(e.prompt, c) for c in (e.chosen, e.rejected)] for e in examples]
            assert [[row.tobytes() for row in both] for both in pairs.rows] == digests

    round_trip()


def test_index_as_in_a_list():
    some = [Example(*(np.array([n, k], np.int32) for k in range(3)), f"row {n}") for n in range(4)]
    pairs = Examples.of(some)
    assert Examples.of(pairs) is pairs
    assert [pairs[i].where for i in (0, 3, -1, -4)] == ["row 0", "row 3", "row 3", "row 0"]
    assert [e.where for e in pairs[1:3]] == ["row 1", "row 2"] and plain(pairs[::-1]) == plain(some[::-1])
    for beyond in (4, -5):
        with pytest.raises(IndexError):
            pairs[beyond]


def test_pairs_on_disk_are_not_loaded_and_cannot_be_written(tmp_path):
    list(write_examples(tmp_path / "part", [Example(*(np.arange(3, dtype=np.int32),) * 3, "row 1")]))
    pairs = open_examples(tmp_path / "part")
    with pytest.raises(ValueError, match="read-only"):
        pairs[0].chosen[0] = 7
    base = pairs.tokens
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize("name", ["tokens", "where", "rows"])
def test_a_damaged_file_is_named(tmp_path, name):
    list(write_examples(tmp_path / "part", [Example(*(np.arange(3, dtype=np.int32),) * 3, "row 1")] * 2))
    file = tmp_path / "part" / name
    size = file.stat().st_size // 2 // 16 * 16 if name != "where" else 3
    os.truncate(file, size)
    with pytest.raises(UserError, match=rf"part: the cached tokens are corrupted \(checksum mismatch in `{name}`\)$"):
        open_examples(tmp_path / "part")


ROWS = st.lists(st.tuples(*[st.sampled_from("abcdefg")] * 3), min_size=2, max_size=12)


def write(file, rows):
    file.write_text(
        "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), r, strict=True))) + "\n" for r in rows)
    )
    return file


def made(data, tokenizer, seed=0, eos_ids=frozenset()):
    """A start."""
    return encode_split(read_split(data, seed), data, tokenizer, eos_ids)


@settings(max_examples=25)
@given(ROWS, st.sampled_from([0.0, 0.1, 0.6, 0.99]), st.integers(0, 3))
def test_streaming_gives_what_lists_give(tmp_path_factory, rows, fraction, seed):
    file = write(tmp_path_factory.mktemp("rows") / "pairs.jsonl", rows)
    data, tokenizer = DataConfig(path=str(file), eval_fraction=fraction), base_tokenizer()
    try:
        pairs, report = read_pairs(data)
    except UserError as error:
        with pytest.raises(UserError) as again:
            read_split(data, seed)
        assert str(again.value) == str(error)
        return
    sides = [encode_all(side, tokenizer, data) for side in split_heldout(pairs, fraction, seed)]
    for _ in ("fresh", "kept"):
        data_set = made(data, tokenizer, seed)
        assert [plain(data_set.train), plain(data_set.heldout)] == [plain(examples) for examples, _ in sides]
        assert list(data_set.reports.values()) == [report, *(report for _, report in sides)]
        assert list(data_set.reports) == ["data", "encoding", "held-out encoding"] and data_set.overlap == 0
        both = " ".join(old_digest(examples) for examples, _ in sides)
        assert data_set.digest == hashlib.sha256(both.encode()).hexdigest()


@given(
    st.sets(st.binary(min_size=16, max_size=16), max_size=9), st.sampled_from([0, 0.05, 0.5, 0.95]), st.integers(0, 9)
)
def test_held_out_are_the_lowest_draws(prompts, fraction, seed):
    """By the definition: as many of the prompts in the order of their draws as are drawn below the fraction, but one
    at least and not all."""
    draw = {p: int.from_bytes(hashlib.sha256(p + str(seed).encode()).digest()[:8], "big") / 2**64 for p in prompts}
    count = min(max(sum(d < fraction for d in draw.values()), 1), len(prompts) - 1)
    none = not fraction or len(prompts) < 2
    assert heldout_prompts(prompts, fraction, seed) == (set() if none else set(sorted(prompts, key=draw.get)[:count]))


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_plans_are_sorted_windows(lengths, size, accumulate, epoch):
    order = np.random.Generator(np.random.PCG64([7, epoch])).permutation(len(lengths)).tolist()

    def batches(indices):
        ranked = sorted(indices, key=lambda i: (lengths[i], i))
        return [tuple(ranked[i : i + size]) for i in range(0, len(ranked), size)]

    windows = [order[i : i + size * accumulate] for i in range(0, len(order), size * accumulate)]
    assert plan_epoch(alone(lengths), size, accumulate, 7, epoch).windows == tuple(tuple(batches(w)) for w in windows)
    assert plan_straight(alone(lengths), size) == batches(range(len(lengths)))[::-1]


def test_rows_do_not_pile_up(tmp_path, monkeypatch):
    """12 MB of rows in a file go through in under 3 MB of Python's memory."""
    monkeypatch.setattr(encode, "CHUNK", 10)
    monkeypatch.setattr(examples, "FLUSH", 10)
    texts = [f"{n} " + "word " * 2000 for n in range(400)]
    data = DataConfig(path=str(write(tmp_path / "pairs.jsonl", [(t, t + "b", t + "c") for t in texts])), max_length=64)
    tokenizer = chatml_tokenizer()
    short = dict.fromkeys(("add_special_tokens", "return_attention_mask", "return_token_type_ids"), False)
    ids = [tokenizer(t, **short)["input_ids"] for t in ("a b", "a b c", "a b d")]
    # The tokenizer is not what is measured here.
    monkeypatch.setattr(encode.Writer, "ids", lambda self, texts: [ids[i % 3] for i in range(len(texts))])
    tracemalloc.start()
    try:
        data_set = made(data, tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data_set.train) + len(data_set.heldout) == 400
    assert os.path.getsize(data.path) > 12e6 and peak < 3e6


@pytest.fixture
def reads(monkeypatch):
    """Paths that were read from here on."""
    paths, stream = [], dataset.stream_rows

    def counted(data, take, path=None, split=None):
        paths.append(path or data.path)
        return stream(data, take, path, split)

    monkeypatch.setattr(dataset, "stream_rows", counted)
    return paths


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_second_start_reads_nothing_and_says_the_same(tmp_path, reads):
    rows = [("q1", "a", "b"), ("q1", "a", "b"), ("q2", "a", ""), ("q3", "same", "same"), ("q4", "x" * 99, "b")]
    rows += [(f"p{n} " * n, "good", "bad") for n in range(1, 20)]
    other = write(tmp_path / "other.jsonl", [("q1", "x", "y"), ("new", "x", "y"), ("new", "", "y")])
    data = DataConfig(
        path=str(write(tmp_path / "pairs.jsonl", rows)),
        eval=str(other),
        on_bad_row="skip",
        max_length=32,
        template="plain",
    )
    first = made(data, base_tokenizer())
    assert len(reads) == 2 and first.overlap == 1
    assert {reason for report in first.reports.values() for reason in (*report.refused, *report.changed)} >= {
        "duplicate of an earlier row", "empty completion", "identical pair", "completion too long", "prompt trimmed",
    }  # fmt: skip
    again = made(data, base_tokenizer())
    assert len(reads) == 2
    assert list(again.reports.items()) == list(first.reports.items())
    assert [r.lines() for r in again.reports.values()] == [r.lines() for r in first.reports.values()]
    assert (again.digest, again.overlap, again.template) == (first.digest, first.overlap, first.template)


CHANGED = {
    "split": "test",
    "eval": "other.jsonl",
    "eval_fraction": 0.4,
    "format": "text",
    "columns": {"prompt": "prompt"},
    "on_bad_row": "skip",
    "template": "chat",
    "eos": "leave",
    "thinking": True,
    "max_length": 99,
    "on_long_prompt": "drop",
    "on_long_completion": "truncate",
    "reasoning": "keep",
    "system": "fold",
}


@pytest.mark.parametrize(
    "name", [name for name in DataConfig.model_fields if name not in ("path", "group", "date", "credit")]
)
def test_no_setting_finds_what_another_made(tmp_path, monkeypatch, reads, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "other.jsonl", [("r", "x", "y")])
    data = DataConfig(path=str(write(tmp_path / "pairs.jsonl", [("p", "a", "b"), ("q", "a", "b")])))
    made(data, chatml_tokenizer())
    made(data.model_copy(update={name: CHANGED[name]}), chatml_tokenizer())
    assert len(reads) == (3 if name == "eval" else 2)


def test_how_pairs_are_batched_changes_no_token(tmp_path, reads):
    data = DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl")))
    assert {made(data.model_copy(update={"group": g}), chatml_tokenizer()).digest for g in ("prompt", "none")}
    assert len(reads) == 1


def test_what_the_tokenizer_and_the_model_say_is_part_of_the_name(tmp_path, reads):
    data = DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl")))
    digests = {made(data, chatml_tokenizer()).digest, made(data, llama3_tokenizer()).digest}
    assert len(digests) == len(reads) == 2
    eos = chatml_tokenizer().eos_token_id
    made(data, chatml_tokenizer(), eos_ids=frozenset({eos}))
    assert len(reads) == 2  # the tokenizer's own
    made(data, chatml_tokenizer(), eos_ids=frozenset({eos, 5}))
    assert len(reads) == 3


def test_the_seed_counts_where_it_draws(tmp_path, reads):
    file = str(write_pairs(tmp_path / "pairs.jsonl"))
    other = str(write_pairs(tmp_path / "other.jsonl", seed=1))
    for settings_, count in (({}, 2), ({"eval_fraction": 0.0}, 1), ({"eval": other}, 2)):
        reads.clear()
        for seed in (0, 1):
            made(DataConfig(path=file, **settings_), chatml_tokenizer(), seed)
        assert len(reads) == count


def test_content_counts_and_place_does_not(tmp_path, reads):
    file = write(tmp_path / "pairs.jsonl", [("p", "a", "b"), ("q", "a", "b")])
    start = lambda path: made(DataConfig(path=str(path)), base_tokenizer())  # noqa: E731
    first = start(file)
    os.utime(file, (1, 1))
    (tmp_path / "moved").mkdir()
    file.rename(tmp_path / "moved" / "pairs.jsonl")
    assert start(tmp_path / "moved" / "pairs.jsonl").digest == first.digest and len(reads) == 1
    stamp = (tmp_path / "moved" / "pairs.jsonl").stat()
    write(file, [("p", "a", "b"), ("q", "a", "c")])  # as long as the first
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert start(file).digest != first.digest and len(reads) == 2
    file.rename(tmp_path / "named.jsonl")  # rows are called otherwise
    assert start(tmp_path / "named.jsonl").train[0].where.startswith("named.jsonl:") and len(reads) == 3


def test_changed_code_or_libraries_find_nothing(tmp_path, reads, monkeypatch):
    data = DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl")))
    made(data, base_tokenizer())
    with monkeypatch.context() as other:
        other.setattr(dataset, "_code_digest", lambda: "another")
        made(data, base_tokenizer())
    assert len(reads) == 2
    monkeypatch.setattr(dataset, "version_of", lambda name: "0")
    made(data, base_tokenizer())
    assert len(reads) == 3


def test_rate_beta_and_objective_do_not_encode_again(tmp_path, reads):
    finish(recipe(tmp_path, "first", train={"steps": 1}))
    finish(
        recipe(tmp_path, "second", train={"steps": 1, "seed": 4}, optim={"lr": 1e-5}, loss={"name": "ipo", "beta": 0.3})
    )
    assert len(reads) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
def test_an_interrupted_start_leaves_nothing(tmp_path, monkeypatch, error):
    data = DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl")))
    monkeypatch.setattr(encode, "CHUNK", 4)
    chunk, calls = encode._encode_chunk, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            assert files_in(pairs_folder())  # something was under way
            raise error
        return chunk(*args)

    with monkeypatch.context() as broken, pytest.raises(BaseException) as raised:
        broken.setattr(encode, "_encode_chunk", failing)
        made(data, base_tokenizer())
    assert raised.type is (error if isinstance(error, type) else type(error))
    assert files_in(pairs_folder()) == []
    pairs, _ = read_pairs(data)
    assert plain(made(data, base_tokenizer()).train) == plain(
        encode_all(split_heldout(pairs, 0.1, 0)[0], base_tokenizer(), data)[0]
    )


def test_refused_data_are_refused_again(tmp_path):
    data = DataConfig(
        path=str(write(tmp_path / "pairs.jsonl", [("p " * 99, "a", "b")])), max_length=16, on_long_prompt="drop"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=r"no pairs left to train on .*prompt too long"):
            made(data, base_tokenizer())
    assert files_in(pairs_folder()) == []


def test_drafts_of_killed_processes_go_and_live_ones_stay(tmp_path):
    folder = tmp_path / "pairs"
    code = (
        "import sys, time; from pathlib import Path; from mlxdpo.io.staging import staging_folder\n"
        "with staging_folder(Path(sys.argv[1]), '.draft-') as folder:\n"
        "    (folder / 'tokens').write_text('half'); print(folder, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    path = process.stdout.readline().strip()
    with staging_folder(folder, STAGING):
        assert os.path.exists(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert os.path.exists(path)
    with staging_folder(folder, STAGING) as mine:
        assert os.listdir(folder) == [mine.name]
    assert os.listdir(folder) == []


def test_the_first_of_two_writers_stays(tmp_path):
    for text in ("first", "second"):
        with staging_folder(tmp_path / "pairs", STAGING) as folder:
            (folder / "file").write_text(text)
            publish_dataset(folder, tmp_path / "pairs" / "key" / "name")
    assert (tmp_path / "pairs" / "key" / "name" / "file").read_text() == "first"
    assert files_in(tmp_path / "pairs") == ["key", "key/name", "key/name/file"]


def test_a_source_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    file = write_pairs(tmp_path / "pairs.jsonl")
    data, filling = DataConfig(path=str(file)), Spool.filling

    def then_changed(spool, rows):
        yield from filling(spool, rows)
        write_pairs(file, seed=9)

    with monkeypatch.context() as busy:
        busy.setattr(Spool, "filling", then_changed)
        old = made(data, base_tokenizer())
    assert files_in(pairs_folder()) == [] and len(old.train) > 0 and plain(old.train)  # files are gone, pairs are there
    assert made(data, base_tokenizer()).digest != old.digest


def test_a_pipe_is_read_once_and_not_kept(tmp_path):
    pipe, file = tmp_path / "pipe.jsonl", write_pairs(tmp_path / "pairs.jsonl")
    os.mkfifo(pipe)
    data = DataConfig(path=str(pipe), eval_fraction=0.0)
    writer = threading.Thread(target=pipe.write_bytes, args=(file.read_bytes(),))
    writer.start()
    piped = made(data, base_tokenizer())
    writer.join()
    assert source_key(data, 0) is None and files_in(pairs_folder()) == []
    assert piped.digest == made(DataConfig(path=str(file), eval_fraction=0.0), base_tokenizer()).digest


def test_a_hub_set_is_named_by_its_commit(monkeypatch, reads):
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(4)])
    monkeypatch.setattr(sources, "_load_hub", lambda path, split: rows.to_iterable_dataset())
    for commit, count in (("one", 1), ("one", 1), ("two", 2)):
        monkeypatch.setattr(sources, "_hub_commit", lambda path, commit=commit: commit)
        assert len(made(DataConfig(path="org/name"), base_tokenizer()).train) == 3
        assert len(reads) == count

    def silent(path):
        raise UserError("no answer")

    monkeypatch.setattr(sources, "_hub_commit", silent)
    for count in (3, 4):
        made(DataConfig(path="org/name"), base_tokenizer())
        assert len(reads) == count


def test_a_hub_that_does_not_answer_has_no_commit(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def unreachable(self, name, **options):
        raise RuntimeError("transport\nfailed")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(UserError, match=r"org/name: the Hub does not say which commit this is \(transport failed\)"):
        sources._hub_commit("org/name")
    assert sources.fingerprint("org/name", "train") is None


def test_file_digests_are_remembered_once_a_file_has_settled(tmp_path, monkeypatch):
    file, hashed = tmp_path / "file", []
    real = digest.hashlib.file_digest
    monkeypatch.setattr(digest.hashlib, "file_digest", lambda *args: hashed.append(1) or real(*args))
    file.write_text("one")
    expected = hashlib.sha256(b"one").hexdigest()
    assert [digest.file_digest(file) for _ in range(2)] == [expected] * 2 and len(hashed) == 2
    monkeypatch.setattr(digest, "SETTLED_NS", -1)
    assert [digest.file_digest(file) for _ in range(3)] == [expected] * 3 and len(hashed) == 3
    file.write_text("two")
    assert digest.file_digest(file) == hashlib.sha256(b"two").hexdigest()


def test_reference_tables_keep_digests_that_end_in_zeros(tmp_path):
    rows = [b"\0" * 16, b"a" + b"\0" * 15, b"a" * 15 + b"\0", b"a" * 16, b"\0" * 15 + b"a"]
    table = dict(zip(rows, [-1.0, -2.0, -3.0, float("-inf"), -5.0], strict=True))
    write_table(tmp_path / "table.safetensors", table, {})
    write_table(tmp_path / "table.safetensors", {rows[1]: -7.0}, {})
    assert read_table(tmp_path / "table.safetensors") == table | {rows[1]: -7.0}


def test_log_probs_that_are_kept_are_found_by_row(cache):
    """Pairs that share rows, in another order, beside rows the table lacks; what it has is not scored again."""
    ids = [np.array([n], np.int32) for n in range(6)]
    pair = lambda a, b: Example(ids[0], ids[a], ids[b], f"{a} over {b}")  # noqa: E731
    scorer = functools.partial(_scored_as, [])
    *_, (_, first) = with_reference([pair(1, 2), pair(3, 4)], scorer, {}, [(0, 1)], 2)
    assert first.tolist() == [[-1.0, -2.0], [-3.0, -4.0]]
    calls = []
    some = Examples.of([pair(4, 1), pair(2, 5), pair(2, 3)])
    *_, (done, logps) = with_reference(some, functools.partial(_scored_as, calls), {}, [(0,), (1,), (2,)], 1)
    assert logps.tolist() == [[-4.0, -1.0], [-2.0, -5.0], [-2.0, -3.0]] and done == 3 and len(calls) == 1


@dataclasses.dataclass
class _Pairs:
    chosen: np.ndarray
    rejected: np.ndarray
    shared: None = None


def _scored_as(calls, batch):
    """Minus the completion's only id."""
    calls.append(1)
    last, real = np.zeros(batch.length.shape, np.float32), np.array(batch.scored) == 1
    last[np.array(batch.owner)[real]] = -np.array(batch.targets)[real]
    return _Pairs(last[np.array(batch.chosen)], last[np.array(batch.rejected)])


def test_ticks_for_what_is_known_are_few(cache, monkeypatch):
    some = [
        Example(np.array([0], np.int32), np.array([n + 1], np.int32), np.array([n + 2], np.int32), "")
        for n in range(50)
    ]
    batches = plan_straight(outline(some, "none"), 1)
    monkeypatch.setattr("mlxdpo.training.reference.TICKS", 10)
    scorer = functools.partial(_scored_as, [])
    counts = [[done for done, _ in with_reference(some, scorer, {}, batches, 1)] for _ in range(2)]
    assert len(counts[0]) > 25 and counts[1] == [*range(1, 51, 5), 50]
