"""Back from the Hub: a repository becomes a run directory on which `generate`, `eval` and the app work.

A repository that `mlxdpo export --push` wrote holds run/: recipe, manifest and adapter. Any other one with an mlx-lm
adapter or a PEFT adapter is pulled as an adapter: its manifest is made here, from the base model that it names; what an
adapter alone does not say (objective, data, seed) is not known.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxdpo.config import Config, LoraConfig, ModelConfig, dump_config, load_config
from mlxdpo.data.template import template_digest
from mlxdpo.exporters import peft
from mlxdpo.exporters.client import Listing, Say, check_repo_id, connect, download, list_repository
from mlxdpo.exporters.record import HELDOUT, OF_THE_RUN, REFERENCE, RUN, START, card_metadata, public_name
from mlxdpo.io.atomic import write_json, write_text
from mlxdpo.io.checksum import PICKLES
from mlxdpo.io.digest import folder_digest
from mlxdpo.io.names import looks_like_hub_id
from mlxdpo.io.staging import publish_new, staging_folder
from mlxdpo.model.adapters import SETTINGS, WEIGHTS, load_adapter, read_settings, save_adapter
from mlxdpo.model.policy import BUILTIN, DOWNLOAD, Policy, find_model, load_policy
from mlxdpo.runs import check_manifest
from mlxdpo.training.manifest import describe_models
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
    say(f"loading the base model {named}, to check that the adapter fits it")
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
    return describe_models(config, policy, policy, None) | {
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


ESSENTIAL = [f"{RUN}/{name}" for name in ("config.yaml", "manifest.json", f"adapter/{WEIGHTS}", f"adapter/{SETTINGS}")]


class Pulled(NamedTuple):
    """The new run directory, what it was made from ("run" or "adapter"), the commit, and the base model's identity.

    `base_checked` is False where the base model is not on this machine yet: it is checked when it is first loaded.
    """

    path: Path
    kind: str
    commit: str
    base: str
    base_checked: bool


def pull_run(
    repo_id: str,
    *,
    revision: str | None = None,
    out: Path | None = None,
    base: str | None = None,
    say: Say = lambda text: None,
) -> Pulled:
    """Make the run directory `out` (default runs/NAME) from a repository. `base` replaces the base model that it names.

    Raises `UserError`, and leaves nothing behind, when `out` exists, the repository holds no run and no adapter, a name
    or a file in it is not what it should be, or the base model on this machine is another one.
    """
    check_repo_id(repo_id)
    target = out or Path("runs") / repo_id.split("/")[1]
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; choose another --out")
    api = connect()
    listing = list_repository(api, repo_id, revision, say)
    _make_parent(target)
    with staging_folder(target.parent, f".{target.name}-draft-") as folder:
        found = _fill_run(api, listing, folder, target, base, say)
        publish_new(folder, target)
    return found


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be created ({error.strerror}); choose another --out") from None


def _fill_run(api: HfApi, listing: Listing, folder: Path, target: Path, base: str | None, say: Say) -> Pulled:
    """Write the run into `folder`, which becomes `target`."""
    if set(ESSENTIAL) <= listing.entries.keys():
        return _fill_from_run(api, listing, folder, target, base, say)
    if any(name.startswith(f"{RUN}/") for name in listing.entries):
        missing = next(name for name in ESSENTIAL if name not in listing.entries)
        raise UserError(f"{listing.repo} holds a run without {missing}; its upload was interrupted, push it again")
    adapter = find_adapter(listing.entries)
    if adapter is None:
        pickled = next((name for name in sorted(listing.entries) if PICKLES.fullmatch(name)), None)
        also = f" ({pickled} is a pickle, which mlxdpo does not read)" if pickled else ""
        raise UserError(f"{listing.repo} contains neither an mlxdpo run nor a safetensors adapter{also}")
    found = describe_adapter(api, listing, adapter, folder, base, say)
    _place(folder, found.config, found.manifest, target)
    return Pulled(target, "adapter", listing.commit, found.config.model.path, True)


def _fill_from_run(api: HfApi, listing: Listing, folder: Path, target: Path, base: str | None, say: Say) -> Pulled:
    names = sorted(name for name in listing.entries if OF_THE_RUN.fullmatch(name))
    say(f"{len(names)} files, {sum(listing.entries[name].size for name in names) / 1e6:,.1f} MB")
    download(api, listing, names, folder, say)
    for part in (folder / RUN).iterdir():
        part.rename(folder / part.name)
    (folder / RUN).rmdir()
    manifest = read_manifest(folder / "manifest.json", listing.repo)
    config = localised(_read_recipe(folder / "config.yaml", listing.repo), manifest, folder, target, base, listing.repo)
    checked = check_base(config, manifest, listing.repo)
    _place(folder, config, manifest, target)
    return Pulled(target, "run", listing.commit, config.model.path, checked)


def _place(folder: Path, config: Config, manifest: Mapping[str, Any], target: Path) -> None:
    """The recipe as it holds here. The manifest stays as it was pulled."""
    write_text(folder / "config.yaml", dump_config(config.model_copy(update={"out": str(target)})))
    if not (folder / "manifest.json").exists():
        write_json(folder / "manifest.json", manifest)


def _read_recipe(file: Path, repo: str) -> Config:
    try:
        return load_config(file)
    except UserError as error:
        raise UserError(f"{repo}: {str(error).replace(str(file), 'run/config.yaml')}") from None


def read_manifest(file: Path, repo: str) -> dict[str, Any]:
    """A pulled manifest with what later commands read. Raises `UserError` when it is none."""
    try:
        manifest = json.loads(file.read_text("utf-8"))
        check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{repo}: run/manifest.json is not a manifest ({type(error).__name__}: {error})") from None
    return manifest


def localised(
    config: Config, manifest: Mapping[str, Any], folder: Path, target: Path, base: str | None, repo: str
) -> Config:
    """The recipe of a pulled run for this machine: its own folders for adapters, the dtype that it was trained in.

    "auto" would be another dtype on another kind of machine, and rewards against that reference are other numbers.
    Raises `UserError` for a base model that was only a folder's name, or an adapter that is not in the repository.
    """
    path = base or config.model.path
    if base is None and path not in BUILTIN and not looks_like_hub_id(path):
        raise UserError(f"{repo} was trained from a local folder called {path!r}; name that model with --base")
    homes: dict[str, str | None] = {START: None, REFERENCE: None}
    for name, wanted in ((START, config.model.adapter), (REFERENCE, config.reference.adapter)):
        complete = all((folder / name / file).exists() for file in (WEIGHTS, SETTINGS))
        if wanted is not None and (wanted != name or not complete):
            raise UserError(f"{repo}: its recipe begins from the adapter {wanted!r}, which run/{name} does not hold")
        homes[name] = str((target / name).absolute()) if wanted is not None else None
    model = config.model.model_copy(
        update={
            "path": path,
            "revision": None if base else config.model.revision,
            "adapter": homes[START],
            "dtype": manifest["model"]["dtype"],
            "trust_remote_code": False,  # whether to run code is for whoever sits here to say
        }
    )
    data = {"path": public_name(config.data.path), "eval": config.data.eval and public_name(config.data.eval)}
    if (folder / HELDOUT).exists():
        data["eval"] = str((target / HELDOUT).absolute())
    return config.model_copy(
        update={
            "model": model,
            "data": config.data.model_copy(update=data),
            "reference": config.reference.model_copy(update={"adapter": homes[REFERENCE]}),
            "collect": config.collect.model_copy(update={"judge": _no_program(config.collect.judge)}),
            "rounds": config.rounds.model_copy(update={"second": _no_program(config.rounds.second)}),
        }
    )


def _no_program(judge: str) -> str:
    """A judge that a pulled recipe names, but for a Python file: which of those is run is for whoever sits here to
    say."""
    return "" if judge.partition(":")[0].endswith(".py") else judge


def check_base(config: Config, manifest: Mapping[str, Any], repo: str) -> bool:
    """Whether the base model is on this machine, and then is the one of the manifest. Raises `UserError` otherwise."""
    here = base_here(config.model.path, config.model.revision)
    if here is None:
        return False
    if folder_digest(here) != manifest["model"]["digest"]:
        raise UserError(
            f"{repo} was trained on weights {manifest['model']['digest'][:12]}, {config.model.path} here has "
            f"{folder_digest(here)[:12]}; name the right model with --base"
        )
    return True


def base_here(path: str, revision: str | None) -> Path | None:
    """The folder of a model that needs no download, or None. Raises `UserError` for what is no model at all."""
    if path in BUILTIN or Path(path).is_dir() or not looks_like_hub_id(path):
        return find_model(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=DOWNLOAD, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError):
        return None
