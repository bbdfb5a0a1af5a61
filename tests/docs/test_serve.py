"""docs/scripts/serve.py: Hugging Face's own server answers with a model that has memories as the model itself does."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from pkmem.training.saved import load_saved

pytest.importorskip("fastapi")
pytest_plugins = "tiny"
SCRIPT = Path(__file__).parents[2] / "docs" / "scripts" / "serve.py"


def post(port: int, path: str, **question: object) -> bytes:
    data = json.dumps(question).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"http://localhost:{port}{path}", data, headers)) as answer:
        read: bytes = answer.read()
    return read


@pytest.mark.linux
@pytest.mark.case(
    "Hugging Face protocol", "`transformers serve`, by three lines of Python", "works: docs/scripts/serve.py", ""
)
def test_the_server_writes_what_the_model_writes(run: Path, tmp_path: Path) -> None:
    folder = str(run / "model")
    model, tokenizer = load_saved(run)
    prompt = tokenizer("the cat", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, SCRIPT, folder, "--port", str(port)], stdout=log, stderr=log)
    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health").close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        question = {"model": folder, "prompt": "the cat", "max_tokens": 6, "temperature": 0}
        whole = json.loads(post(port, "/v1/completions", **question))
        assert whole["choices"][0]["text"] == expected
        events = post(port, "/v1/completions", **question, stream=True).decode().split("data: ")[1:]
        pieces = [json.loads(event)["choices"][0]["text"] for event in events if event.startswith("{")]
        assert "".join(pieces) == expected
        assert len(pieces) > 2
    finally:
        server.terminate()
        server.wait()
