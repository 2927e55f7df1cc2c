"""The spectral serde with and without the model's profile: bytes, error, agreement, and times of encoding.

As ``lmcache_serde``, but without LMCache's own serdes, so that it needs no engine. ``--repeats`` are the slices of
text. Needs the model's profile (``unsloth-spectral profile``).
"""

from itertools import islice

import torch
from harness import Target, arguments, finish
from serde_rows import Row, spectral
from smollm2 import Subject

SIZES = ((2.5, 256), (2.25, 256), (3.0, 256), (2.5, 1024))


def main() -> None:
    options = arguments("lmcache_profile", __doc__ or "", repeats=3)
    subject = Subject()
    profile = subject.profile()
    rows = [
        Row(name, spectral(bits, profile=given), tokens)
        for bits, tokens in SIZES
        for name, given in ((f"spectral {bits:g}", None), (f"spectral {bits:g}, with profile", profile))
    ]
    with torch.inference_mode():
        for text_slice in islice(subject.slices(), options.repeats):
            for row in rows:
                row.add(subject, text_slice)
                print(text_slice.start, row.name, row.tokens, f"{row.fidelities[-1].kl:.5f}", flush=True)
    own, known = rows[0], rows[1]
    results = [row.to_dict() for row in rows]
    targets = [
        Target("KL with a profile over KL without, 2.5 bits", 1, results[1]["kl"] / results[0]["kl"], False),
        Target("times faster encoding with a profile", 10, own.encode_seconds / known.encode_seconds, True),
    ]
    finish(options.json, {"benchmark": "lmcache_profile", "slices": len(own.fidelities), "rows": results}, targets)


if __name__ == "__main__":
    main()
