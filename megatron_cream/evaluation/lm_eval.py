# SPDX-License-Identifier: Apache-2.0
"""A Megatron checkpoint as a model of lm-eval, named ``megatron_cream``.

    python -m megatron_cream.evaluation.lm_eval --model megatron_cream \\
        --model_args checkpoint=runs/cream,cpu=true --tasks TASK

takes lm-eval's own flags. Log-likelihoods, whole or rolling, and greedy generation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_cream.checkpoint.iterations import find_checkpoint
from megatron_cream.errors import MissingPackageError, UserError, one_line_errors
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.forward import ForwardPass

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as exc:
    missing = MissingPackageError(
        "this module needs lm-eval: pip install -e '.[lm-eval]' in a checkout",
        name="lm_eval",
    )
    if __name__ != "__main__":
        raise missing from exc
    with one_line_errors():
        raise missing from exc


@register_model("megatron_cream")
class MegatronCreamLM(TemplateLM):
    """A checkpoint in place, without an export.

    Args:
        checkpoint: folder given to --save, or one iteration in it.
        max_length: most tokens of a request, its window unless given; what is longer is cut at
            its beginning, as lm-eval's own models do.
        tensor_parallel, pipeline_parallel: sizes; torchrun starts the processes.
        tokenizer_type, tokenizer_model: as tools/preprocess_data.py; the checkpoint's own unless
            given.
        cpu: run on a machine with no GPU.

    Raises:
        UserError, FileNotFoundError: a checkpoint or tokenizer that cannot be used.
    """

    backend = "causal"

    def __init__(
        self,
        checkpoint: str | None = None,
        max_length: int | None = None,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        tokenizer_type: str | None = None,
        tokenizer_model: str | None = None,
        cpu: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        tensor = _count("tensor_parallel", tensor_parallel)
        pipeline = _count("pipeline_parallel", pipeline_parallel)
        longest = None if max_length is None else _count("max_length", max_length)
        if checkpoint is None or find_checkpoint(str(checkpoint)) is None:
            raise UserError(
                f"--model_args has checkpoint={checkpoint}: it must be a folder with a torch_dist "
                "checkpoint"
            )
        if cpu:
            from megatron_cream.mcore.cpu import install

            install()
        from megatron_cream.evaluation.evaluate import open_model, validate_gpu
        from megatron_cream.evaluation.prompts import open_tokenizer, validate_vocabulary

        validate_gpu("cpu=true in --model_args")
        settings = EvaluationSettings(
            tasks=(),
            checkpoint=str(checkpoint),
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            tokenizer_type=tokenizer_type,
            tokenizer_model=tokenizer_model,
        )
        self.model = open_model(settings)
        self.tokens = open_tokenizer(settings)[0]
        validate_vocabulary(self.tokens, self.model)
        self.max_length = longest or self.model.window
        if self.tokens.eod is None and self.tokens.bos is None:
            raise UserError("--model_args: the tokenizer must have a token that begins a text")
        self._rank = 0 if self.model.primary else 1
        self._world_size = 1

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.tokens.bos if self.tokens.eod is None else self.tokens.eod

    @property
    def prefix_token_id(self) -> int | None:
        """The token that an empty context is."""
        return self.eot_token_id if self.tokens.bos is None else self.tokens.bos

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """Return the tokens of a text."""
        return self.tokens.encode([string])[0].tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is greedy."""
        passes = [self._pass(context, wanted) for _, context, wanted in requests]
        return [
            (float(scores.logprobs.sum()), bool(torch.equal(scores.best, one.targets)))
            for one, scores in zip(passes, self.model.run(iter(passes)), strict=True)
        ]

    def _pass(self, context: list[int], wanted: list[int]) -> ForwardPass:
        whole = np.array((context + wanted)[-self.max_length - 1 :], dtype=np.int64)
        tokens = torch.from_numpy(whole)[None]
        count = min(len(wanted), self.max_length)
        inputs = tokens[:, :-1]
        rows = torch.arange(inputs.shape[1] - count, inputs.shape[1])
        return ForwardPass(inputs, rows, tokens[:, 1:][:, rows])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of ``max_length`` tokens."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        results = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            results.append(sum(found for found, _ in self._loglikelihood_tokens(parts)))
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what greedy decoding writes after each context, up to a string that stops it.

        A request is (context, settings): ``until`` strings, and ``max_gen_toks``. What is longer
        than ``max_length`` with the tokens to write is cut at its beginning.

        Raises:
            UserError: sampling is asked for, or more tokens than ``max_length`` has.
        """
        shown = self.model.primary and not disable_tqdm
        return [
            self._write(*request.args)
            for request in tqdm(requests, "generate_until", disable=not shown)
        ]

    def _write(self, context: str, how: dict[str, Any]) -> str:
        if how.get("do_sample") and how.get("temperature", 1) != 0:
            raise UserError("--gen_kwargs has do_sample=True: megatron_cream decodes greedily")
        most = _count("max_gen_toks", how.get("max_gen_toks", _NEW_TOKENS))
        if most >= self.max_length:
            raise UserError(
                f"max_gen_toks is {most}: it must be below max_length, {self.max_length}"
            )
        until = how.get("until") or []
        stops = [until] if isinstance(until, str) else [text for text in until if text]
        prompt = np.array(self.tok_encode(context)[most - self.max_length :], dtype=np.int64)
        if not len(prompt):
            prompt = np.array([self.prefix_token_id])
        ends = self.model.stop_tokens or (self.tokens.eod,)
        written: list[int] = []
        text = ""
        for token in self.model.write(prompt, most):
            if token in ends:
                break
            written.append(token)
            text = self.tokens.decode(written)
            if any(stop in text for stop in stops):
                break
        return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]


_NEW_TOKENS = 256  # lm-eval's own


def _count(name: str, value: Any) -> int:
    try:
        found = int(value)
    except (TypeError, ValueError):
        found = 0
    if found < 1:
        raise UserError(f"--model_args has {name}={value}: it must be a whole number, 1 or more")
    return found


def main() -> None:
    """Run lm-eval with this model known to it; bad input ends in one line and exit status 2."""
    from lm_eval.__main__ import cli_evaluate

    with one_line_errors():
        cli_evaluate()


if __name__ == "__main__":
    main()
