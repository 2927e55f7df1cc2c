"""Teacher forcing: read a slice of a document and compare the logits behind the prefix with the dense cache's."""

from collections.abc import Sequence

from torch import Tensor

from unsloth_spectral.eval.agreement import Agreement, compare_logits
from unsloth_spectral.eval.documents import default_document, tokens_from
from unsloth_spectral.eval.methods.base import DENSE, Method
from unsloth_spectral.eval.progress import OnProgress, layers_reported
from unsloth_spectral.eval.prompt import Prompt, build_prompt
from unsloth_spectral.eval.tasks.asking import Prefilled, continue_on, prefill, prefill_dense
from unsloth_spectral.eval.tasks.dense_reference import DenseReference
from unsloth_spectral.integrations.models import LoadedModel


def check_starts(loaded: LoadedModel, document: str | None, starts: Sequence[int], needed: int) -> None:
    """Refuse a document in which fewer than ``needed`` tokens follow one of ``starts``.

    Raises:
        LoadError: the document is too short.
    """
    tokens_from(default_document() if document is None else document, loaded.tokenizer, starts, needed)


def slice_of(
    loaded: LoadedModel,
    document: str | None,
    start: int,
    *,
    context_length: int,
    continuation_length: int,
    request: str = "",
) -> Prompt:
    """The slice of ``document`` (None: the default one) from token ``start`` on, in the model's chat format.

    Raises:
        InvalidArgumentError: the context has no room for the chat format's opening.
        LoadError: the document ends too early.
    """
    text = default_document() if document is None else document
    return build_prompt(
        loaded.tokenizer,
        tokens_from(text, loaded.tokenizer, [start], context_length + continuation_length),
        request,
        context_length=context_length,
        start=start,
        continuation_length=continuation_length,
    )


def read_on(
    loaded: LoadedModel,
    method: Method,
    case: str,
    prompt: Prompt,
    reference: DenseReference[Tensor],
    on_progress: OnProgress | None,
) -> tuple[Prefilled, Agreement]:
    """Prefill the context, read the continuation in one pass, and compare with the dense cache's logits.

    The model reads all tokens of the continuation but the last, each after the true tokens before it. All but the first
    are the target tokens.

    Args:
        loaded: model and tokenizer.
        method: makes the cache.
        case: the current case.
        prompt: of ``slice_of``.
        reference: caches the dense logits ``[continuation_length - 1, vocabulary]`` of the case.
        on_progress: of the task.
    """
    tokens, is_dense = prompt.continuation[:, :-1], method.name == DENSE
    filled = prefill(loaded, method, prompt.context, on_progress)
    with layers_reported(loaded.model, f"{method.name}: continuation", on_progress):
        logits = continue_on(loaded, filled.cache, tokens)

    def dense_logits() -> Tensor:
        return logits if is_dense else continue_on(loaded, prefill_dense(loaded, prompt.context), tokens)

    dense = reference.get(loaded, case, dense_logits, anew=is_dense)
    return filled, compare_logits(dense, logits, prompt.continuation[0, 1:].to(logits.device))
