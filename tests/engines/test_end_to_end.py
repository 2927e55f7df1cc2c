"""vLLM, LMCache's connector, ``lmcache server``, the spectral serde, disk, and all the way back in other processes."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

pytest.importorskip("vllm")
pytest.importorskip("lmcache")

from unsloth_spectral.codec.chunk.codec import ChunkCodec
from unsloth_spectral.codec.chunk.layout import Heads
from unsloth_spectral.eval.documents import default_document, tokens_of
from unsloth_spectral.integrations.embedded import embedded_folder

pytestmark = pytest.mark.slow

CHUNK, NUM_CHUNKS, NUM_PROMPTS = 256, 4, 3
NUM_NEW, NUM_PLACES = 32, 32
LAYERS, HEADS, HEAD_DIM = 30, 3, 64
PATIENCE = 1800  # seconds: the machine may be busy with something else
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "LMCACHE_TRACK_USAGE": "false"}
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three texts of four whole chunks and a bit to go on with, then one token at each of the places that follow."""
    length = CHUNK * NUM_CHUNKS + 40
    ids = tokens_of(default_document(), AutoTokenizer.from_pretrained(embedded_folder()), 60_000 + length + NUM_PLACES)
    texts = [ids[0, start : start + length + NUM_PLACES].tolist() for start in (20_000, 40_000, 60_000)]
    requests = [(text[:length], NUM_NEW) for text in texts]
    requests += [(text[: length + place], 1) for text in texts for place in range(NUM_PLACES)]
    path = tmp_path_factory.mktemp("engines") / "prompts.json"
    path.write_text(json.dumps(requests))
    return path


def test_a_second_engine_reuses_what_the_first_stored(tmp_path: Path, prompts: Path, results: dict[str, Any]) -> None:
    rows = []
    for bits in (8.0, 2.5):
        folder = tmp_path / f"{bits}"
        with server(folder, bits) as (port, http_port):
            dense = ask(port, prompts)
            files = wait_for_files(folder, NUM_PROMPTS * NUM_CHUNKS)
            stats = stats_of(http_port)
        assert stats["chunks"] >= NUM_PROMPTS * NUM_CHUNKS
        assert stats["raw"] == 0
        assert [answer["cached"] for answer in dense[:NUM_PROMPTS]] == [0] * NUM_PROMPTS
        size = ChunkCodec(bits, Heads(HEAD_DIM), 1e5).nbytes((LAYERS, CHUNK, HEADS * 2 * HEAD_DIM))
        assert [path.stat().st_size for path in files] == [size] * NUM_PROMPTS * NUM_CHUNKS
        # Another server, so that nothing is left but what is on disk; another engine, so that nothing is in its cache.
        with server(folder, bits) as (port, _):
            reused = ask(port, prompts)
        assert [answer["cached"] for answer in reused[:NUM_PROMPTS]] == [CHUNK * NUM_CHUNKS] * NUM_PROMPTS
        rows.append({"bits_per_element": bits, "record_bytes": size, **agreement(dense, reused)})
    # Eight bits change no token. With fewer bits texts differ at some point, but each next token is mostly the same.
    assert rows[0]["same_tokens"] == rows[0]["tokens"]
    assert rows[0]["same_next"] >= 0.95 * rows[0]["places"]
    assert rows[1]["same_next"] >= 0.8 * rows[1]["places"]
    results["end_to_end"] = {
        "chunk_tokens": CHUNK,
        "prompts": NUM_PROMPTS,
        "reused_tokens": CHUNK * NUM_CHUNKS * NUM_PROMPTS,
        "fp16_chunk_bytes": 2 * LAYERS * CHUNK * HEADS * 2 * HEAD_DIM,
        "rows": rows,
    }


@contextmanager
def server(folder: Path, bits: float) -> Iterator[tuple[int, int]]:
    """``lmcache server`` that keeps everything in ``folder``; its port, and the one of its status."""
    folder.mkdir(exist_ok=True)
    port, http_port, metrics_port = free_port(), free_port(), free_port()
    adapter = {
        "type": "plugin",
        "module_path": "unsloth_spectral.integrations.lmcache",
        "class_name": "SpectralL2Adapter",
        "adapter_params": {"type": "fs", "base_path": str(folder)},
        "serde": {
            "type": "spectral",
            "bits_per_element": bits,
            "layout": "blocks",
            "head_dim": HEAD_DIM,
            "rope_theta": 100000,
            "block_tokens": 128,
        },
    }
    command = [str(Path(sys.executable).parent / "lmcache"), "server", "--port", str(port), "--l1-size-gb", "1"]
    command += ["--http-port", str(http_port), "--prometheus-port", str(metrics_port), "--chunk-size", str(CHUNK)]
    command += ["--supported-transfer-mode", "engine_driven", "--l2-store-policy", "skip_l1"]
    command += ["--eviction-policy", "LRU", "--l2-adapter", json.dumps(adapter)]
    log = folder.with_suffix(".log")
    with (
        log.open("a") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | QUIET) as process,
    ):
        try:
            wait_for_server(process, http_port, log)
            yield port, http_port
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def stats_of(http_port: int) -> dict[str, Any]:
    """The serde's report on the chunks it stored."""
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/status", timeout=60) as answer:
        ((stats,),) = [adapter["spectral"] for adapter in json.load(answer)["storage_manager"]["l2_adapters"]]
    return dict(stats)


def ask(port: int, prompts: Path) -> list[dict[str, Any]]:
    """Answers of a fresh engine."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("engine.py")),
        str(embedded_folder()),
        str(port),
        str(prompts),
    ]
    environment = os.environ | QUIET | SMALL
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("[{"))
    answers: list[dict[str, Any]] = json.loads(line)
    return answers


def agreement(dense: list[dict[str, Any]], reused: list[dict[str, Any]]) -> dict[str, int]:
    """How many tokens are the same: of texts until they first differ, and of single tokens after the same text."""
    same = 0
    for expected, actual in zip(dense[:NUM_PROMPTS], reused[:NUM_PROMPTS], strict=True):
        pairs = list(zip(expected["tokens"], actual["tokens"], strict=True))
        same += next((place for place, (first, second) in enumerate(pairs) if first != second), len(pairs))
    places = list(zip(dense[NUM_PROMPTS:], reused[NUM_PROMPTS:], strict=True))
    same_next = sum(expected["tokens"] == actual["tokens"] for expected, actual in places)
    return {"tokens": NUM_PROMPTS * NUM_NEW, "same_tokens": same, "places": len(places), "same_next": same_next}


def wait_for_server(process: subprocess.Popen[Any], http_port: int, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{http_port}/", timeout=10)
            return
        except urllib.error.HTTPError:
            return  # it answers, if only that there is no such page
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start: {log.read_text()[-4000:]}")


def wait_for_files(folder: Path, count: int) -> list[Path]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        files = sorted(folder.glob("*.data"))
        if len(files) >= count:
            return files
        time.sleep(0.5)
    raise AssertionError(f"{len(list(folder.glob('*.data')))} of {count} chunks were stored")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
