"""From what a user calls a model, a folder or an id on the Hugging Face Hub, to a local folder with its files."""

import os
import re
from pathlib import Path

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.families.registry import read_config
from vlcache_jax.models.io.files import CheckpointFolder, checkpoint_folder
from vlcache_jax.models.io.unsupported import no_weights

# Nothing else is downloaded: no pickled weights, no code, no other formats of the same weights.
_SMALL = ["*.json", "*.txt", "*.jinja", "*.model"]
_WEIGHTS = ["model.safetensors", "model-*.safetensors"]
_NEVER = ["*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]  # folders within hold other models or formats
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_YES = {"1", "ON", "YES", "TRUE"}


def find_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    allow_links: bool = False,
    weights: bool = True,
) -> CheckpointFolder:
    """The folder of a checkpoint, downloaded from the Hugging Face Hub if need be.

    A folder that exists is taken as it is. What does not exist but is a str of the form "owner/name" is an id on the
    Hub: the missing files are downloaded into the Hub's cache, the configuration first, so that a model that is not
    supported costs no download of its weights. Whatever else, such as "./name", "/name", and every `pathlib.Path`, is
    a path only.

    The environment is that of `huggingface_hub`: HF_TOKEN (or a login) for private and gated models, HF_HUB_OFFLINE=1
    to use the cache alone, HF_HOME or HF_HUB_CACHE for its place, HF_ENDPOINT for a mirror,
    HF_HUB_DISABLE_PROGRESS_BARS.

    Args:
      source: a folder or an id.
      revision: a branch, a tag or a commit on the Hub; "main" by default.
      allow_links: follow links out of a local folder.
      weights: whether weights are needed, or the small files will do.

    Raises:
      CheckpointError: there is no such folder or model, no access to it, no network, or the model is not supported.
    """
    if isinstance(source, CheckpointFolder):
        return source
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(f"{source!r} is no path and no id of a model: give a str or a pathlib.Path")
    text = str(source)
    if revision is not None and not isinstance(revision, str):
        raise CheckpointError(f"revision={revision!r} is no text: give the name of a branch or tag, or a commit")
    if not isinstance(source, str) or os.path.lexists(text) or not _ID.fullmatch(text):
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} is one of the Hugging Face Hub, but {text!r} is a local path: leave it out"
            )
        return checkpoint_folder(text, allow_links)
    folder = _download(text, revision, _SMALL)
    if not weights:
        return folder
    if folder.has("config.json"):
        read_config(folder)
    folder = _download(text, revision, _SMALL + _WEIGHTS)
    if not any(folder.path.glob("model*.safetensors")):
        raise no_weights(folder, _remote_names(text, folder.path.name))
    return folder


def _download(model: str, revision: str | None, patterns: list[str]) -> CheckpointFolder:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{model!r} is no local folder, and to download a model takes `pip install huggingface_hub`"
        ) from error
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=_NEVER,
            local_files_only=_offline(),
            cache_dir=_cache(),
            endpoint=_endpoint(),
            library_name="vlcache_jax",
        )
    except Exception as error:  # many kinds: of huggingface_hub, of its HTTP library, of the system
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise CheckpointError(f"{_why(error, model, revision)} ({type(error).__name__}: {first[:200]})") from error
    return CheckpointFolder(Path(folder))


def _why(error: Exception, model: str, revision: str | None) -> str:
    """What went wrong with a download, and what to do."""
    from huggingface_hub import errors

    where = f"{model!r}" if revision is None else f"the revision {revision!r} of {model!r}"
    typo = f"if a local folder is meant: there is no {str(Path(model).absolute())!r}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"the owners of {where} ask for their terms to be accepted: accept them on the model's page with your "
            "account, then set HF_TOKEN to a token of it (or run `hf auth login`)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the Hugging Face Hub has no model {model!r}, or it is private: check the name, and for a private model "
            f"set HF_TOKEN to a token that may read it (or run `hf auth login`); {typo}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model!r} has no revision {revision!r}: give one of its branches, tags or commits, or leave it out"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if _offline():
            return (
                f"{where} is not, or not completely, in the cache, and HF_HUB_OFFLINE is set: unset it, or download "
                f"the model first (`hf download {model}`); {typo}"
            )
        return (
            f"{where} is not, or not completely, in the cache, and the Hugging Face Hub cannot be reached: check the "
            f"connection, or copy the model here and give its folder; {typo}"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{model!r} is no local folder and no id of a model on the Hugging Face Hub"
    return f"{where} cannot be downloaded: try again, or give a local folder"


def _remote_names(model: str, commit: str) -> list[str] | None:
    """Names of all files of a model on the Hub; None if it cannot be asked."""
    if _offline():
        return None
    try:
        from huggingface_hub import HfApi

        return sorted(HfApi(endpoint=_endpoint()).list_repo_files(model, revision=commit))
    except Exception:  # it only makes a message better
        return None


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _offline() -> bool:
    return any(os.environ.get(name, "").upper() in _YES for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _cache() -> str | None:
    # huggingface_hub reads these when it is imported; here they count when a model is loaded.
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return os.path.expandvars(os.environ[name])
    home = os.environ.get("HF_HOME")
    return os.path.join(os.path.expandvars(home), "hub") if home else None
