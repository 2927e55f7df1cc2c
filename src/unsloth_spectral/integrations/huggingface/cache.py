"""A transformers ``Cache`` whose full-attention layers are spectral."""

import os
from collections.abc import Mapping
from itertools import chain, count
from typing import Any, SupportsIndex
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from unsloth_spectral.cache import snapshot
from unsloth_spectral.cache.layer_stats import SharedBytes
from unsloth_spectral.cache.stats import CacheStats
from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.registry import codec_of, make_codec
from unsloth_spectral.errors import InvalidArgumentError, LoadError, SpectralError
from unsloth_spectral.fields import Field
from unsloth_spectral.integrations.huggingface.attention_call import AttentionCall
from unsloth_spectral.integrations.huggingface.compiling import usable_length
from unsloth_spectral.integrations.huggingface.fingerprint import profile_of
from unsloth_spectral.integrations.huggingface.header import check_header, config_in, make_header
from unsloth_spectral.integrations.huggingface.layer_plans import CrossAttentionLayer, layers_of
from unsloth_spectral.integrations.huggingface.layers import (
    MaterialisingCacheLayer,
    SpectralCacheLayer,
    layer_stats,
    layer_to_fields,
    restore_layer,
)
from unsloth_spectral.integrations.huggingface.support import check_model, unwrapped, why_materialised
from unsloth_spectral.integrations.huggingface.switch import hold
from unsloth_spectral.integrations.options import config_of
from unsloth_spectral.log import warn_once


class _ModelReference(ref[PreTrainedModel]):
    """A weak reference to a cache's model. Copies of the cache share it; pickling stops at it."""

    def __copy__(self) -> "_ModelReference":
        return self

    def __deepcopy__(self, memo: Any) -> "_ModelReference":
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise SpectralError(
            "a SpectralCache cannot be pickled, nor written by torch.save: write it with cache.save(path) and read it "
            "with SpectralCache.load(path, model)"
        )


