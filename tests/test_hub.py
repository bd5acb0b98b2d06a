"""Uploading to the Hub, against a server of our own that keeps what it is sent."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from models import logits, trained
from tiny_lm import save_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_svd.compact import parameter_report, push_compact


class Hub(BaseHTTPRequestHandler):
    """The five requests of an upload without large files."""

    commits: dict[str, dict[str, bytes]]
    created: list[dict[str, Any]]

    def do_POST(self) -> None:
        sent = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self._chunks()
        )
        url = f"http://{self.headers['Host']}/user/small"
        if self.path == "/api/repos/create":
            self.created.append(json.loads(sent))
            answer: dict[str, Any] = {"url": url, "id": "user/small"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif self.path == "/api/models/user/small/preupload/main":
            paths = [file["path"] for file in json.loads(sent)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif self.path == "/api/models/user/small/commit/main":
            header, *lines = map(json.loads, sent.splitlines())
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines}
            self.commits[header["value"]["summary"]] = files
            answer = {"commitUrl": f"{url}/commit/1", "commitOid": "1" * 40}
        else:
            self.send_error(404, self.path)
            return
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def _chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    Hub.commits, Hub.created = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_of_nobody")
        server.shutdown()


def test_upload_with_card(hub: HfApi, tmp_path: Path) -> None:
    compact = trained(tmp_path / "run").merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_lm(tmp_path / "dense"))
    info = push_compact(compact, "user/small", tokenizer, private=True, api=hub)
    assert info.commit_url == f"{hub.endpoint}/user/small/commit/1"
    assert [(repo["name"], repo["visibility"]) for repo in Hub.created] == [("small", "private")]
    ((message, files),) = Hub.commits.items()
    assert message == "Upload a compact model"
    assert files.keys() >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert "lora-svd" in card.data.tags
    assert "import lora_svd  # before from_pretrained\n" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("user/small")' in card.text
    assert f"{parameter_report(compact).param_ratio:.4f}" in card.text
    (tmp_path / "downloaded").mkdir()
    for name, content in files.items():
        (tmp_path / "downloaded" / name).write_bytes(content)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "downloaded")), logits(compact))
