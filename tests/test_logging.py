"""Events are logged under one name, and nothing shows unless the application asks."""

import logging
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

import unsloth_spectral
from unsloth_spectral.log import warn_once

EVENT = "import logging, unsloth_spectral; {}logging.getLogger('unsloth_spectral').warning('an event')"


def stderr_of(setup: str) -> str:
    command = [sys.executable, "-c", EVENT.format(setup)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr


def test_the_logger_is_silent_until_it_gets_a_handler() -> None:
    assert stderr_of("") == ""
    assert "an event" in stderr_of("logging.basicConfig(); ")


def test_a_warning_is_given_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "unsloth_spectral"):
        for number in range(3):
            warn_once("%d tokens", number)
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG", "DEBUG"]
    assert caplog.messages == ["0 tokens", "1 tokens", "2 tokens"]


class Subject:
    """Anything that a weak reference can be made to."""


def test_a_warning_about_an_object_is_given_once_for_each(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Subject(), Subject()
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        for subject in (first, second, first, None, None):
            warn_once("%s", "text", about=subject)
    assert len(caplog.records) == 3
    remembered = weakref.ref(first)
    del first, subject
    assert remembered() is None, "the memory of a warning keeps nothing alive"


def test_the_library_has_one_logger() -> None:
    """The command line alone asks for it by name, to add a handler."""
    source = Path(unsloth_spectral.__file__).parent
    asking = {str(path.relative_to(source)) for path in source.rglob("*.py") if "getLogger" in path.read_text()}
    assert asking <= {"log.py", "cli/app.py"}
