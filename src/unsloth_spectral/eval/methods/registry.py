"""All methods of the evaluation. A new method gets a module beside this one and an entry in ``methods``."""

from unsloth_spectral.eval.methods.base import Method


def methods() -> dict[str, Method]:
    """Every method that runs here, by name."""
    # Imported here, so that `unavailable` works without the spectral methods' dependencies.
    from unsloth_spectral.eval.methods.peers import peers
    from unsloth_spectral.eval.methods.spectral import spectral_methods

    groups = (spectral_methods(), peers())
    by_name = {name: method for group in groups for name, method in group.items()}
    assert len(by_name) == sum(map(len, groups)), "two methods share a name"
    return by_name


def unavailable() -> dict[str, str]:
    """Reasons why methods do not run here, by name."""
    from unsloth_spectral.eval.methods import peers

    return peers.unavailable()
