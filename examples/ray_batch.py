"""Batch inference over documents with Ray Data: a pool of actors, each with the model and a spectral cache of its own.

    python examples/ray_batch.py --documents 6 --actors 2

Documents are rows of a dataset; ``map_batches`` hands them to whichever actor is free. Each document's cache is made,
asked and let go, so an actor holds one compressed context at a time. Ray brings the rows to other machines if the
cluster has some: nothing here changes. Needs ``pip install 'ray[data]'``.
"""

import argparse
import json
import os
from typing import Any

import numpy as np
import ray

from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

# Only what the actors need is imported there: a document's text travels, the model does not.
QUESTION = "\n\nIn one sentence, the text above says that"


class Summarizer:
    """One actor: loads the model once, then answers batch after batch."""

    def __init__(self, preset: str, num_threads: int) -> None:
        import torch

        from unsloth_spectral.integrations.models import load_model

        torch.set_num_threads(num_threads)
        loaded = load_model()
        self.model, self.tokenizer, self.preset = loaded.model, loaded.tokenizer, preset

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from unsloth_spectral import SpectralCache

        answers, factors = [], []
        for text in batch["text"]:
            inputs = self.tokenizer(str(text) + QUESTION, return_tensors="pt")
            cache = SpectralCache(self.model, preset=self.preset)
            output = self.model.generate(**inputs, **cache_argument(cache), max_new_tokens=24, do_sample=False)
            answers.append(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
            factors.append(cache.stats().compression_factor)
        count = len(answers)
        return {
            "document": batch["document"],
            "answer": np.array(answers, dtype=object),
            "compression_factor": np.array(factors),
            "actor": np.array([os.getpid()] * count),
        }


def run(documents: list[str], actors: int, preset: str = "balanced") -> list[dict[str, Any]]:
    """The answers, in the order of the documents."""
    items = [{"document": number, "text": text} for number, text in enumerate(documents)]
    # A block for each document: a block goes to one actor.
    answered = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Summarizer,
        fn_constructor_kwargs={"preset": preset, "num_threads": 1},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
    )
    return sorted(answered.take_all(), key=lambda row: row["document"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=6, help="how many slices of the default document")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--characters", type=int, default=4000, help="of each slice")
    options = parser.parse_args()
    from unsloth_spectral.eval.documents import default_document

    text = default_document()
    parts = [text[at * 20_000 :][: options.characters] for at in range(options.documents)]
    # The actors keep their CPUs to the end, and whoever hands them rows needs one too.
    ray.init(num_cpus=options.actors + 1, include_dashboard=False, log_to_driver=False)
    for row in run(parts, options.actors):
        print(json.dumps({name: value.item() if hasattr(value, "item") else value for name, value in row.items()}))


if __name__ == "__main__":
    main()
