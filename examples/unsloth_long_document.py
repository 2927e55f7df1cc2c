# %% [markdown]
# # A long document on a GPU with Unsloth
#
# Loads a model in 4 bits, patches it with one line, reads a document of 32,000 tokens and goes on writing. Run it cell
# by cell in an editor that knows `# %%`, or as a script:
#
#     pip install unsloth unsloth-spectral
#     python examples/unsloth_long_document.py --model unsloth/Meta-Llama-3.1-8B-Instruct
#
# `--tiny` runs the same cells on the embedded SmolLM2-135M with plain transformers, on a CPU.

# %%
import argparse
from pathlib import Path

import torch

parser = argparse.ArgumentParser(description="A long document, dense and spectral.")
parser.add_argument("--model", default="unsloth/Meta-Llama-3.1-8B-Instruct")
parser.add_argument("--document", type=Path, help="a text file; the Python language reference if not given")
parser.add_argument("--tokens", type=int, default=32_000, help="of the document to read")
parser.add_argument("--new-tokens", type=int, default=200)
parser.add_argument("--tiny", action="store_true", help="the embedded model on a CPU, a short document")
options = parser.parse_args()
if options.tiny:
    options.tokens, options.new_tokens = min(options.tokens, 600), min(options.new_tokens, 8)

# %% Load. Unsloth asks to be imported before transformers.
if options.tiny:
    from unsloth_spectral.integrations.models import load_model

    loaded = load_model(device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
else:
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=options.tokens + options.new_tokens + 256, load_in_4bit=True
    )
    FastLanguageModel.for_inference(model)

# %% The document, cut to length.
from unsloth_spectral.eval.documents import read_document  # noqa: E402

text = read_document(options.document)
ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: options.tokens]
inputs = {"input_ids": torch.tensor([ids], device=model.device)}
inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
print(f"{len(ids):,} tokens read of {options.tokens:,}")


# %% Generate, and say what it took.
def generate(name: str) -> None:
    """Continue the document and print the cache's bytes and, on a GPU, the peak above the model."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    output = model.generate(**inputs, max_new_tokens=options.new_tokens, do_sample=False, return_dict_in_generate=True)
    cache = output.get("cache") or output.get("past_key_values")  # the name before transformers 5.24
    stats = getattr(cache, "stats", None)
    if stats is not None:
        found = stats()
        print(f"{name}: {found.stored_bytes / 1e6:,.1f} MB stored, dense {found.dense_bytes / 1e6:,.1f} MB, ", end="")
        print(f"{found.compression_factor:.1f}x smaller")
    if on_gpu:
        print(f"{name}: peak {(torch.cuda.max_memory_allocated() - before) / 1e6:,.1f} MB above the model")
    print(f"{name}: {tokenizer.decode(output.sequences[0, len(ids) :], skip_special_tokens=True)!r}")


# %% As it is: the model's own cache.
generate("dense")

# %% The one line.
from unsloth_spectral import patch_unsloth_attention, unpatch_unsloth_attention  # noqa: E402

patch_unsloth_attention(model, preset="balanced")
generate("spectral")

# %% And back.
unpatch_unsloth_attention(model)
