"""Events are logged under one name, and nothing shows unless the application asks."""

import logging
import subprocess
import sys

import pytest

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