class SpectralCache(Cache):
    """A KV cache that stores old tokens as spectral factors, for ``model.generate(cache=cache)``.

    Full-attention layers are spectral; sliding, chunked, linear and state layers keep transformers' own. Making
    a cache also gives the model the attention function that reads it, until ``unpatch_unsloth_attention(model)``; that
    function treats every other cache as before.

    A model that computes with its keys and values itself, outside transformers' AttentionInterface or before it
    (multi-head latent attention, DiffLlama, Falcon, BLOOM, MPT, and GPT-J before transformers 5.24), gets them rebuilt
    at every step, one layer at a time: memory falls, decoding gets no faster. One warning per model says so.

    Args:
        model: a decoder-only transformers model.
        preset: ``"quality"``, ``"balanced"`` (the default), ``"small"`` or ``"tiny"``, in place of a ``config``.
        config: bits or ranks, block size and exact tiers.
        use_profile: whether to spend bits by the model's profile, if one was measured (``unsloth-spectral profile``).
        max_length: the most tokens, prompt and answer together, for decoding by compiled steps: then the cache
            ``is_compileable``, and ``generate`` compiles the step. None: the cache grows without limit, and decoding is
            not compiled. Where steps cannot be compiled, one warning says why, and decoding is as without it.

    Raises:
        UnsupportedModelError: the model cannot carry a spectral cache; the message names the model and what is
            supported.
        InvalidArgumentError: an option is out of its range for this model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        preset: str | None = None,
        config: CodecConfig | None = None,
        use_profile: bool = True,
        max_length: int | None = None,
    ) -> None:
        chosen = config_of(config, preset=preset)
        model = unwrapped(model)
        check_model(model, chosen)
        wants_profile = use_profile and codec_of(chosen).uses_profile
        profile = profile_of(model, _num_spectral(model)) if wants_profile else None
        self._build(model, chosen, profile, max_length)

    def _build(
        self, model: PreTrainedModel, config: CodecConfig, profile: ModelProfile | None, max_length: int | None = None
    ) -> None:
        max_length = usable_length(model, config, max_length)
        hold(model)
        # Weak, because copying a cache must not copy the model.
        self.config, self.profile, self._model = config, profile, _ModelReference(model)
        plans = layers_of(model.config.get_text_config(decoder=True))
        self.codec = make_codec(config, _num_spectral(model), profile)
        numbers = count()
        reason = why_materialised(model)
        if reason is not None:
            _warn_that_it_is_rebuilt(model, reason)
        kind = SpectralCacheLayer if reason is None else MaterialisingCacheLayer
        layers = [
            kind(config, self.codec.layer(next(numbers)), self._model, max_length)
            if plan.layer_type == "full_attention"
            else plan.transformers_layer(max_length)
            for plan in plans
        ]
        self.max_length = max_length
        super().__init__(layers=layers)
        self._spectral = [layer for layer in layers if isinstance(layer, SpectralCacheLayer)]
        self._crossing = [layer for layer in layers if isinstance(layer, CrossAttentionLayer)]
        # A dummy layer stores no tokens: its model reads the tokens of another layer.
        self._others = [
            layer
            for layer, plan in zip(layers, plans, strict=True)
            if plan.layer_type not in ("full_attention", "dummy") and layer not in self._crossing
        ]
        self._depth, self._num_before = _depth(model), -1
        self._first = layers.index(self._spectral[0])

    def prepare_step(self, num_tokens: int = 1) -> None:
        """Make the cache ready for ``num_tokens`` more tokens: seal what is due, between two steps.

        ``generate`` calls it. A loop of one's own that runs a compiled model calls it before each step.

        Raises:
            InvalidArgumentError: with them the cache would have more than ``max_length`` tokens.
            SpectralError: as ``update``.
        """
        if self.max_length is None:
            return
        buffers = [layer.step for layer in self._spectral if layer.step is not None and layer.step.is_ready]
        counts = torch.stack([step.counts for step in buffers]).tolist() if buffers else []
        if len(buffers) < len(self._spectral) or len({held for _, held in counts}) > 1:
            self._check_room(self._shortest + num_tokens)
            self._take_back()
            for layer in self._spectral:
                layer.seal()
            return
        self._check_room(counts[0][1] + num_tokens)
        for layer, step, (num_exact, _) in zip(self._spectral, buffers, counts, strict=True):
            if num_exact >= step.due:
                layer.seal()

    def _check_room(self, num_tokens: int) -> None:
        if self.max_length is not None and num_tokens > self.max_length:
            raise InvalidArgumentError(
                f"this cache was made for max_length={self.max_length} tokens, and these would be {num_tokens}; nothing"
                f" is lost: cache.reset() empties it, SpectralCache(model, max_length={2 * num_tokens}) makes a larger "
                f"one, and cache.save(path) with SpectralCache.load(path, model, max_length={2 * num_tokens}) goes on"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append a layer's new tokens; those of the first spectral layer begin a forward pass.

        Raises:
            InvalidArgumentError: the cache would have more than its ``max_length``.
            SpectralError: the last pass was interrupted, and layers of other kinds cannot remove its tokens; or the
                cache was made for another model.
        """
        if torch.compiler.is_compiling() and self._is_step(key_states.shape[-2]):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self._update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def is_in_step(self) -> bool:
        """True if a pass with one new token can be a compiled step."""
        return self._is_step(1)

    def _is_step(self, query_length: int) -> bool:
        return self._spectral[0].is_ready_for(query_length)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if layer_idx >= len(self.layers):
            raise self._made_for_another(f"more than {layer_idx}")
        if layer_idx == self._first:
            self._take_back()
            self._num_before = self._shortest
            self._check_room(self._num_before + key_states.shape[-2])
            for layer in self._crossing:
                layer.begin_pass()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def begin_pass(self, model: PreTrainedModel) -> None:
        """``model`` is about to run with this cache.

        Raises:
            SpectralError: it has another number of layers; layers left empty would look like an interrupted pass.
        """
        depth = _depth(model)
        if depth != self._depth:
            raise self._made_for_another(depth)
        self._num_before = self._shortest

    def note_call(self, layer_idx: int, call: AttentionCall) -> None:
        """The attention module of layer ``layer_idx`` is about to run with this cache."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(layer, SpectralCacheLayer):
            layer.call = call

    @property
    def received_nothing(self) -> bool:
        """True if the last pass has given this cache no token."""
        return self._shortest <= self._num_before

    def _made_for_another(self, num_layers: object) -> SpectralError:
        return SpectralError(
            f"this cache was made for another model: it has {self._depth} layers, the model running with it has "
            f"{num_layers}; make one for it: cache = SpectralCache(model)"
        )

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens that all spectral layers have; tokens of an interrupted pass, which only some have, do not count.

        For a layer that attends to an image, the number of the image's tokens.
        """
        if torch.compiler.is_compiling() and self._is_step(1):
            return self._spectral[0].get_seq_length()
        num_tokens = super().get_seq_length(layer_idx)
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], CrossAttentionLayer):
            return num_tokens
        return min(num_tokens, self._shortest)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], SpectralCacheLayer):
            if self._is_step(query_length):
                return super().get_mask_sizes(query_length, layer_idx)
            return self._shortest + query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    @property
    def _shortest(self) -> int:
        if len({layer.get_seq_length() for layer in self._crossing}) > 1:
            return self._num_before  # interrupted while only some of them had an image
        return min(layer.spectral.num_tokens for layer in self._spectral)

    def _take_back(self) -> None:
        """Cut all layers to one length: an interrupted forward pass left its tokens in the first layers only."""
        shortest = self._shortest
        if all(layer.spectral.num_tokens == shortest for layer in self._spectral):
            return
        if self._others:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in self._others}))
            raise SpectralError(
                f"the last forward pass was interrupted, and {kinds} in this cache "
                "cannot take its tokens back: call cache.reset() and start again from the whole prompt"
            )
        for layer in self._spectral:
            layer.spectral.crop(shortest)
        for crossing in self._crossing:
            crossing.take_back()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        for layer in self._others:
            if isinstance(layer, CacheLayerMixin) and not layer.is_compileable:
                # In the first supported releases, a layer with a window zeroes its tensors instead of dropping them.
                layer.is_initialized = False

    def save(
        self,
        path: str | os.PathLike[str],
        input_ids: Tensor | None = None,
        model_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write this cache to one file; a failure leaves no partial file.

        The cache that ``load`` makes of it continues as this one would, token for token.

        Args:
            path: ends in ``.safetensors``; an existing file is replaced.
            input_ids: ``[B, n]``, the tokens fed to the model, or more. Their hash is written, by which ``load`` checks
                that a prompt begins with them; the cache itself never sees tokens.
            model_inputs: what the processor returned for ``input_ids``, where they hold images, video or audio. Hashes
                of these inputs are written too, because the tokens that stand for an image are the same for any image.

        Raises:
            InvalidArgumentError: the path cannot be written, the cache is empty, ``input_ids`` are too few or no
                tokens, or they hold tokens that stand for images and ``model_inputs`` are missing.
            SpectralError: a layer of transformers' own has contents that cannot be stored; or the model is gone.
            UnsupportedModelError: the model's weights cannot be read, so that ``load`` could not recognise the model.
            OSError: the disk is full or the like.
        """
        target, model = snapshot.check_path(path), self._model()
        if model is None:
            raise SpectralError("the model of this cache is gone, and a snapshot names its model: keep the model")
        if not self._shortest:
            raise InvalidArgumentError("an empty cache has nothing to save: give it to the model with a prompt first")
        self._take_back()
        batch = self._spectral[0].spectral.batch_size
        header = make_header(model, self.config, batch, self._shortest, input_ids, model_inputs)
        snapshot.write(target, header, self._to_fields())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        input_ids: Tensor | None = None,
        model_inputs: Mapping[str, Any] | None = None,
        max_length: int | None = None,
    ) -> "SpectralCache":
        """The cache that ``save`` wrote to ``path``, with its codes mapped from the file.

        Then call ``model.generate(prompt, cache=cache)`` with a prompt that begins with the cache's tokens and has at
        least one more.

        Args:
            path: the file. While the cache lives it may be replaced or deleted, but not modified.
            model: the model that made the cache, or an equal one, of the same dtype.
            input_ids: ``[B, n]``, a prompt that must begin with the cache's tokens.
            model_inputs: what the processor returned for that prompt, which must begin with the same images, video and
                audio; those of a batch must be the same as a whole.
            max_length: for decoding by compiled steps, in place of the saved cache's; None takes that one. Layers with
                a sliding window must have been saved with one.

        Raises:
            LoadError: there is no such snapshot, it is truncated or altered, of another version, another model, other
                tokens or other images; the message is one line that says what differs.
            InvalidArgumentError: ``input_ids`` are no tokens, ``model_inputs`` are missing, or the cache has more than
                ``max_length`` tokens.
            UnsupportedModelError: the model cannot carry a spectral cache, or its weights cannot be read.
        """
        document, model = snapshot.read(path), unwrapped(model)
        config = config_in(document.header)
        try:
            check_model(model, config)
        except InvalidArgumentError as error:
            raise LoadError(f"{path} does not fit {type(model).__name__}: {error}") from error
        check_header(document.header, model, input_ids, model_inputs)
        cache, fields = cls.__new__(cls), document.fields
        profile = None
        if fields.has("profile"):
            profile = ModelProfile.from_fields(fields.sub("profile"), _num_spectral(model))
        if max_length is None and fields.has("max_length"):
            max_length = fields.integer("max_length", 1)
        cache._build(model, config, profile, max_length)
        devices, layers = _devices(model), fields.subs("layers")
        fields.require(len(layers) == len(cache.layers), f"{len(cache.layers)} layers, not {len(layers)}")
        for number, (layer, stored) in enumerate(zip(cache.layers, layers, strict=True)):
            restore_layer(layer, stored, devices.get(number, model.device))
        shared = fields.sub("shared").on(devices.get(cache._first, model.device))
        cache.codec.restore(shared)
        lengths = {layer.spectral.num_tokens for layer in cache._spectral}
        num_tokens = document.header.sub("tokens").integer("count", 1)
        fields.require(lengths == {num_tokens}, f"{num_tokens} tokens in every layer")
        cache._check_room(num_tokens)
        return cache

    def _to_fields(self) -> Field:
        return {
            "max_length": self.max_length,
            "profile": None if self.profile is None else self.profile.to_fields(),
            "shared": self.codec.to_fields(),
            "layers": [layer_to_fields(layer) for layer in self.layers],
        }

    def stats(self) -> CacheStats:
        """Stored bytes, the bytes of a dense cache, the factor between them, and the same per layer."""
        shared = SharedBytes()
        return CacheStats.of([layer_stats(layer, shared) for layer in self.layers])


def _num_spectral(model: PreTrainedModel) -> int:
    """The number of layers that become spectral."""
    plans = layers_of(model.config.get_text_config(decoder=True))
    return sum(plan.layer_type == "full_attention" for plan in plans)


def _devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """The device that each layer's keys will come from."""
    devices: dict[int, torch.device] = {}
    for module in model.modules():
        # Quantized modules may have buffers and no parameter.
        number, weight = getattr(module, "layer_idx", None), next(chain(module.parameters(), module.buffers()), None)
        if isinstance(number, int) and weight is not None and not weight.is_meta:
            devices.setdefault(number, weight.device)
    return devices


def _depth(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def _warn_that_it_is_rebuilt(model: PreTrainedModel, reason: str) -> None:
    warn_once(
        "%s %s: its keys and values are stored compressed and rebuilt at every step, so memory falls but decoding "
        "gets slower, not faster",
        type(model).__name__,
        reason,
        about=model,
    )


def dense_cache(model: PreTrainedModel) -> DynamicCache:
    """transformers' own cache, to compare with."""
    return DynamicCache(config=model.config)
