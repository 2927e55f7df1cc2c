"""Hashes of token sequences, by which a text is recognised."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError


def check_tokens(input_ids: object) -> None:
    """Raise unless ``input_ids`` is a tensor of token ids.

    Raises:
        InvalidArgumentError: it is not; the message says what to give instead.
    """
    rule = "input_ids must be a tensor of token ids, [sequences, tokens]"
    if isinstance(input_ids, Tensor):
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise InvalidArgumentError(f"{rule}, of int64 or int32, got {input_ids.dtype}: convert it")
        return
    first = input_ids[0] if isinstance(input_ids, list | tuple) and input_ids else None
    fix = 'give tokenizer(text, return_tensors="pt").input_ids'
    if isinstance(input_ids, Mapping):
        fix = 'give its "input_ids", made with return_tensors="pt"'
    elif isinstance(first, int | list | tuple) or hasattr(input_ids, "__array__"):
        is_flat = isinstance(first, int) or getattr(input_ids, "ndim", None) == 1
        fix = f"give torch.as_tensor(input_ids){'[None]' * is_flat}"
    raise InvalidArgumentError(f"{rule}, got a {type(input_ids).__name__}: {fix}")


def token_hashes(input_ids: Tensor, counts: Iterable[int]) -> dict[int, str]:
    """For each of ``counts``, the SHA-256 of that many first tokens of ``input_ids [B, n]``, in hexadecimal digits.

    It covers the number of rows, then the tokens position by position as 64-bit little-endian integers, so one pass
    serves all prefixes. Counts above ``n`` are left out.
    """
    by_position = input_ids.detach().cpu().long().T.contiguous().numpy().astype("<i8")
    digest, done, hashes = hashlib.sha256(len(input_ids).to_bytes(8, "little")), 0, {}
    for count in sorted(set(counts)):
        if count <= len(by_position):
            digest.update(by_position[done:count].tobytes())
            done = count
            hashes[count] = digest.hexdigest()
    return hashes
