"""A compact model on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .card import card_of
from .saving import save_compact


def push_compact(
    model: PreTrainedModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    private: bool | None = None,
    api: HfApi | None = None,
) -> CommitInfo:
    """Upload a compact model in one commit, with a card that says how it is loaded; ``model.push_to_hub`` has none.

    Args:
        model: compact.
        repo_id: "user/name"; created if it does not exist.
        private: whether a repository that is created is.
        api: with another token or endpoint than the one that is logged in.
    """
    api = api or HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "compact"
        save_compact(model, folder, tokenizer)
        (folder / "README.md").write_text(card_of(model, folder, repo_id), encoding="utf-8")
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a compact model")
