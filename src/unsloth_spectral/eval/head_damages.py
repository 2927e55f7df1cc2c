"""KL divergence caused by errors in each head's keys and values, estimated for all heads at once from gradients.

For small errors d of the cache the KL divergence is half of d F d, where F, the Fisher information, is the mean of the
squared gradients of log p(y) over tokens y that the model itself draws (Martens 2020, "New insights and perspectives on
the natural gradient method", section 5). Errors of different tokens count as independent.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def head_damages(
    logits_of: Callable[[list[Tensor]], Tensor], cached: list[Tensor], errors: list[Tensor], draws: int
) -> list[Tensor]:
    """Estimate the KL divergence, in nats per position, from each of ``errors``: ``[num_heads]`` float32 each.

    Args:
        logits_of: the logits ``[positions, vocabulary]`` behind a cache of such tensors, differentiable in them.
        cached: keys or values of a layer, ``[1, num_heads, n, D]`` each.
        errors: what is added to each of ``cached``, in the same shapes.
        draws: number of texts y, drawn from a fixed seed.

    Raises:
        RuntimeError: no gradient reaches the cache.
    """
    generator = torch.Generator().manual_seed(0)
    damages = [torch.zeros(error.shape[1], dtype=torch.float32, device="cpu") for error in errors]
    with torch.enable_grad():
        # Gradients of the cache alone: the model's parameters are left as they are.
        inputs = [tensor.detach().clone().requires_grad_() for tensor in cached]
        log_probabilities = logits_of(inputs).float().log_softmax(-1)
        probabilities = log_probabilities.detach().exp().cpu()
        for draw in range(draws):
            drawn = torch.multinomial(probabilities, 1, generator=generator).to(log_probabilities.device)
            log_likelihood = log_probabilities.gather(-1, drawn).sum()
            gradients = torch.autograd.grad(log_likelihood, inputs, retain_graph=draw + 1 < draws, allow_unused=True)
            if all(gradient is None for gradient in gradients):
                raise RuntimeError("no gradient reaches the cache")
            for damage, gradient, error in zip(damages, gradients, errors, strict=True):
                if gradient is not None:
                    by_token = (gradient.float() * error.float()).sum(-1)
                    damage += by_token.square().sum((0, 2)).cpu() / (2 * draws * len(log_probabilities))
    return damages
