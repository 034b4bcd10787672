"""What a user may call a model: a folder, a hub id, and names that are neither. No network is used."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from sparseling.checkpoint.hub import resolve
from sparseling.config import PRESETS
from sparseling.errors import UserError


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches the hub unasked fails."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("tried to download"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def downloads(monkeypatch: pytest.MonkeyPatch, outcome: Path | Exception) -> list[dict[str, object]]:
    """Replace the download by `outcome`; the list fills with what it was asked."""
    asked: list[dict[str, object]] = []

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.append({"repo_id": repo_id} | options)
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_local_folder_wins_even_when_it_looks_like_a_hub_id_or_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "ling-mini-2.0", "plain"):
        (tmp_path / name).mkdir(parents=True)
        assert resolve(name).samefile(tmp_path / name)
    assert resolve(tmp_path / "plain") == tmp_path / "plain"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_shape_not_weights(name: str) -> None:
    with pytest.raises(UserError, match="is a preset, a shape without weights"):
        resolve(name)


MISTYPED = ["runs/laptop/sft/model", "../org/name", "./model", "model", "", "a//b", "/no/such/folder", "org/name/file", "~/x"]


@pytest.mark.parametrize("name", MISTYPED)
def test_a_mistyped_path_is_never_looked_up_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        resolve(name)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file; give the folder"):
        resolve(tmp_path / "model.safetensors")


def test_a_hub_id_is_downloaded_without_pickles_or_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = downloads(monkeypatch, tmp_path)
    assert resolve("inclusionAI/Ling-mini-2.0") == tmp_path
    assert asked[0]["repo_id"] == "inclusionAI/Ling-mini-2.0" and asked[0]["local_files_only"] is False
    patterns = asked[0]["allow_patterns"]
    assert isinstance(patterns, list) and "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) and pattern != "LICENSE*" for pattern in patterns)


def test_config_alone_is_a_small_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = downloads(monkeypatch, tmp_path)
    assert resolve("org/name", weights=False) == tmp_path
    assert "*.json" in asked[0]["allow_patterns"] and "*.safetensors" not in asked[0]["allow_patterns"]  # type: ignore[operator]


def test_offline_uses_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = downloads(monkeypatch, tmp_path)
    assert resolve("org/name") == tmp_path
    assert asked[0]["local_files_only"] is True


def test_offline_and_not_cached_with_the_real_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set and it is not in the cache; download it elsewhere and give the folder"):
        resolve("no-such-org-for-tests/no-such-model")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError("no"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("no"), "cannot be reached"),
        (ConnectionError("refused\nby peer"), r"the download failed \(refused\)"),
        (TimeoutError(), r"the download failed \(TimeoutError\)"),
        (OSError(28, "No space left on device"), "the disk is full"),
    ],
)
def test_every_failure_ends_in_one_sentence_with_the_mend(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, error)
    with pytest.raises(UserError, match=words) as caught:
        resolve("org/name")
    assert "org/name" in str(caught.value) and "\n" not in str(caught.value)
    assert "give the folder" in str(caught.value) or "free some space" in str(caught.value)
