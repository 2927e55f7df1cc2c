"""A conversation about a document: the tokens fed, the tokens in the cache, and the answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from unsloth_spectral import PrefixStore, SpectralConfig
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.chat import Conversation
from unsloth_spectral.eval.prompt import followup_frame
from unsloth_spectral.integrations.models import LoadedModel

CONFIG = SpectralConfig(block_size=128, residual_length=16)


@pytest.fixture
def loaded(tiny_llama: Callable[..., LlamaForCausalLM], character_tokenizer: Any) -> LoadedModel:
    model = tiny_llama(initializer_range=0.1, max_position_embeddings=600)
    model.generation_config.eos_token_id = character_tokenizer.eos_token_id = None
    return LoadedModel(model, character_tokenizer, "tiny")


@pytest.fixture
def fed(loaded: LoadedModel) -> list[int]:
    """How many tokens the model was fed, pass by pass."""
    counts: list[int] = []
    loaded.model.model.register_forward_pre_hook(
        lambda _, __, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return counts


def talk(conversation: Conversation, *questions: str) -> list[str]:
    return ["".join(conversation.ask(question)) for question in questions]


def test_answers_are_those_of_the_whole_text(loaded: LoadedModel, document: str, fed: list[int]) -> None:
    """What was said before stays in the cache and is not fed again; nothing is left out or said twice."""
    conversation = Conversation(loaded, document[:60], config=CONFIG, answer_length=5)
    assert conversation.document_tokens == 61, "the opening is one token"
    answers = talk(conversation, "Who?", "Why?")
    tokenizer: Any = loaded.tokenizer
    frames = [tokenizer(followup_frame(tokenizer, question)).input_ids for question in ("Who?", "Why?")]
    assert fed == [60, 1 + len(frames[0]), *[1] * 4, 1 + len(frames[1]), *[1] * 4]
    ids = tokenizer("^" + document[:60]).input_ids
    for frame, answer in zip(frames, answers, strict=True):
        ids = [*ids, *frame]
        written = []
        for _ in range(5):  # nothing is sealed yet, so this is exact
            written.append(int(loaded.model(torch.tensor([[*ids, *written]]), use_cache=False).logits[0, -1].argmax()))
        assert tokenizer.decode(written) == answer
        ids = [*ids, *written]


def test_the_second_start_feeds_the_question_alone(
    loaded: LoadedModel, document: str, fed: list[int], tmp_path: Path
) -> None:
    answers = []
    for start in range(2):
        conversation = Conversation(loaded, document[:400], config=CONFIG, store=PrefixStore(tmp_path), answer_length=5)
        assert conversation.restored_tokens == (0, 400)[start]
        answers.append(talk(conversation, "Who?", "Why?"))
    assert answers[0] == answers[1]
    assert answers[0] == talk(Conversation(loaded, document[:400], config=CONFIG, answer_length=5), "Who?", "Why?")
    assert [count for count in fed if count > 100] == [400, 400], "one for the store and one without it"


def test_an_answer_that_is_stopped(loaded: LoadedModel, document: str) -> None:
    """What was said counts, and the conversation goes on behind it."""
    stopped, short = (Conversation(loaded, document[:60], config=CONFIG, answer_length=n) for n in (9, 3))
    answer = stopped.ask("Who?")
    beginning = "".join(next(answer) for _ in range(3))
    answer.close()
    assert talk(short, "Who?") == [beginning]
    assert talk(stopped, "Why?")[0][:3] == talk(short, "Why?")[0]


def test_an_interrupted_pass(loaded: LoadedModel, document: str) -> None:
    conversation, other = (Conversation(loaded, document[:60], config=CONFIG, answer_length=4) for _ in range(2))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = loaded.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(conversation.ask("Who?"))
    handle.remove()
    # The question was asked, and not answered.
    frame = followup_frame(loaded.tokenizer, "Who?")
    assert "".join(conversation.ask("Why?")) == "".join(other.ask(f"Who?\nAnswer:{frame[:0]}\n\nQuestion: Why?"))


def test_the_end_of_an_answer(loaded: LoadedModel, document: str) -> None:
    whole = talk(Conversation(loaded, document[:60], config=CONFIG, answer_length=6), "Who?")[0]
    tokenizer: Any = loaded.tokenizer
    conversation = Conversation(loaded, document[:60], config=CONFIG, answer_length=6)
    written: list[int] = []
    tokenizer_decode = tokenizer.decode
    tokenizer.decode = lambda ids, **options: written.append(ids[-1]) or tokenizer_decode(ids, **options)
    talk(conversation, "Who?")
    third = written[2]
    assert third not in written[:2]
    loaded.model.generation_config.eos_token_id = [third, 1]
    conversation = Conversation(loaded, document[:60], config=CONFIG, answer_length=6)
    assert talk(conversation, "Who?") == [whole[:2]]


def test_no_room(loaded: LoadedModel, document: str) -> None:
    with pytest.raises(InvalidArgumentError, match="need 657 tokens, and the model has 600: take at most 343 of"):
        Conversation(loaded, document[:400], config=CONFIG)
    Conversation(loaded, document[:400], config=CONFIG, document_length=343)
    with pytest.raises(InvalidArgumentError, match="ask for shorter answers"):
        Conversation(loaded, document[:400], config=CONFIG, answer_length=600)
    short = Conversation(loaded, document, config=CONFIG, document_length=200, answer_length=50)
    assert short.document_tokens == 201
    with pytest.raises(InvalidArgumentError, match="start a new conversation, or ask a shorter question"):
        talk(short, "x" * 400)
    with pytest.raises(InvalidArgumentError, match="question must be text"):
        talk(short, "caf\udce9")
    assert talk(short, "Who?")[0]


def test_the_frame_of_a_further_question(character_tokenizer: Any) -> None:
    assert followup_frame(character_tokenizer, "Why?") == "\n\nQuestion: Why?\nAnswer:"
    character_tokenizer.chat_template = "a template"
    character_tokenizer.apply_chat_template = lambda messages, **_: "".join(
        f"<{message['role']}>{message['content']}</>" for message in messages
    )
    assert followup_frame(character_tokenizer, "Why?") == "</><user>Why?</>"
