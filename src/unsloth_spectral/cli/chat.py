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
    document: Annotated[Path, typer.Option(help="UTF-8 text file to ask questions about.", **PATH)],
    store: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps the document's cache, so that the next start need not read the document.",
            **PATH,
        ),
    ] = None,
    model: ModelOption = None,
    preset: PresetOption = "balanced",
    context_length: Annotated[
        int | None, typer.Option("--context-length", min=1, help="Tokens of the document to read. Default: all.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Ask questions about a document whose cache is compressed; each answer is followed by the cache's size.

    Each line from the terminal or a pipe is a question. Answers go to stdout, everything else to stderr. An invalid
    question is reported and skipped. Ctrl-C stops an answer, Ctrl-D ends the conversation.
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
    err.print(_opening(conversation, has_store=store is not None), highlight=False)
    for question in _questions():
        _answer(conversation, question)


def _opening(conversation: "Conversation", has_store: bool) -> str:
    tokens, restored = conversation.document_tokens, conversation.restored_tokens
    origin = f"{restored:,} of them from the store" if has_store else "use --store FOLDER to keep them for next time"
    return plain(f"{tokens:,} tokens read in {conversation.prefill_seconds:.2f} s, {origin}; {_memory(conversation)}")


def _questions() -> Iterator[str]:
    stdin = sys.stdin
    if stdin is None or stdin.closed:  # closed by the parent process
        return
    if isinstance(stdin, io.TextIOWrapper):
        # Undecodable bytes arrive as surrogates. `ask` refuses such a line, and the conversation continues.
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
