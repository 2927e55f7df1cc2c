"""Tiny models of other architectures, trained offline on a CPU in some minutes, as ordinary Hugging Face folders.

They are for measuring caches, not for their prose. They are trained on the sources and docstrings of Python's standard
library, without ``pydoc_data``, which the evaluation uses. So short a training does not teach the copying of random
tokens: with repeated random spans as half of the sequences, copying stayed at chance and half of the text was lost.
"""

import argparse
import ast
import math
import random
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from platformdirs import user_cache_path
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

DEFAULT_FOLDER = user_cache_path("unsloth-spectral") / "models"
VOCABULARY, POSITIONS, SEED = 4096, 8192, 0
END = "<|endoftext|>"
EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}

# Steps, sequence length, batch. Short sequences come first, as they are cheap; the last phase teaches positions beyond
# 1,024, so that the evaluation's 4,352 lie in the trained range.
PHASES = ((250, 256, 8), (60, 1024, 2), (6, 4608, 1))
RATE, WARMUP, FINAL_RATE = 3e-3, 20, 0.05
REPORTED = 20


def qwen2(sizes: dict[str, Any]) -> Qwen2ForCausalLM:
    """Biases on keys, queries and values; four query heads share two of the cache's heads."""
    config = Qwen2Config(intermediate_size=768, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    return Qwen2ForCausalLM(config)


def neox(sizes: dict[str, Any]) -> GPTNeoXForCausalLM:
    """A quarter of each head rotates, every head has its own keys, attention and MLP run side by side."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
    config = GPTNeoXConfig(intermediate_size=1024, rope_parameters=rope, tie_word_embeddings=True, **sizes)
    return GPTNeoXForCausalLM(config)


ARCHITECTURES: dict[str, Callable[[dict[str, Any]], Any]] = {"tiny-qwen2": qwen2, "tiny-neox": neox}


def maker(name: str) -> Callable[[Path], object]:
    """A function that trains the architecture ``name`` and writes it into a folder."""
    return partial(make, name)


def texts() -> list[str]:
    """The sources of the standard library, each followed by its docstrings as one text; the same order every time."""
    documents = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if EXCLUDED.isdisjoint(path.relative_to(root).parts):
            source = path.read_text(encoding="utf-8", errors="replace")
            documents += [source, docstrings(source)]
    return [text for text in documents if len(text) > 200]


def docstrings(source: str) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in third-party sources
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:
            return ""
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))))


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=POSITIONS)


class Corpus:
    """Token streams to train on and to hold out, and random sequences of either kind."""

    def __init__(self, documents: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
        # Documents are shuffled so that the held-out part has the same mixture.
        random.Random(SEED).shuffle(documents)
        end = tokenizer.convert_tokens_to_ids(END)
        encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        stream = torch.tensor([token for ids in encoded for token in [end, *ids]])
        split = len(stream) * 19 // 20
        self.train, self.held_out = stream[:split], stream[split:]
        self._random = torch.Generator().manual_seed(SEED)

    def pick(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self._random))

    def text(self, stream: Tensor, length: int) -> Tensor:
        start = self.pick(0, len(stream) - length)
        return stream[start : start + length]

    def noise(self, length: int) -> Tensor:
        return torch.randint(1, VOCABULARY, (length,), generator=self._random)

    def batch(self, length: int, size: int) -> Tensor:
        """Text to train on, ``[size, length]``."""
        return torch.stack([self.text(self.train, length) for _ in range(size)])


def losses(model: Any, tokens: Tensor) -> Tensor:
    """Cross entropy of each token given those before it, ``[B, n - 1]``."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def schedule() -> Iterator[tuple[int, int, float]]:
    """Sequence length, batch and learning rate of each step."""
    total, step = sum(steps for steps, _, _ in PHASES), 0
    for steps, length, size in PHASES:
        for _ in range(steps):
            decay = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * step / total))
            yield length, size, RATE * min(1.0, (step + 1) / WARMUP) * decay
            step += 1


def optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim > 1 and "embed" not in name else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: Any, corpus: Corpus) -> None:
    """Go through all phases; prints the loss as it goes."""
    both = optimizers(model)
    started = time.perf_counter()
    recent: list[float] = []
    model.train()
    for step, (length, size, rate) in enumerate(schedule(), 1):
        for optimizer in both:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        # Half precision is up to 1.5 times as fast, if the processor supports it.
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses(model, corpus.batch(length, size)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        recent.append(loss.item())
        if step % REPORTED == 0:
            mean, seconds = sum(recent) / len(recent), time.perf_counter() - started
            print(f"step {step:3}  length {length:4}  loss {mean:.3f}  {seconds:.0f} s", flush=True)
            recent.clear()
    model.eval()


@torch.inference_mode()
def use_of_context(model: Any, corpus: Corpus, count: int = 48, length: int = 1024) -> dict[str, float]:
    """Loss on held-out text by position, and on random tokens at their first and their second occurrence."""
    text = torch.stack([corpus.text(corpus.held_out, length) for _ in range(count)])
    by_position = losses(model, text).mean(0)
    # The same tokens twice, with text between, so that the copy lies several hundred tokens back.
    quarter = length // 4
    noise = torch.stack([corpus.noise(quarter) for _ in range(count)])
    twice = losses(model, torch.cat([noise, text[:, : length // 2], noise], 1)).mean(0)
    return {
        "held-out loss, positions 1 to 16": float(by_position[:16].mean()),
        "held-out loss, positions 17 to 64": float(by_position[16:64].mean()),
        "held-out loss, positions 65 to 256": float(by_position[64:256].mean()),
        "held-out loss, positions 512 to 1,023": float(by_position[511:].mean()),
        "loss on random tokens": float(twice[: quarter - 1].mean()),
        "loss on the same random tokens again": float(twice[1 - quarter :].mean()),
    }


def make(name: str, folder: Path) -> dict[str, float]:
    """Train the architecture ``name`` and write model and tokenizer into ``folder``; returns its losses by context."""
    documents = texts()
    tokenizer = train_tokenizer(documents)
    corpus = Corpus(documents, tokenizer)
    end = tokenizer.convert_tokens_to_ids(END)
    torch.manual_seed(SEED)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    model = ARCHITECTURES[name](sizes)
    number = sum(weight.numel() for weight in model.parameters())
    print(
        f"{name}: {number / 1e6:.1f} million weights, {len(corpus.train) / 1e6:.1f} million tokens of text", flush=True
    )
    train(model, corpus)
    context_losses = use_of_context(model, corpus)
    for name_of_loss, loss in context_losses.items():
        print(f"{loss:7.3f}  {name_of_loss}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return context_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER, help="each model in a folder below it")
    parser.add_argument(
        "--model", action="append", choices=list(ARCHITECTURES), help="repeat for several; default: all"
    )
    chosen = parser.parse_args()
    for name in chosen.model or list(ARCHITECTURES):
        make(name, chosen.folder / name)


if __name__ == "__main__":
    main()
