"""``unsloth-spectral profile``."""

from typing import Annotated

import typer

from unsloth_spectral.cli.shared import JsonOption, check_outputs, err, load, out, plain, progress_shown, write_json

EXAMPLES = ("unsloth-spectral profile", "unsloth-spectral profile ./my-model --json profile.json")


def command(
    model: Annotated[
        str | None, typer.Argument(help="Hub name or local folder. Default: the embedded SmolLM2-135M-Instruct.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure once how much errors in each layer's values and each head's keys matter, and a basis for the keys.

    Later spectral caches of this model spend more bits where errors matter more, and short prompts shrink more.
    """
    from unsloth_spectral import reports
    from unsloth_spectral.eval.profile import facts_of, measure_profile
    from unsloth_spectral.integrations.huggingface.fingerprint import profile_target, save_profile
    from unsloth_spectral.integrations.profile_file import profile_to_json

    check_outputs(json_file)
    with progress_shown() as report:
        loaded = load(model, report)
        profile_target(loaded.model)
        measured = measure_profile(loaded, on_progress=report)
    facts = facts_of(loaded)
    out.print(reports.profile_table(loaded.name, measured))
    write_json({**profile_to_json(measured), **facts}, json_file)
    path = save_profile(loaded.model, measured, facts)
    err.print(f"profile written to {plain(path)}", highlight=False, soft_wrap=True)
