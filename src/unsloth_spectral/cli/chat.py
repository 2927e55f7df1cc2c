"""``unsloth-spectral chat``."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unsloth_spectral.cli.shared import PATH, ModelOption, PresetOption, err, load, plain, progress_shown
from unsloth_spectral.errors import InvalidArgumentError

if TYPE_CHECKING:
    from unsloth_spectral.eval.chat import Conversation

EXAMPLES = (
    "unsloth-spectral chat --document report.txt --store ~/.cache/prefixes",
    "echo 'Who wrote it?' | unsloth-spectral chat --document report.txt",
)


def command(
    document: Annotated[Path, typer.Option(help="UTF-8 text file to talk about.", **PATH)],
    store: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which the document's cache is kept: the next start answers without reading it.", **PATH
        ),
    ] = None,
    model: ModelOption = None,
    preset: PresetOption = "balanced",
    context_length: Annotated[
        int | None, typer.Option("--context-length", min=1, help="Take so many tokens of the document. Default: all.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 256,
) -> None:
    """Talk about a document, its cache compressed; the memory it takes is shown after each answer.

    One question a line, from the terminal or a pipe; answers go to stdout, all else to stderr. A question that cannot
    be asked gets a line that says why, and the next one is read. Ctrl-C stops an answer, Ctrl-D ends the conversation.
    """
    from unsloth_spectral.codec.config import SpectralConfig
    from unsloth_spectral.eval.chat import Conversation
    from unsloth_spectral.eval.documents import read_document
    from unsloth_spectral.integrations.huggingface import PrefixStore

    config, text = SpectralConfig(preset=preset), read_document(document)
    prefixes = None if store is None else PrefixStore(store)
    with progress_shown() as report:
        conversation = Conversation(
            load(model, report),
            text,
            config=config,
            store=prefixes,
            document_length=context_length,
            answer_length=max_new_tokens,
            on_progress=report,
        )
    err.print(_opening(conversation, is_kept=store is not None), highlight=False)
    for question in _questions():
        _answer(conversation, question)


def _opening(conversation: "Conversation", is_kept: bool) -> str:
    tokens, restored = conversation.document_tokens, conversation.restored_tokens
    came = f"{restored:,} of them from the store" if is_kept else "give --store FOLDER to keep them for the next start"
    return plain(f"{tokens:,} tokens read in {conversation.prefill_seconds:.2f} s, {came}; {_memory(conversation)}")


def _questions() -> Iterator[str]:
    stdin = sys.stdin
    if stdin is None or stdin.closed:  # by whoever started this process
        return
    if isinstance(stdin, io.TextIOWrapper):
        # Bytes that are no text arrive as surrogates, which `ask` refuses: the line is lost, and not the conversation.
        stdin.reconfigure(errors="surrogateescape")
    is_terminal = stdin.isatty()
    while True:
        # On stderr: stdout gets the answers alone.
        err.print("> ", end="", highlight=False)
        line = stdin.readline()  # `input` insists on a stdout and a stderr
        if not line:
            err.print()
            return
        if not is_terminal:
            err.print(plain(line.rstrip("\r\n")), highlight=False, soft_wrap=True)
        if line.strip():
            yield line.strip()


def _answer(conversation: "Conversation", question: str) -> None:
    try:
        for piece in conversation.ask(question):
            print(piece, end="", flush=True)
    except InvalidArgumentError as error:
        err.print(f"[bold red]not asked:[/] {plain(error)}", highlight=False, soft_wrap=True)
        return
    except KeyboardInterrupt:
        err.print("\nstopped", highlight=False)
    print(flush=True)
    err.print(plain(_memory(conversation)), style="dim", highlight=False)


def _memory(conversation: "Conversation") -> str:
    from unsloth_spectral.reports import human_bytes

    stats = conversation.stats()
    stored, dense = human_bytes(stats.stored_bytes), human_bytes(stats.dense_bytes)
    return f"cache: {stats.num_tokens:,} tokens in {stored}, dense {dense} ({stats.compression_factor:.1f}x)"
