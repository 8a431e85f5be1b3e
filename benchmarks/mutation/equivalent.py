"""Mutants that no test can notice, one by one with the reason: file, then what is changed where.

An entry that names no mutant of its file any more is reported as an error, so that the list cannot rot.
"""

from __future__ import annotations

EQUIVALENT: dict[str, dict[str, str]] = {
    "mlxdpo/losses/loss.py": {
        "Loss.start: zip(self.terms, values, strict=True) -> zip(self.terms, values)": "values has an entry per term",
        "Loss.start: True -> False": "the same: values is made with one entry per term, strict has nothing to refuse",
        "resolve: zip(names, objectives, shares, strict=True) -> zip(names, objectives, shares)": (
            "their lengths are compared three lines above, with a message for the user"
        ),
        "resolve: True -> False": "the same: lengths that differ are refused before",
        "_check_knobs: continue -> break [1]": "behind f_alpha come only switches, over which the loop goes anyway",
    },
    "mlxdpo/losses/modifiers.py": {
        "ld_pairs: pairs.shared is not None and pairs.ref_shared is not None -> pairs.shared is not None or"
        " pairs.ref_shared is not None": "an assertion about ourselves: both are scored together or neither",
        "ld_log_ratios: pairs.shared is not None and pairs.ref_shared is not None -> pairs.shared is not None or"
        " pairs.ref_shared is not None": "an assertion about ourselves: both are scored together or neither",
    },
    "mlxdpo/losses/ratios.py": {
        "bounded_expm1: mx.abs(x) < 0.5 -> mx.abs(x) <= 0.5": "at one half both branches give the same float32",
        "bounded_expm1: 0.5 -> 1.5 [1]": "the lower bound of the clip keeps the other branch finite, as -1.5 does",
        "bounded_expm1: 0.5 -> 1.5 [2]": "the upper bound of the clip keeps the other branch finite, as 1.5 does",
        "log1mexp: x > -math.log(2) -> x >= -math.log(2)": "at the border both branches are accurate to a float32",
        "log1mexp: math.log(2) -> math.log1p(2)": "from log 2 to log 3 both branches are accurate to a float32",
        "log1mexp: 2 -> 3": "from log 2 to log 3 both branches are accurate to a float32",
        "log1mexp: -1.0 -> 1.0": "the branch not taken is NaN then, but its slope is finite and multiplied by zero",
        "log1mexp: -1.0 -> 1.0 [1]": "the branch not taken is NaN then, but its slope is finite and multiplied by zero",
        "log1mexp: 1.0 -> 2.0": "harmless input of the branch that is not taken; -2 is as harmless as -1",
        "log1mexp: 1.0 -> 2.0 [1]": "harmless input of the other branch when that is not taken; -2 is as harmless",
    },
    "mlxdpo/losses/unpaired.py": {
        "kto: rows.desirable > 0.5 -> rows.desirable >= 0.5": "a thumb is 0 or 1 (types.Extras)",
        "apo_zero_unpaired: rows.desirable > 0.5 -> rows.desirable >= 0.5": "a thumb is 0 or 1 (types.Extras)",
    },
    "mlxdpo/forward/logprobs.py": {
        "completion_logps: -1 -> 1": "the last axis of two is axis 1",
    },
    "mlxdpo/data/encode.py": {
        ": 1000 -> 1001": "how many rows are tokenised in one call; the rows come out the same",
        "_decode: unwrap(tokenizer).decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)"
        " -> unwrap(tokenizer).decode(ids.tolist(), clean_up_tokenization_spaces=False)": "the library's own default",
        "_encode_chunk: zip(rows, changes, strict=True) -> zip(rows, changes)": "changes has an entry per row",
        "_encode_chunk: True -> False": "the same: changes is made with one entry per row",
        "_encode_chunk: zip(rows, rendered, changes, strict=True) -> zip(rows, rendered, changes)": (
            "rendered gets an entry per row, kept or refused"
        ),
        "_encode_chunk: True -> False [1]": "the same: rendered gets an entry per row, kept or refused",
        "_example: 'skip' -> 'XXskipXX'": "Report.refuse asks only whether the policy is to stop",
        "_one_bos: 0 -> 1 [1]": "the first id equals the second where this is asked",
    },
    "mlxdpo/data/template.py": {
        ": 'Red7' -> 'XXRed7XX'": "any word without blanks that the template does not hold serves as a probe",
        ": 'Blue8' -> 'XXBlue8XX'": "any word without blanks that the template does not hold serves as a probe",
        "Writer.ids: 'return_attention_mask' -> 'XXreturn_attention_maskXX'": "an output nobody reads; only for speed",
        "Writer.ids: 'return_token_type_ids' -> 'XXreturn_token_type_idsXX'": "an output nobody reads; only for speed",
        "Writer.ids: False -> True [1]": "asks for the attention mask, an output nobody reads; only for speed",
        "Writer.ids: False -> True [2]": "asks for token types, an output nobody reads; only for speed",
        "Writer.ids: self.tokenizer(list(texts), **wanted, verbose=False) -> self.tokenizer(list(texts), **wanted)": (
            "a warning of the library on lengths, no number"
        ),
        "Writer.ids: False -> True [3]": "verbose: a warning of the library on lengths, no number",
        "_start: len(with_special) - len(without) -> len(with_special) + len(without)": (
            "beyond the difference of the lengths the slice is too short to be equal"
        ),
        "_start: 1 -> 2": "one place more, where the slice is too short to be equal",
        "_probe_turn: 'Which?' -> 'XXWhich?XX'": "any question serves",
        "_probe_turn: answers[0].rpartition(PROBES[0]) -> answers[0].partition(PROBES[0])": (
            "they differ only for a template that prints the answer twice, which the next line refuses either way"
        ),
        "_special: sorted(added | set(tokenizer.all_special_tokens) | stops, key=lambda t: (-len(t), t)) -> sorted("
        "added | set(tokenizer.all_special_tokens) | stops)": "_first takes the smallest of all, whatever their order",
        "_special: -len(t) -> len(t)": "_first takes the smallest of all, whatever their order",
    },
    "eval/metrics/intervals.py": {
        ": 256 -> 257": "how many resamples are held at once; NumPy draws the same stream",
        "wilson: successes > 0 -> successes >= 0": "at 0 the half width is a square's root: the bound is 0 anyway",
        "wilson: 1 + level -> 1 - level": "gives -z in place of z, which is squared",
        "_se: 0 -> 1": "no clusters and one cluster alike have no standard error",
        "clustered_share: error <= 1e-12 -> error < 1e-12": "no data have a standard error of exactly 1e-12",
    },
}
