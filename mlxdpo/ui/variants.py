"""Who answers: a run's model before and after tuning, at a checkpoint, or another run's; one set of weights for all.

A variant is a way to enter the model. Adapters are modules that stand in for linear layers: entering puts them in,
leaving takes them out, both in about a millisecond, and the arithmetic is that of a model loaded that way. Only full
fine-tuning and another base model need weights of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxdpo.config import Config
from mlxdpo.data.template import probe
from mlxdpo.inference.trained_run import ModelContext, check_reference
from mlxdpo.io.digest import folder_digest
from mlxdpo.model.adapters import WEIGHTS, load_adapter, load_run, read_settings
from mlxdpo.model.policy import Policy, load_policy
from mlxdpo.model.strength import check_strength, refuse_dora, scaled
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.training.reference import find_reference
from mlxdpo.types import UserError

BEFORE, AFTER = "before", "after"


class Variant(NamedTuple):
    """One that answers. `enter` gives the model; `digest` names the adapter, None for the bare model."""

    name: str
    enter: ModelContext
    digest: str | None


class RunVariants(NamedTuple):
    """A run's variants: `after` is tuned, `before` is where training started, `reference` what rewards count from.

    `chat` says whether text is written as turns by the chat template, or continued as it stands.
    """

    run: Run
    config: Config
    policy: Policy
    before: Variant
    after: Variant
    reference: ModelContext
    chat: bool


class LoadedVariants:
    """The variants that are loaded. Belongs to the MLX thread; nothing else may call it."""

    def __init__(self) -> None:
        self._bases: dict[str, Policy] = {}
        self._runs: dict[Path, tuple[Any, RunVariants]] = {}
        self._adapted_variants: dict[Path, tuple[int, Variant]] = {}

    def load(self, run: Run) -> RunVariants:
        """A run's variants, loaded when first asked for and again when its adapter has changed.

        Raises `UserError` when the run has no adapter yet, or its model or reference is not the one it was trained on.
        """
        stamp = _stamp(run.adapter)
        known = self._runs.get(run.path)
        if known is None or known[0] != stamp:
            self._runs[run.path] = (stamp, self._load(run))
        return self._runs[run.path][1]

    def _load(self, run: Run) -> RunVariants:
        run.need("model.path", "model.adapter", "reference.model", "reference.adapter")
        config, manifest = run.config(), run.manifest()
        base = self._base(config)
        if base.identity["digest"] != manifest["model"]["digest"]:
            raise UserError(f"{run.path}: {config.model.path} is no longer the model this run was trained on")
        start = config.model.adapter
        before = Variant(BEFORE, partial(contextlib.nullcontext, base.model), None)
        if start is not None:
            before = self._adapted(BEFORE, base, run, Path(start))
        after = self._adapted(AFTER, base, run, run.adapter)
        if config.reference.model is None:
            check_reference(run, base, start)
            reference = before.enter
        else:
            other, adapter = find_reference(config, base)
            check_reference(run, other, adapter)
            other.model.eval()
            reference = partial(contextlib.nullcontext, other.model)
        chat = config.data.template != "plain" and probe(base.tokenizer, config.data).chat
        return RunVariants(run, config, base, before, after, reference, chat)

    def _base(self, config: Config) -> Policy:
        """The bare model of a recipe. Another one takes its place: two would not fit where one just does."""
        key = config.model.model_copy(update={"adapter": None}).model_dump_json()
        if key not in self._bases:
            self._bases.clear()
            self._runs.clear()
            self._adapted_variants.clear()
            self._bases[key] = load_policy(config.model)
            self._bases[key].model.eval()
        return self._bases[key]

    def _adapted(self, name: str, base: Policy, run: Run, folder: Path) -> Variant:
        stamp = _stamp(folder)
        known = self._adapted_variants.get(folder)
        if known is None or known[0] != stamp:
            self._adapted_variants[folder] = (
                stamp,
                Variant(name, _adapter_context(base, run, folder), folder_digest(folder)),
            )
        return self._adapted_variants[folder][1]._replace(name=name)

    def at_strength(self, loaded: RunVariants, strength: float) -> Variant:
        """The tuned model at a strength: 1 is as trained, 0 the model before tuning.

        Raises `UserError` for what has no strength here: DoRA, every-weight runs, and runs started from an adapter.
        """
        if strength == 1:
            return loaded.after
        check_strength(strength)
        refuse_dora(method := read_settings(loaded.run.adapter).method, loaded.run.adapter)
        if method == "full" or loaded.config.model.adapter is not None:
            kind = "trained every weight" if method == "full" else "started from an adapter"
            raise UserError(
                f"{loaded.run.path.name} {kind}, so another strength needs separate weights; use a terminal: "
                f"mlxdpo generate {loaded.run.path} --strength {strength:g} --prompt '...'"
            )
        return loaded.after._replace(enter=partial(_scaled_context, loaded.after.enter, strength))

    def checkpoint(self, loaded: RunVariants, name: str) -> Variant:
        """A checkpoint of a run. Raises `UserError` when there is none of that name."""
        folders = {folder.name: folder for folder in checkpoint.steps(loaded.run.checkpoints)}
        if name not in folders:
            raise UserError(f"{loaded.run.path}: no checkpoint {name}; there are {', '.join(folders) or 'none'}")
        return self._adapted(name, loaded.policy, loaded.run, folders[name])

    def other_run(self, loaded: RunVariants, other: Run) -> Variant:
        """Another run's tuned model beside this run's. Raises `UserError` when it does not share the base model."""
        then = other.manifest()["model"]
        for name in ("digest", "dtype", "quantization"):
            if then[name] != loaded.policy.identity[name]:
                raise UserError(
                    f"{other.path.name} was trained on a different base model from {loaded.run.path.name} ({name} "
                    f"differs); open it separately instead"
                )
        return self._adapted(other.path.name, loaded.policy, other, other.adapter)


def _stamp(folder: Path) -> int:
    file = folder / WEIGHTS
    if not file.exists():
        raise UserError(f"{folder.parent}: no adapter there yet; wait until training has finished, or resume it")
    return file.stat().st_mtime_ns


def _adapter_context(base: Policy, run: Run, folder: Path) -> ModelContext:
    """How to enter the model with the adapter of `folder`."""
    lora = read_settings(folder)
    if lora.method == "full":
        model = load_run(run, checkpoint=folder).model
        model.eval()
        return partial(contextlib.nullcontext, model)
    model = base.model
    load_adapter(model, folder, lora)
    model.eval()  # dropout on the adapters would make another model of it
    wrapped = {n: m for n, m in model.named_modules() if "lora_a" in m and ("linear" in m or "embedding" in m)}
    bare = {name: module["linear" if "linear" in module else "embedding"] for name, module in wrapped.items()}
    _put(model, bare)
    return partial(_with_modules, model, wrapped, bare)


@contextlib.contextmanager
def _scaled_context(enter: ModelContext, strength: float) -> Iterator[nn.Module]:
    with enter() as model, scaled(model, strength):
        yield model


@contextlib.contextmanager
def _with_modules(
    model: nn.Module, wrapped: Mapping[str, nn.Module], bare: Mapping[str, nn.Module]
) -> Iterator[nn.Module]:
    _put(model, wrapped)
    try:
        yield model
    finally:
        _put(model, bare)


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    model.update_modules(tree_unflatten(list(modules.items())))
