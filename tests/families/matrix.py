"""The columns of the matrix; its rows are ``models.FAMILIES``."""

# Each as the table calls it. A test records what it found under one of these names.
WAYS = (
    "greedy",
    "sampling",
    "padded batch",
    "beam search",
    "several sequences",
    "prompt lookup",
    "assisted",
    "chunked prefill",
    "several turns",
    "streaming",
    "pipeline, one prompt",
    "pipeline, a list",
    "two threads",
    "crop",
    "reorder",
    "repeat",
    "select",
    "reset",
    "deepcopy",
    "training",
    "bfloat16",
    "float16",
    "balanced",
)
