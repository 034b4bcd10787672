"""From what a user calls a model to a folder on this machine: a folder, or a hub id `org/name` that is downloaded once."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..config import PRESETS
from ..errors import UserError
from ..files import disk_full
from ..progress import say

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# No pickles (`*.bin`, `*.pt`) and no code: neither is needed, both could run.
WEIGHTS = ["*.safetensors"]
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]


def resolve(model: str | Path, weights: bool = True) -> Path:
    """The local folder of `model`: itself when it is one, else the hub's snapshot, downloaded (resumable, cached) if there is a network.

    `weights=False` downloads only the small files (config, tokenizer): enough for `ModelConfig.from_folder`.
    `HF_HUB_OFFLINE=1` uses the cache alone; `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` work as everywhere. Raises `UserError` with the mend.
    """
    name, folder = str(model), Path(model).expanduser()
    if name and folder.is_dir():
        return folder
    if name and folder.exists():
        raise UserError(f"{name}: is a file; give the folder with config.json and the safetensors files")
    if name in PRESETS:
        raise UserError(f"{name}: is a preset, a shape without weights; give a folder, or a hub id such as inclusionAI/Ling-mini-2.0")
    if folder.parent.is_dir() and str(folder.parent) != ".":
        raise UserError(f"{name}: no such folder; check the path")
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such folder, and not a hub id such as inclusionAI/Ling-mini-2.0; check the path")
    return download(name, weights)


def download(hub_id: str, weights: bool) -> Path:
    """The snapshot of `org/name` in the Hugging Face cache."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
    except ImportError:
        raise UserError(f"{hub_id}: a download needs huggingface_hub; pip install huggingface_hub, or give a local folder") from None
    mend = "download it elsewhere and give the folder"
    try:
        if not offline():
            say(f"{hub_id}: looking on the hub (kept in the Hugging Face cache)")
        return Path(snapshot_download(hub_id, allow_patterns=SMALL_FILES + WEIGHTS * weights, local_files_only=offline()))
    except GatedRepoError:
        raise UserError(f"{hub_id}: the hub wants you to accept its terms first; do so on its page and log in, or {mend}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{hub_id}: the hub has no such model, or it is private; check the spelling, or {mend}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline() else "the hub cannot be reached and it is not in the cache"
        raise UserError(f"{hub_id}: {why}; {mend}") from None
    except Exception as error:  # the client's own network errors differ between its versions
        if full := disk_full(error, Path(hub_id)):
            raise full from None
        raise UserError(f"{hub_id}: the download failed ({first_line(error)}); run again to go on where it stopped, or {mend}") from None


def offline() -> bool:
    """Whether the user forbade network use."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
