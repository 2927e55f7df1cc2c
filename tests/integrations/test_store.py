"""The store of prefixes: a prefix fed once is loaded by any later process, and the folder stays within its limit."""

import json
import logging
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import BatchEncoding, LlamaForCausalLM

from unsloth_spectral import PrefixStore, SpectralCache, SpectralConfig
from unsloth_spectral.cache import snapshot
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.errors import InvalidArgumentError, LoadError, UnsupportedModelError
from unsloth_spectral.integrations.huggingface import cache as cache_module
from unsloth_spectral.integrations.huggingface import store as store_module
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.prefill import feed

CONFIG = SpectralConfig(block_size=128, residual_length=16, preset="small")


def token_ids(length: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    model = tiny_llama(initializer_range=0.1)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the store fed to the model, call by call."""
    counts: list[int] = []

    def counted(model: Any, input_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        counts.append(input_ids.shape[1])
        return feed(model, input_ids, cache)

    monkeypatch.setattr(store_module, "feed", counted)
    return counts


def stored(store: PrefixStore) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


def after(model: LlamaForCausalLM, cache: SpectralCache, ids: torch.Tensor) -> torch.Tensor:
    """Tokens that ``generate`` writes behind ``ids``."""
    return model.generate(ids, **cache_argument(cache), max_new_tokens=20, do_sample=False)[:, ids.shape[1] :]


def test_the_second_time_nothing_is_fed(model: LlamaForCausalLM, tmp_path: Path, fed: list[int]) -> None:
    ids = token_ids()
    cold = PrefixStore(tmp_path).prefill(model, ids, config=CONFIG)
    assert fed == [299]
    restored = PrefixStore(tmp_path).prefill(model, ids, config=CONFIG)
    assert fed == [299]
    assert cold.get_seq_length() == restored.get_seq_length() == 299
    written = after(model, cold, ids)
    assert cold.get_seq_length() == 319, "the prompt is not fed again"
    assert torch.equal(after(model, restored, ids), written)
    fresh = SpectralCache(model, config=CONFIG)
    feed(model, ids[:, :-1], fresh)
    assert torch.equal(after(model, fresh, ids), written)


def test_the_longest_beginning_is_taken(model: LlamaForCausalLM, tmp_path: Path, fed: list[int]) -> None:
    ids, store = token_ids(600), PrefixStore(tmp_path)
    for length in (200, 400):
        store.prefill(model, ids[:, :length], config=CONFIG)
    assert fed == [199, 200]
    assert store.num_stored(model, ids, config=CONFIG) == 399
    cache = store.prefill(model, ids, config=CONFIG)
    assert fed == [199, 200, 200]
    assert cache.get_seq_length() == 599
    assert len(stored(store)) == 3
    # Fewer than are stored: a cache is not cut, the next shorter one serves.
    assert store.num_stored(model, ids[:, :350], config=CONFIG) == 199
    # Another text.
    assert store.num_stored(model, token_ids(600, seed=1), config=CONFIG) == 0
    other = ids.clone()
    other[0, 250] = 1
    assert store.num_stored(model, other, config=CONFIG) == 199


def test_short_prompts(model: LlamaForCausalLM, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path)
    assert store.prefill(model, token_ids(1)).get_seq_length() == 0
    assert stored(store) == []
    ids = token_ids(2)
    for _ in range(2):
        assert after(model, store.prefill(model, ids), ids).shape == (1, 20)


def test_other_models_options_and_profiles_find_nothing(
    model: LlamaForCausalLM, tiny_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, store = token_ids(), PrefixStore(tmp_path)
    store.prefill(model, ids, config=CONFIG)
    assert store.num_stored(model, ids, config=CONFIG) == 299
    assert store.num_stored(model, ids, preset="small") == 0
    assert store.num_stored(tiny_llama(seed=1, initializer_range=0.1), ids, config=CONFIG) == 0
    assert store.num_stored(tiny_llama(initializer_range=0.1).bfloat16(), ids, config=CONFIG) == 0
    profile = ModelProfile((1.0, 1.0), ((1.0, 1.0),) * 2, ((1.0,) * 32,) * 2)
    monkeypatch.setattr(cache_module, "profile_of", lambda *_: profile)
    assert store.num_stored(model, ids, config=CONFIG) == 0


def test_the_least_recently_used_goes(model: LlamaForCausalLM, tmp_path: Path) -> None:
    texts = [token_ids(seed=seed) for seed in range(4)]
    PrefixStore(tmp_path / "one").prefill(model, texts[0], config=CONFIG)
    size = stored(PrefixStore(tmp_path / "one"))[0].stat().st_size
    store = PrefixStore(tmp_path / "three", max_bytes=int(3.5 * size))
    for ids in texts[:3]:
        store.prefill(model, ids, config=CONFIG)
        time.sleep(0.01)
    store.prefill(model, texts[0], config=CONFIG)  # used again, so the second is the oldest
    time.sleep(0.01)
    store.prefill(model, texts[3], config=CONFIG)
    counts = [store.num_stored(model, ids, config=CONFIG) for ids in texts]
    assert counts == [299, 0, 299, 299]
    assert sum(path.stat().st_size for path in stored(store)) <= store.max_bytes


def test_one_that_is_too_large_drives_no_other_out(
    model: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    PrefixStore(tmp_path).prefill(model, token_ids(), config=CONFIG)
    size = stored(PrefixStore(tmp_path))[0].stat().st_size
    store = PrefixStore(tmp_path, max_bytes=size + 1000)
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        cache = store.prefill(model, token_ids(3000, seed=1), config=CONFIG)
    assert "exceeds max_bytes and was not stored" in caplog.text
    assert cache.get_seq_length() == 2999
    assert store.num_stored(model, token_ids(), config=CONFIG) == 299
    assert len(stored(store)) == 1


def test_a_broken_snapshot_is_made_anew(
    model: LlamaForCausalLM, tmp_path: Path, fed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    ids, store = token_ids(), PrefixStore(tmp_path)
    store.prefill(model, ids[:, :200], config=CONFIG)
    store.prefill(model, ids, config=CONFIG)
    longest = next(path for path in stored(store) if "-299-" in path.name)
    data = bytearray(longest.read_bytes())
    data[-1] ^= 1
    longest.write_bytes(data)
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        cache = store.prefill(model, ids, config=CONFIG)
    assert "checksum" in caplog.text
    assert "it is deleted" in caplog.text
    assert fed == [199, 100, 100], "the shorter one served"
    assert cache.get_seq_length() == 299
    snapshot.read(longest)


def test_what_cannot_be_written_is_not_lost(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(snapshot, "save_file", full)
    store = PrefixStore(tmp_path)
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        cache = store.prefill(model, token_ids(), config=CONFIG)
    assert "was not stored" in caplog.text
    assert "no space left" in caplog.text
    assert cache.get_seq_length() == 299
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("obstacle", ["gone", "unreadable", "read-only", "without locks"])
def test_a_folder_that_does_not_serve_costs_no_run(
    model: LlamaForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    obstacle: str,
) -> None:
    store = PrefixStore(tmp_path / "store")
    error = NotImplementedError("no locks") if obstacle == "without locks" else PermissionError(13, "Permission denied")

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    if obstacle == "gone":
        store.folder.rmdir()
    elif obstacle == "unreadable":  # not by chmod, which stops no root
        monkeypatch.setattr(Path, "iterdir", refuse)
    elif obstacle == "read-only":
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        monkeypatch.setattr(FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        assert store.prefill(model, token_ids(), config=CONFIG).get_seq_length() == 299
    assert str(store.folder) in caplog.text


def test_a_broken_snapshot_that_cannot_be_deleted_costs_no_run(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = PrefixStore(tmp_path)
    store.prefill(model, token_ids(), config=CONFIG)
    stored(store)[0].write_bytes(b"broken")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        assert store.prefill(model, token_ids(), config=CONFIG).get_seq_length() == 299
    assert "it cannot be deleted: [Errno 13] Permission denied" in caplog.text


def test_whoever_holds_the_lock_for_too_long_stops_no_one(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "_LOCK_SECONDS", 0.1)
    store = PrefixStore(tmp_path)
    with caplog.at_level(logging.WARNING, "unsloth_spectral"), FileLock(tmp_path / ".lock"):
        cache = store.prefill(model, token_ids(), config=CONFIG)
    assert "was not stored" in caplog.text
    assert cache.get_seq_length() == 299


def test_what_a_killed_process_left_goes_with_the_next_one_stored(model: LlamaForCausalLM, tmp_path: Path) -> None:
    left, other = tmp_path / ".prefix-0123-xyz.safetensors", tmp_path / "notes.txt"
    left.write_bytes(b"half")
    other.write_text("mine")
    PrefixStore(tmp_path, max_bytes=1).prefill(model, token_ids(), config=CONFIG)
    assert not left.exists()
    assert other.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_the_folder_is_the_users_own(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path / "deep" / "folder")
    assert store.folder.stat().st_mode & 0o077 == 0


def test_mistakes(model: LlamaForCausalLM, tmp_path: Path) -> None:
    for wrong in (0, -1, True, 2.5):
        with pytest.raises(InvalidArgumentError, match="max_bytes must be a positive number"):
            PrefixStore(tmp_path, max_bytes=wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match=r"cannot make the folder.*give one that can be written to"):
        PrefixStore(tmp_path / "file")
    with pytest.raises(InvalidArgumentError, match="there is no home folder for '~nobody-here/x'"):
        PrefixStore("~nobody-here/x")
    store = PrefixStore(tmp_path)
    for ids in (token_ids()[0], token_ids().repeat(2, 1), token_ids()[:, :0]):
        with pytest.raises(InvalidArgumentError, match="input_ids must be one sequence"):
            store.prefill(model, ids)
    with pytest.raises(InvalidArgumentError, match="give one of them"):
        store.prefill(model, token_ids(), preset="small", config=CONFIG)


TEXT = 'give tokenizer(text, return_tensors="pt").input_ids'
NO_TOKENS = [
    ("a text", f"got a str: {TEXT}"),
    (["a text"], f"got a list: {TEXT}"),
    (None, f"got a NoneType: {TEXT}"),
    ([], f"got a list: {TEXT}"),
    ([5, 6, 7], "got a list: give torch.as_tensor(input_ids)[None]"),
    ([[5, 6, 7]], "got a list: give torch.as_tensor(input_ids)"),
    (np.array([5, 6]), "got a ndarray: give torch.as_tensor(input_ids)[None]"),
    (np.array([[5, 6]]), "got a ndarray: give torch.as_tensor(input_ids)"),
    (BatchEncoding({"input_ids": [[5]]}), 'got a BatchEncoding: give its "input_ids", made with return_tensors="pt"'),
    (torch.ones(1, 5), "of int64 or int32, got torch.float32: convert it"),
    (torch.ones(1, 5, dtype=torch.bool), "of int64 or int32, got torch.bool: convert it"),
]


@pytest.mark.parametrize(("wrong", "message"), NO_TOKENS)
def test_what_is_no_tensor_of_tokens(wrong: Any, message: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    cache, store, path = SpectralCache(model, config=CONFIG), PrefixStore(tmp_path), tmp_path / "a.safetensors"
    feed(model, token_ids(), cache)
    cache.save(path, token_ids())
    calls: list[Callable[[], Any]] = [lambda: store.prefill(model, wrong), lambda: store.num_stored(model, wrong)]
    if wrong is not None:  # these need none
        calls += [lambda: SpectralCache.load(path, model, wrong), lambda: cache.save(path, wrong)]
    for call in calls:
        with pytest.raises(InvalidArgumentError) as caught:
            call()
        assert str(caught.value).startswith("input_ids must be a tensor of token ids, [sequences, tokens], ")
        assert str(caught.value).endswith(message)


@pytest.mark.parametrize("wrong", [128, -1])
def test_tokens_of_another_vocabulary(wrong: int, model: LlamaForCausalLM, tmp_path: Path) -> None:
    ids = token_ids()
    ids[0, 7] = wrong
    with pytest.raises(InvalidArgumentError, match=rf"from 0 to 127, got {wrong}: use this model's tokenizer"):
        PrefixStore(tmp_path).prefill(model, ids)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers PreTrainedModel"):
        PrefixStore(tmp_path).prefill(torch.nn.Linear(1, 1), token_ids())


def test_pefts_wrapper_is_looked_through(model: LlamaForCausalLM, tmp_path: Path, fed: list[int]) -> None:
    class Wrapper(torch.nn.Module):
        peft_config: dict[str, Any] = {}  # noqa: RUF012

        def get_base_model(self) -> LlamaForCausalLM:
            return model

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

    for wrapper in (Wrapper(), Wrapper(), model):
        assert PrefixStore(tmp_path).prefill(wrapper, token_ids(), config=CONFIG).get_seq_length() == 299
    assert fed == [299]
    path = tmp_path / "a.safetensors"
    PrefixStore(tmp_path).prefill(model, token_ids(), config=CONFIG).save(path)
    assert SpectralCache.load(path, Wrapper()).get_seq_length() == 299


# Several processes at once

TEXTS = 6


def write_and_read(folder: Path, seed: int, model: LlamaForCausalLM, max_bytes: int, expected: Path) -> None:
    """Prefill texts in random order: whatever others write and delete meanwhile, each goes on as it should."""
    torch.set_num_threads(1)
    logging.getLogger("unsloth_spectral").addHandler(logging.StreamHandler())
    wanted = json.loads(expected.read_text())
    draw, store, restored = random.Random(seed), PrefixStore(folder, max_bytes), 0
    for _ in range(7):
        text = draw.randrange(TEXTS)
        ids = token_ids(seed=text)
        restored += bool(store.num_stored(model, ids, config=CONFIG))
        actual = after(model, store.prefill(model, ids, config=CONFIG), ids)
        assert actual.tolist() == wanted[text], f"text {text}"
    (folder / f"restored-{seed}").write_text(str(restored))


def read(folder: Path, stop: Any) -> None:
    """Open whatever is there, again and again: it is whole, or gone."""
    torch.set_num_threads(1)
    opened = 0
    while not stop.is_set():
        for path in folder.glob("prefix-*.safetensors"):
            try:
                snapshot.read(path)
                opened += 1
            except LoadError as error:
                if "no snapshot at" not in str(error):  # deleted meanwhile
                    raise
        time.sleep(0.01)
    assert opened


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_four_writers_and_four_readers(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder, expected = tmp_path / "store", tmp_path / "expected.json"
    texts = [token_ids(seed=seed) for seed in range(TEXTS)]
    PrefixStore(tmp_path / "one").prefill(model, texts[0], config=CONFIG)
    max_bytes = 4 * stored(PrefixStore(tmp_path / "one"))[0].stat().st_size
    written = []
    for ids in texts:
        cache = SpectralCache(model, config=CONFIG)
        feed(model, ids[:, :-1], cache)
        written.append(after(model, cache, ids).tolist())
    expected.write_text(json.dumps(written))
    store, context = PrefixStore(folder, max_bytes), multiprocessing.get_context("fork")
    stop = context.Event()
    readers = [context.Process(target=read, args=(folder, stop)) for _ in range(4)]
    writers = [
        context.Process(target=write_and_read, args=(folder, seed, model, max_bytes, expected)) for seed in range(4)
    ]
    for process in [*writers, *readers]:
        process.start()
    for process in writers:
        process.join(600)
    stop.set()
    for process in readers:
        process.join(600)
    assert [process.exitcode for process in [*writers, *readers]] == [0] * 8
    assert sum(path.stat().st_size for path in stored(store)) <= max_bytes
    assert sum(int(path.read_text()) for path in folder.glob("restored-*")) > 5, "nothing was shared"
    assert not list(folder.glob(".prefix-*"))
    assert os.listdir(folder)
    for path in stored(store):
        snapshot.read(path)
