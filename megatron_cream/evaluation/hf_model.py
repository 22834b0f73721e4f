# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder as a model to score with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_cream.attention.bands import Bands
from megatron_cream.attention.sdpa import require_type
from megatron_cream.checkpoint.hf_folder import HfWeights, read_config
from megatron_cream.checkpoint.model_shape import MOST_MODULES, validate_values
from megatron_cream.checkpoint.weight_map import FAMILIES, IGNORED
from megatron_cream.errors import MissingPackageError, UserError, naming, reason
from megatron_cream.evaluation import generation
from megatron_cream.evaluation.forward import (
    ForwardPass,
    PassScores,
    ScoringModel,
    attend,
    keep,
    score_rows,
    tails,
)
from megatron_cream.evaluation.long_attention import BeyondWindow
from megatron_cream.options import integer
from megatron_cream.rope.huggingface import scaling_from_hf, with_rope

_NAME = "megatron_cream"

# Settings by which a model changes logits after its output layer; scoring reads that layer.
_AFTER_OUTPUT = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class HuggingFaceModel(ScoringModel):
    """A causal language model of transformers; see ``forward.ScoringModel``.

    Args:
        path: folder with config.json and weights.
        dtype: ``float32``, ``bfloat16`` or ``float16``; as saved unless given.
        device: where it runs; a GPU where there is one unless given.
        rope: fields of config.json that take the place of its own.

    Raises:
        FileNotFoundError: no such folder.
        UserError: a folder that transformers cannot read, or logits that are changed after the
            output layer.
        ImportError: transformers is not installed.
    """

    primary = True
    trained_attention = None  # asked for by a flag; config.json has its sizes

    def __init__(
        self,
        path: str,
        dtype: str | None = None,
        device: str | None = None,
        rope: dict[str, Any] | None = None,
    ) -> None:
        if not path or not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"--hf is {path}: it must be a folder with a config.json")
        self.name = path
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        weights_type = getattr(torch, dtype) if dtype else "auto"
        self.module = _load(path, weights_type, rope or {}).to(self.device).eval()
        config = self.module.config.get_text_config()
        for key in _AFTER_OUTPUT:
            if getattr(config, key, None) not in (None, 1.0):
                raise UserError(f"--hf is {path}: its config.json has {key}, which is not scored")
        self.window = config.max_position_embeddings
        self.vocabulary = config.vocab_size
        self.shares_context = _replace_attention(self.module, config)
        self.dual_chunk = getattr(config, "dual_chunk_attention_config", None)
        self.stop_tokens = _stop_tokens(self.module)
        self.settings = {"dtype": str(self.module.dtype).removeprefix("torch.")}
        if rope is not None:
            self.settings["rope"] = rope["rope_parameters"]

    def attend_beyond_window(self, bands: Bands, flag: str) -> None:
        """Attend over ``bands`` from now on.

        Raises:
            UserError: naming the flag; the model has another attention or RoPE, or a type that
                GPUs have no kernel for.
        """
        config = self.module.config
        family = type(self.module).__name__
        if family not in FAMILIES or not self.shares_context:
            raise UserError(
                f"{flag} with --hf {self.name}: the model must be one of {', '.join(FAMILIES)}, "
                f"without a sliding window; it is {family}"
            )
        scaling = scaling_from_hf(config.to_dict())
        if scaling.varies_with_length:
            raise UserError(
                f"{flag} with --hf {self.name}: its RoPE, {scaling.summary}, changes with the "
                "length of a text; name another with --rope-interpolation"
            )
        require_type(self.module.dtype, self.module.device.type == "cuda")
        base = self.module.model
        base.rotary_emb = _Unrotated()
        for layer in base.layers:
            layer.self_attn.beyond_window = BeyondWindow(bands, scaling)

    def set_length(self, length: int) -> None:
        """Do nothing: transformers looks at the position ids of each call."""

    @torch.inference_mode()
    def run(self, passes: Iterator[ForwardPass]) -> Iterator[PassScores]:
        """Answer passes in order."""
        head = self.module.get_output_embeddings()
        for one in passes:
            kept = self.hidden(one)[:, one.rows.to(self.device)]
            targets = one.targets.flatten().to(self.device)
            found = score_rows(kept.flatten(0, 1), head, targets, self.vocabulary)
            yield PassScores(*(x.view(one.targets.shape).cpu() for x in found))

    def generate(
        self, prompts: Sequence[np.ndarray], new_tokens: Sequence[int], stop: Sequence[int]
    ) -> Iterator[np.ndarray]:
        """Yield what greedy decoding writes after each prompt ``[n]``, in order.

        It is what transformers' ``generate`` writes for the prompt alone. Prompts go several at a
        time, as many as there is memory for; where the model keeps its own attention, ``generate``
        itself is called for one at a time.
        """
        if not self.shares_context:
            for prompt, most in zip(prompts, new_tokens, strict=True):
                written = generation.generate_tokens(self.module, prompt, most, list(stop) or None)
                yield generation.before_stop(written, stop)
            return
        size = self._batch_size(prompts, new_tokens)
        for batch, own in zip(batched(prompts, size), batched(new_tokens, size), strict=True):
            tokens = generation.decode(self._next, batch, max(own), self.device)
            yield from generation.collect(tokens, own, stop)

    def _next(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the most likely token ``[b]`` after the last of ``tokens`` ``[b, n]``."""
        head = self.module.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, args: (args[0][:, -1:],))
        try:
            made = self.module(input_ids=tokens, position_ids=positions, use_cache=False)
        finally:
            handle.remove()
        return made.logits[:, -1, : self.vocabulary].float().argmax(-1)

    def _batch_size(self, prompts: Sequence[np.ndarray], new_tokens: Sequence[int]) -> int:
        """Return how many prompts are answered together."""
        config = self.module.config.get_text_config()
        longest, lengths = max(new_tokens, default=0), [len(prompt) for prompt in prompts]
        if _has_own_angles(lengths, longest, config):
            return 1
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        there = generation.kept_tokens(
            *(config.num_hidden_layers, heads, dim, self.module.dtype),
            self.module.device.type == "cuda",
        )
        return generation.batch_size(lengths, longest, there)

    def hidden(self, one: ForwardPass) -> Tensor:
        """Return what the output layer is given, ``[b, n, hidden]``."""
        seen: list[Tensor] = []
        head = self.module.get_output_embeddings()

        def keep_all_make_one(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            seen.append(args[0])
            return (args[0][:, -1:],)

        handle = head.register_forward_pre_hook(keep_all_make_one)
        try:
            with tails(one.tails, one.tail):
                self.module(
                    input_ids=one.tokens.to(self.device),
                    position_ids=one.positions().to(self.device),
                    use_cache=False,
                )
        finally:
            handle.remove()
        return seen[0]


class _Unrotated(torch.nn.Module):
    """In place of a model's rotary embedding: cosines and sines that turn nothing."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return x.new_ones(1, 1, 1), x.new_zeros(1, 1, 1)


def _stop_tokens(module: Any) -> tuple[int, ...]:
    """Return the tokens with which transformers' ``generate`` ends."""
    found = getattr(module.generation_config, "eos_token_id", None)
    return tuple(found) if isinstance(found, list) else () if found is None else (found,)


def _has_own_angles(lengths: Sequence[int], new_tokens: int, config: Any) -> bool:
    """Return whether RoPE's angles depend on the longest sequence of a batch.

    transformers goes from the short to the long angles of longrope where it exceeds the original
    window, and from one base to the next of dynamic.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        window = rope["original_max_position_embeddings"]
        return bool(lengths) and min(lengths) <= window < max(lengths) + new_tokens
    return "dynamic" in kind


def _load(path: str, dtype: Any, rope: dict[str, Any]) -> Any:
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as exc:
        raise MissingPackageError(
            "--hf needs transformers: pip install -e '.[hf]' in a checkout", name="transformers"
        ) from exc
    _validate_folder(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if rope:
            config = type(config).from_dict(with_rope(config.to_dict(), rope))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named, and refused, below
        )
    except torch.OutOfMemoryError:
        raise
    except (*_UNREADABLE, StrictDataclassError) as exc:
        kind = type(exc).__name__
        raise UserError(
            f"--hf is {path}: transformers cannot load it ({kind}: {reason(exc)})"
        ) from exc
    module, report = loaded
    _validate_weights(path, report)
    return module


# What transformers raises about a folder that is damaged, or of a model that it does not have: it
# has no error of its own for that.
_UNREADABLE = (
    *(OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, RuntimeError, SafetensorError),
)


def _validate_folder(folder: Path) -> None:
    """Refuse what transformers would build a wrong model of, or never come back from.

    Raises:
        UserError: config.json is damaged, for the families that are converted in any value; or a
            safetensors file is.
    """
    config = read_config(folder)
    with naming(folder):
        integer(config, "num_hidden_layers", most=MOST_MODULES)
        named = config.get("architectures")
        if isinstance(named, list) and named and named[0] in tuple(FAMILIES):
            validate_values(config)
            scaling_from_hf(config)
    if any(folder.glob("*.safetensors")):
        HfWeights(folder).close()


def _validate_weights(path: str, loaded: dict[str, Any]) -> None:
    """Check that weights are all from the folder, and all of the folder.

    transformers draws what is missing at random, and says so in a line of its log.
    """
    for kind, what in _PARTIAL.items():
        names = sorted(
            str(name[0] if isinstance(name, tuple) else name)
            for name in loaded.get(kind) or ()
            if not str(name).endswith(IGNORED)
        )
        if names:
            few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"--hf is {path}: its weights {what.format(len(names))}: {few}")


_PARTIAL = {
    "missing_keys": "lack {} tensors of the model that its config.json describes",
    "mismatched_keys": "have {} tensors of other shapes than its config.json says",
    "unexpected_keys": "have {} tensors that the model of its config.json has no place for",
}


def _replace_attention(module: Any, config: Any) -> bool:
    """Give the model our attention; return whether it took it.

    A model with a sliding window, or with attention of its own, keeps what it has and is given
    one tail at a time.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    slides = window is not None and getattr(config, "use_sliding_window", True)
    if slides or kinds != {"full_attention"} or not module._supports_attention_backend:
        return False
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
    module.set_attn_implementation(_NAME)
    return True


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Transformers' interface: ``[b, h, n, d]`` in, ``[b, n, h, d]`` out."""
    if mask is not None or options.get("sliding_window") or options.get("softcap"):
        raise UserError(
            f"{type(module).__name__} asks for a mask, a window or a soft cap, which is not scored"
        )
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    key, value = keep(module, key, value)
    beyond = getattr(module, "beyond_window", None)
    found = (beyond.attend if beyond else attend)(query, key, value, scale)
    return found.transpose(1, 2).contiguous(), None
