"""Back from the Hub: a repository becomes a run directory on which `generate`, `eval` and the app work.

A repository that `mlxdpo export --push` wrote holds run/: recipe, manifest and adapter. Any other one with an mlx-lm
adapter or a PEFT adapter is pulled as an adapter: its manifest is made here, from the base model that it names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxdpo.config import Config, dump_config, load_config
from mlxdpo.exporters.bare_adapter import describe_adapter, find_adapter
from mlxdpo.exporters.client import Say, check_repo_id, connect
from mlxdpo.exporters.download import Listing, download, list_repository
from mlxdpo.exporters.redact import REFERENCE, START, public_name
from mlxdpo.exporters.upload_rules import OF_THE_RUN, RUN
from mlxdpo.io.atomic import write_json, write_text
from mlxdpo.io.checksum import PICKLES
from mlxdpo.io.digest import folder_digest
from mlxdpo.io.names import looks_like_hub_id
from mlxdpo.io.staging import publish_folder, staging_folder
from mlxdpo.model.adapters import SETTINGS, WEIGHTS
from mlxdpo.model.policy import BUILTIN, DOWNLOAD, find_model
from mlxdpo.runs import check_manifest
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

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
        raise UserError(f"{target} exists; give another --out")
    api = connect()
    listing = list_repository(api, repo_id, revision, say)
    _make_parent(target)
    with staging_folder(target.parent, f".{target.name}-draft-") as folder:
        found = _fill_run(api, listing, folder, target, base, say)
        publish_folder(folder, target)
    return found


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror}); give another --out") from None


def _fill_run(api: HfApi, listing: Listing, folder: Path, target: Path, base: str | None, say: Say) -> Pulled:
    """Write the run into `folder`, which becomes `target`."""
    if set(ESSENTIAL) <= listing.entries.keys():
        return _fill_from_run(api, listing, folder, target, base, say)
    if any(name.startswith(f"{RUN}/") for name in listing.entries):
        missing = next(name for name in ESSENTIAL if name not in listing.entries)
        raise UserError(f"{listing.repo} holds a run without {missing}; its upload was cut, push it again")
    adapter = find_adapter(listing.entries)
    if adapter is None:
        pickled = next((name for name in sorted(listing.entries) if PICKLES.fullmatch(name)), None)
        also = f" ({pickled} is a pickle, which mlxdpo does not read)" if pickled else ""
        raise UserError(f"{listing.repo} holds neither a run of mlxdpo's nor an adapter in safetensors{also}")
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
    return config.model_copy(
        update={
            "model": model,
            "data": config.data.model_copy(update=data),
            "reference": config.reference.model_copy(update={"adapter": homes[REFERENCE]}),
        }
    )


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
