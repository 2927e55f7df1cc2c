"""Events are logged under one name, and nothing shows unless the application asks."""

import subprocess
import sys

EVENT = "import logging, unsloth_spectral; {}logging.getLogger('unsloth_spectral').warning('an event')"


def stderr_of(setup: str) -> str:
    command = [sys.executable, "-c", EVENT.format(setup)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr


def test_the_logger_is_silent_until_it_gets_a_handler() -> None:
    assert stderr_of("") == ""
    assert "an event" in stderr_of("logging.basicConfig(); ")
