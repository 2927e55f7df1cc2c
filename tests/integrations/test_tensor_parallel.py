"""Tensor parallel: two processes, each with its own heads' cache, give the tokens of one.

Run as a script by torchrun, this file is one of the processes: ``test_tensor_parallel.py MODEL_FOLDER OUTPUT_FOLDER``.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from families.lossless import LOSSLESS, token_ids, unrounded_encode
from transformers import LlamaForCausalLM

import unsloth_spectral
from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.codec.rank import block
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

PROCESSES, NEW_TOKENS = 2, 40
LOSSY = SpectralConfig(preset="balanced", block_size=128, residual_length=16)


def generated(model: LlamaForCausalLM) -> dict[str, Any]:
    """Tokens under the lossless configuration, and what a lossy one seals of a longer prompt."""
    ids = token_ids()
    with patch.object(block.factors, "encode", unrounded_encode):
        cache = SpectralCache(model, config=LOSSLESS)
        tokens = model.generate(ids, **cache_argument(cache), max_new_tokens=NEW_TOKENS, do_sample=False)
    long, lossy = token_ids(length=300), SpectralCache(model, config=LOSSY)
    with torch.no_grad():
        model(long, **cache_argument(lossy))
        logits = model(long[:, :1], **cache_argument(lossy)).logits
    return {
        "tokens": tokens.tolist(),
        "sealed": [layer.sealed_tokens for layer in cache.stats().layers],
        "lossy_sealed": [layer.sealed_tokens for layer in lossy.stats().layers],
        "lossy_top": logits[0, -1].tolist(),
        "dense_bytes": lossy.stats().dense_bytes,
        "is_finite": bool(logits.isfinite().all()),
    }


def test_two_processes_give_the_tokens_of_one(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    pytest.importorskip("transformers.distributed", reason="this transformers has no DistributedConfig")
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    expected = generated(model)
    homes = [str(Path(unsloth_spectral.__file__).parents[1]), str(Path(__file__).parents[1])]
    completed = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"),
            *(__file__, str(tmp_path / "model"), str(tmp_path)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(homes), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert completed.returncode == 0, completed.stdout
    for rank in range(PROCESSES):
        rank_results = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert rank_results["tokens"] == expected["tokens"]
        assert rank_results["sealed"] == expected["sealed"]
        assert min(rank_results["sealed"]) > 0
        # Half of the heads on each.
        assert PROCESSES * rank_results["dense_bytes"] == expected["dense_bytes"]
        assert rank_results["lossy_sealed"] == expected["lossy_sealed"]
        assert min(rank_results["lossy_sealed"]) > 0
        assert rank_results["is_finite"]
        kl = torch.nn.functional.kl_div(
            *(torch.tensor(results["lossy_top"]).log_softmax(-1) for results in (rank_results, expected)),
            log_target=True,
            reduction="sum",
        )
        assert abs(float(kl)) < 0.05


def main() -> None:
    from transformers.distributed import DistributedConfig

    folder, output = sys.argv[1:]
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    rank = torch.distributed.get_rank()
    (Path(output) / f"{rank}.json").write_text(json.dumps(generated(model)), encoding="utf-8")
    torch.distributed.barrier()
    # Without the end of the interpreter: there gloo's threads now and then abort the process, after all is written.
    os._exit(0)


if __name__ == "__main__":
    main()
