"""``unsloth-spectral info``."""

from unsloth_spectral.cli.shared import JsonOption, check_outputs, out, write_json

EXAMPLES = ("unsloth-spectral info", "unsloth-spectral info --json info.json")


def command(json_file: JsonOption = None) -> None:
    """Show versions, the device and the attention paths, and why a path is missing."""
    from unsloth_spectral import reports
    from unsloth_spectral.eval.info import collect_info

    check_outputs(json_file)
    collected = collect_info()
    out.print(reports.info_table(collected))
    write_json(collected, json_file)
