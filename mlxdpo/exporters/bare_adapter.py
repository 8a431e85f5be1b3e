"""A bare adapter from the Hub, mlx-lm's or PEFT's, as the makings of a run: base model, settings, and a manifest of it.

What an adapter alone does not say (objective, data, seed) is said to be not known; its reference is its base model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxdpo.config import Config, LoraConfig, ModelConfig
from mlxdpo.data.template import template_digest
from mlxdpo.exporters import peft
from mlxdpo.exporters.client import Say
from mlxdpo.exporters.download import Listing, download
from mlxdpo.exporters.redact import card_metadata
from mlxdpo.io.names import looks_like_hub_id
from mlxdpo.machine.device import this_machine, versions
from mlxdpo.model.adapters import SETTINGS, WEIGHTS, load_adapter, read_settings, save_adapter
from mlxdpo.model.policy import BUILTIN, Policy, load_policy
from mlxdpo.training.reference import identity_of
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FOLDERS = ("", "mlx/", "adapter/")  # where an mlx-lm adapter may lie, in this order
CARD = "README.md"


class Bare(NamedTuple):
    """A run made of an adapter."""

    config: Config
    manifest: dict[str, Any]


class Place(NamedTuple):
    """Where an adapter lies in a repository ("" is its root), and the name of its weights, which tells the kind."""

    folder: str
    weights: str


def find_adapter(names: Collection[str]) -> Place | None:
    """A repository's adapter: mlx-lm's own where there is one, else PEFT's, else None."""
    places = [Place(folder, weights) for weights in (WEIGHTS, peft.WEIGHTS) for folder in FOLDERS]
    return next((p for p in places if p.folder + p.weights in names and p.folder + SETTINGS in names), None)


def describe_adapter(api: HfApi, listing: Listing, place: Place, folder: Path, base: str | None, say: Say) -> Bare:
    """Bring an adapter into `folder`/adapter, in mlx-lm's form, and describe the run that it makes.

    Raises `UserError` when no base model is known, or the adapter does not fit it.
    """
    at, pulled = place.folder, folder / "pulled"
    wanted = [at + place.weights, at + SETTINGS, *([CARD] if CARD in listing.entries else [])]
    say(f"{len(wanted)} files, {sum(listing.entries[name].size for name in wanted) / 1e6:,.1f} MB")
    download(api, listing, wanted, pulled, say)
    named = base or _base_of_settings(pulled / (at + SETTINGS)) or _base_of_card(pulled / CARD)
    if named is None:
        raise UserError(f"{listing.repo} does not name its base model; name it with --base")
    if base is None and named not in BUILTIN and not looks_like_hub_id(named):
        raise UserError(f"{listing.repo} was trained from a local folder called {named!r}; name that model with --base")
    say(f"loading the base model {named}, to see that the adapter fits it")
    policy = load_policy(ModelConfig(path=named))
    make = _from_mlx if place.weights == WEIGHTS else _from_peft
    lora = _fitted(lambda: make(policy, pulled / at, folder / "adapter"), pulled / at, listing.repo)
    shutil.rmtree(pulled)
    model = ModelConfig(path=named, dtype=policy.identity["dtype"])
    config = Config(model=model, lora=lora)
    return Bare(config, manifest_of(policy, config, listing))


def _from_mlx(policy: Policy, source: Path, target: Path) -> LoraConfig:
    """mlx-lm's adapter as it stands, byte for byte."""
    lora = read_settings(source)
    load_adapter(policy.model, source, lora)
    target.mkdir()
    for name in (WEIGHTS, SETTINGS):
        (source / name).rename(target / name)
    return lora


def _from_peft(policy: Policy, source: Path, target: Path) -> LoraConfig:
    """PEFT's adapter, rewritten."""
    lora = peft.attach(policy, peft.read_peft(source))
    save_adapter(policy.model, lora, target)
    return lora


def _fitted(make: Callable[[], LoraConfig], source: Path, repo: str) -> LoraConfig:
    """What `make` reads from `source`, a stranger's files: anything may be wrong with them."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{repo}: {str(error).replace(str(source), 'its adapter')}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        detail = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{repo}: its adapter cannot be read ({type(error).__name__}: {detail})") from None


def manifest_of(policy: Policy, config: Config, listing: Listing) -> dict[str, Any]:
    """The manifest of a run whose training nobody recorded here: identities are real, the rest is not known."""
    return {
        "versions": versions(),
        "machine": this_machine()._asdict(),
        "seed": config.train.seed,
        "model": dict(policy.identity) | {"adapter": None},
        "reference": identity_of(policy.identity, None),
        "reference_source": {"model": policy.identity["source"], "adapter": None},
        "template": template_digest(policy.tokenizer, config.data),
        "data": {"source": "not known", "digest": None, "pairs": 0, "heldout": 0, "reports": {}},
        "pulled": {"repository": listing.repo, "commit": listing.commit},
    }


def _base_of_settings(file: Path) -> str | None:
    """PEFT's adapters name their base, and so do some of mlx-lm's."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError:
        return None
    names = [found.get(key) for key in ("base_model_name_or_path", "model")] if isinstance(found, Mapping) else []
    return next((name for name in names if isinstance(name, str) and name), None)


def _base_of_card(file: Path) -> str | None:
    """What the card's metadata calls `base_model`; of several (a merge) none is the base of an adapter."""
    found = card_metadata(file).get("base_model")
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    return found if isinstance(found, str) else None
