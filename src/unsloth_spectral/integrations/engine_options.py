"""The options of the serde for serving engines, checked when the server starts."""

from typing import Any

from unsloth_spectral.codec.chunk.codec import ChunkCodec
from unsloth_spectral.codec.chunk.layout import Blocks, ChunkLayout, Heads, Latent, Planes
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.integrations.engine_records import EngineRecords
from unsloth_spectral.integrations.profile_file import read_profile

# The options of each layout; the first may differ by group of layers.
_LAYOUT_OPTIONS = {
    "heads": ("head_dim",),
    "blocks": ("head_dim", "block_tokens"),
    "planes": ("head_dim",),
    "latent": ("kv_lora_rank", "qk_rope_head_dim"),
}
_WITH_PROFILE = ("heads", "blocks", "planes")
_COMMON_OPTIONS = ("bits_per_element", "layout", "rope_theta", "max_workers")
_EXAMPLES = {
    "bits_per_element": 2.5,
    "head_dim": 128,
    "block_tokens": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
_WHICH_LAYOUT = (
    '"layout": "heads" for vLLM since 0.26 on a GPU, "blocks" for vLLM on a CPU in float32, "planes" for keys and '
    'values in planes of their own (vLLM before 0.26, SGLang, vLLM\'s b12x), or "latent" for multi-head latent '
    "attention"
)


def records_from_options(options: dict[str, Any]) -> EngineRecords:
    """The records that ``options`` describe.

    ``options``: ``bits_per_element`` and ``rope_theta`` as in ``ChunkCodec``; ``layout``, ``"heads"``, ``"blocks"``,
    ``"planes"`` or ``"latent"``, and the options of that layout (see ``codec.chunk.layout``). Where chunks have several
    groups of layers, ``head_dim`` or ``kv_lora_rank`` is a list with a number for each, or None for a group to be
    stored raw. ``profile``, for all layouts but ``"latent"``: the path of the model's profile, or a list with a path
    or None for each group. ``max_workers`` is left to the server's integration.

    Raises:
        InvalidArgumentError: an option is missing, unknown, of another layout or out of its range, or a profile cannot
            be used.
    """
    name = options.get("layout")
    if name is None:
        raise InvalidArgumentError(
            f"the spectral serde needs layout, since the shape of a chunk does not say what lies in it: add "
            f"{_WHICH_LAYOUT}"
        )
    if not isinstance(name, str) or name not in _LAYOUT_OPTIONS:
        raise InvalidArgumentError(f"layout must be one of {', '.join(_LAYOUT_OPTIONS)}, got {name!r}: {_WHICH_LAYOUT}")
    needed = _LAYOUT_OPTIONS[name]
    accepted = (*_COMMON_OPTIONS, *needed, *(("profile",) if name in _WITH_PROFILE else ()))
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise InvalidArgumentError(
            f'with layout "{name}" the spectral serde takes {", ".join(accepted)}; got {", ".join(unknown)}'
        )
    missing = [option for option in ("bits_per_element", *needed) if options.get(option) is None]
    if missing:
        line = ", ".join(f'"{option}": {_EXAMPLES[option]}' for option in missing)
        raise InvalidArgumentError(f"the spectral serde needs {' and '.join(missing)}: add e.g. {line}")
    size_option = needed[0]
    sizes = options[size_option] if isinstance(options[size_option], list) else [options[size_option]]
    if all(size is None for size in sizes):
        raise InvalidArgumentError(
            f"{size_option} must be a number, or a list with a number for each group of layers, got {sizes}"
        )
    bits, theta = options["bits_per_element"], options.get("rope_theta")
    profiles = _profiles(options.get("profile"), len(sizes))
    codecs = [
        None if size is None else ChunkCodec(bits, _layout(name, size, options), theta, profile)
        for size, profile in zip(sizes, profiles, strict=True)
    ]
    return EngineRecords(codecs, size_option)


def _profiles(option: Any, num_groups: int) -> list[ModelProfile | None]:
    """The profile of each group of layers.

    Raises:
        InvalidArgumentError: one cannot be used, or there are not as many as groups.
    """
    paths = option if isinstance(option, list) else [option] * num_groups
    is_good = all(path is None or isinstance(path, str) for path in paths) and len(paths) == num_groups
    if not is_good:
        raise InvalidArgumentError(
            f"profile must be the path of a profile, or a list with a path or null for each of {num_groups} groups of "
            f"layers, got {option!r}"
        )
    return [None if path is None else read_profile(path) for path in paths]


def _layout(name: str, size: int, options: dict[str, Any]) -> ChunkLayout:
    if name == "latent":
        return Latent(size, options["qk_rope_head_dim"])
    if name == "blocks":
        return Blocks(size, options["block_tokens"])
    return Planes(size) if name == "planes" else Heads(size)
