"""One vLLM process with LMCache's connector: reads prompts, answers greedily, says what it found cached.

``python engine.py MODEL PORT PROMPTS``: PROMPTS is a JSON file of ``[token numbers, how many new ones]``. The
answer is one line of JSON on standard output, after vLLM's own lines.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    model, port, prompts = sys.argv[1:]
    connector = KVTransferConfig(
        kv_connector="LMCacheMPConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": int(port)},
    )
    engine = LLM(
        model=model,
        served_model_name="smollm2",
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=1,
        enforce_eager=True,
        kv_transfer_config=connector,
    )
    requests = json.loads(Path(prompts).read_text())
    answers = engine.generate(
        [{"prompt_token_ids": ids} for ids, _ in requests],
        [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in requests],
    )
    outputs = [{"cached": answer.num_cached_tokens, "tokens": list(answer.outputs[0].token_ids)} for answer in answers]
    print(json.dumps(outputs))


if __name__ == "__main__":
    main()
