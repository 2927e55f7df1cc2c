"""All ways to keep the cache that the evaluation knows. A new one gets a module beside this one, and a place here."""

from unsloth_spectral.eval.methods.base import Method


def methods() -> dict[str, Method]:
    """Every method that runs here, by name."""
    # Inside, as `unavailable` shall answer where the spectral methods' dependencies are not there.
    from unsloth_spectral.eval.methods.peers import peers
    from unsloth_spectral.eval.methods.spectral import spectral_methods

    groups = (spectral_methods(), peers())
    found = {name: method for group in groups for name, method in group.items()}
    assert len(found) == sum(map(len, groups)), "two methods share a name"
    return found


def unavailable() -> dict[str, str]:
    """Methods that do not run here, by name, and why."""
    from unsloth_spectral.eval.methods import peers

    return peers.unavailable()
