"""Docstrings and comments tell the truth: every name in backticks is defined, and a dotted one where it says."""

import ast
import io
import re
import tokenize
from functools import cache

from house import FILES, ROOT, each_file, tree_of

NAMED = re.compile(r"(?<!`)`([A-Za-z_][\w./]*?)(?:\(\))?`(?!`)")
OUTSIDE = {
    "process_single_model", "glm_winrate",  # functions and files of evaluations that ours are compared with
    "launch", "nohup", "mpirun",  # commands of others
    "eos_token", "PeftModel", "from_pretrained",  # transformers and peft
    "response_a", "response_b", "report.html", "report.md", "model.gguf", "model.safetensors",  # files and columns
    "model.safetensors.index.json", "heldout.jsonl", "prompts.jsonl", "glm_winrate.py",
}  # fmt: skip


def docstrings(tree):
    """(line, text) of every string that stands by itself: of modules, classes, functions, fields and constants."""
    return [
        (node.lineno, node.value.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def comments(path):
    """(line, text) of every comment, of files whose comments name something."""
    text = path.read_text("utf-8")
    if not re.search("#.*`", text):  # most files; to split one into tokens takes long
        return []
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def names_in(tree):
    """Every identifier of a syntax tree: definitions, parameters, fields, names of libraries, columns and keys."""
    texts, found = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}, set()
    for node in ast.walk(tree):
        for field in ("name", "id", "attr", "arg", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                found.update(value.split("."))
        if isinstance(node, ast.ImportFrom) and node.module:
            found.update(node.module.split("."))
        text = node.value if isinstance(node, ast.Constant) and id(node) not in texts else None
        if isinstance(text, str) and not re.search(r"\s", text):
            found.update([text, *re.findall(r"[A-Za-z_]\w*", text)])
    return found


@cache
def known():
    """Identifiers of the whole tree; and the names defined in each module and class of it, by its own name."""
    everywhere, inside = set(OUTSIDE), {}
    for path in FILES:
        tree = tree_of(path)
        names = names_in(tree)
        everywhere |= names | set(path.relative_to(ROOT).with_suffix("").parts)
        inside.setdefault(path.stem if path.stem != "__init__" else path.parent.name, set()).update(names)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.bases:
                inside.setdefault(node.name, set()).update(names_in(node))
    return everywhere, inside


@cache
def paths():
    """Every file, but not what lies in environments and other hidden folders."""
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    return [path.as_posix() for folder in folders for path in folder.rglob("*")]


def is_file(name):
    return any(path.endswith(f"/{name}") for path in paths())


def missing(name):
    """Whether a name in backticks is not found."""
    everywhere, inside = known()
    if name in everywhere:
        return False
    if "/" in name or name.endswith(".py"):
        return name.endswith(".py") and not is_file(name)
    first, *rest = name.split(".")
    if rest and first in inside:  # a setting is named by its section, which a folder may be called too
        folder = ROOT / "mlxdpo" / first if first != "mlxdpo" else ROOT / "mlxdpo"
        return rest[0] not in inside[first] | inside["config"] | OUTSIDE and not list(folder.glob(f"{rest[0]}*"))
    return any(part not in everywhere for part in (first, *rest))


@each_file
def test_every_name_in_backticks_is_found(path):
    texts = [*docstrings(tree_of(path)), *comments(path)]
    lost = [f"{line}: `{name}`" for line, text in texts for name in NAMED.findall(text) if missing(name)]
    assert not lost, f"names what is not there: {', '.join(lost)}"


def test_a_name_that_is_not_there_is_noticed():
    for name in ("prompt_ident", "adapters.warm_start", "Batch.lanes", "model/trunk.py"):
        assert missing(name), name
    for name in ("adapters.attach_lora", "Batch.parts", "forward/streams.py", "data.columns", "train.batch_size"):
        assert not missing(name), name
