# SPDX-License-Identifier: Apache-2.0
"""Look at datasets and checkpoints before a GPU is asked for."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec
from types import SimpleNamespace

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_cream.checkpoint.integrity import check as check_whole
from megatron_cream.checkpoint.iterations import start_of
from megatron_cream.checkpoint.metadata import arguments_in, saved_extension, validate_same_model
from megatron_cream.checkpoint.run_folders import check_start
from megatron_cream.config import ExtensionConfig
from megatron_cream.data.dataset import no_sources_message, split_strategy
from megatron_cream.data.indexed import DatasetIndex, check_token_sample, read_index
from megatron_cream.data.metadata import check_fits, read_metadata
from megatron_cream.data.sources import make_sources
from megatron_cream.errors import UserError
from megatron_cream.extras import te_cross_entropy

DEFAULT_SPLIT = "969,30,1"  # Megatron's


def check_packages(args: Namespace) -> None:
    """Refuse what needs a package that is not installed here.

    Raises:
        UserError: naming the flag and the package.
    """
    if args.inprocess_restart and find_spec("nvidia_resiliency_ext") is None:
        raise UserError(
            "--inprocess-restart is given: it needs the package nvidia-resiliency-ext, without "
            "which Megatron would train as if it were not"
        )
    if args.optimizer not in ("adam", "sgd") and find_spec("emerging_optimizers") is None:
        raise UserError(
            f"--optimizer is {args.optimizer!r}: it needs the package emerging-optimizers; adam "
            "and sgd need none"
        )
    if args.transformer_impl == "transformer_engine" and find_spec("transformer_engine") is None:
        raise UserError(
            "--transformer-impl is 'transformer_engine', which is not installed: pip install "
            "'.[gpu]' (megatron_cream's extra), or give --transformer-impl local"
        )
    te_cross_entropy.validate_available(args)


def check_datasets(args: Namespace, extension: ExtensionConfig) -> None:
    """Check every dataset of the blend: files whole, long enough, its tokens in the vocabulary.

    Raises:
        FileNotFoundError, ValueError: naming the dataset and what it needs.
    """
    wanted = prefixes_by_split(args)
    if not wanted:
        raise UserError("--data-path is missing: it must name at least one indexed dataset")
    for prefix, splits in wanted.items():
        index = read_index(prefix)
        _check_vocabulary(args, index)
        _check_end_of_document(args, prefix)
        for split, (begin, end) in splits.items():
            if split is not Split.train and not args.eval_iters:
                continue
            first, last = round(begin * len(index.lengths)), round(end * len(index.lengths))
            strategy = split_strategy(extension, split)
            sources = make_sources(
                extension.sample_unit,
                index.pointers[first:last] // index.dtype.itemsize,
                index.lengths[first:last],
                strategy,
            )
            if not len(sources):
                unit = extension.sample_unit
                found = SimpleNamespace(sources=sources, strategy=strategy, unit=unit)
                raise UserError(no_sources_message(prefix, split.name, found))


def prefixes_by_split(args: Namespace) -> dict[str, dict[Split, tuple[float, float]]]:
    """Return dataset prefixes, each with the part of its documents that each split takes."""
    blend, per_split = get_blend_and_blend_per_split(args)
    wanted: dict[str, dict[Split, tuple[float, float]]] = {}
    if blend is not None:
        vector = parse_and_normalize_split(args.split or DEFAULT_SPLIT)
        matrix = convert_split_vector_to_split_matrix(vector)
        parts = {s: matrix[s.value] for s in Split if matrix[s.value] is not None}
        for prefix in blend[0]:
            wanted[prefix] = parts
    for split in Split if per_split is not None else ():
        for prefix in (per_split[split.value] or ([], None))[0]:
            wanted.setdefault(prefix, {})[split] = (0.0, 1.0)
    return wanted


def _check_vocabulary(args: Namespace, index: DatasetIndex) -> None:
    prefix = index.prefix
    metadata = read_metadata(prefix)
    check_fits(index, metadata)
    vocabulary = args.padded_vocab_size or args.vocab_size
    if metadata and vocabulary and metadata["vocab_size"] > vocabulary:
        raise UserError(
            f"--vocab-size is {vocabulary}: dataset {prefix} was written with "
            f"{metadata['vocab_size']} tokens ({metadata['tokenizer_type']}); it must be at least "
            "that"
        )
    sizes = [vocabulary, metadata["vocab_size"] if metadata else None]
    check_token_sample(index, min((size for size in sizes if size), default=None))


def _check_end_of_document(args: Namespace, prefix: str) -> None:
    metadata = read_metadata(prefix)
    if args.eod_mask_loss and not (metadata and metadata["appended_eod"]):
        raise UserError(
            f"--eod-mask-loss is given: dataset {prefix} must say which token ends a document; "
            "write it with tools/preprocess_data.py --append-eod"
        )


def resumed_extension(args: Namespace) -> ExtensionConfig | None:
    """Return the settings of the run that is resumed, None where none is."""
    start = start_of(args)
    if start is None or start.flag != "--load" or args.finetune:
        return None
    check_whole(start.folder, f"{start.flag} is {start.root}", objects=False)
    return saved_extension(arguments_in(start.folder))


def check_checkpoint(args: Namespace, extension: ExtensionConfig) -> None:
    """Check the checkpoint that a run starts from, and compare our settings with its.

    Starting a new run from the weights of another (--finetune, --pretrained-checkpoint) may
    change them; that is what extending a model is.

    Raises:
        UserError: naming each setting that differs, with both values; or what ``check_start``
            finds.
        FileNotFoundError: the run is to start from weights that are not there.
    """
    check_start(args)
    start = start_of(args)
    if start is None:
        return
    saved = arguments_in(start.folder)
    if start.flag == "--load" and not args.finetune:
        _validate_same_settings(args.load, saved, extension)
        _validate_optimizer_layout(args, saved)
    else:
        validate_same_model(str(start.root), saved, args)
        _validate_base_scaling(str(start.root), saved, extension)


def _validate_base_scaling(path: str, saved: Namespace, extension: ExtensionConfig) -> None:
    """Refuse to interpolate from a window that the weights know with a scaling of their own."""
    before = saved_extension(saved)
    if before is None or before.rope_interpolation == "none" or extension.rope_base is not None:
        return
    if before.original_length < extension.original_length <= before.target_length:
        raise UserError(
            f"--original-length is {extension.original_length}: the model in {path} reaches that "
            f"with {before.rope_interpolation} over {before.original_length} tokens, which would "
            f"be dropped; give its config.json as --rope-base-config, or interpolate anew with "
            f"--original-length {before.original_length}"
        )


def _validate_same_settings(path: str, saved: Namespace, extension: ExtensionConfig) -> None:
    before = saved_extension(saved)
    if before is None:
        raise UserError(
            f"--load is {path}: that checkpoint was not trained by megatron_cream, so the run "
            "cannot be resumed; start a new one from its weights with --finetune"
        )
    differences = before.differences(extension)
    if differences:
        raise UserError(
            f"--load is {path}: that checkpoint was trained with other settings (checkpoint != "
            f"now): {'; '.join(differences)}. Resume with the same, or start a new run from its "
            "weights with --finetune"
        )


def _validate_optimizer_layout(args: Namespace, saved: Namespace) -> None:
    """Refuse a resume whose optimizer state Megatron would find unreadable after its start."""
    if args.no_load_optim or saved.no_save_optim:
        return
    if args.use_distributed_optimizer != saved.use_distributed_optimizer:
        needs = "given" if saved.use_distributed_optimizer else "left out"
        raise UserError(
            f"--use-distributed-optimizer is {args.use_distributed_optimizer}: checkpoint "
            f"{args.load} was saved with {saved.use_distributed_optimizer}, so it must be {needs}; "
            "or start the optimizer anew with --no-load-optim"
        )
    if args.use_distributed_optimizer and args.cpu:
        raise UserError(
            f"--use-distributed-optimizer is given with --cpu, and --load is {args.load}: Megatron "
            "resumes it with a GPU's optimizers only; leave it out from the start, or start the "
            "optimizer anew with --no-load-optim"
        )
    if not saved.use_distributed_optimizer or saved.dist_ckpt_optim_fully_reshardable:
        return
    for size in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(args, size) != getattr(saved, size):
            raise UserError(
                f"--{size.replace('_', '-')} is {getattr(args, size)}: checkpoint {args.load} was "
                f"saved with {getattr(saved, size)}, and its distributed optimizer reads at that "
                "only, because it was saved without --dist-ckpt-optim-fully-reshardable; resume "
                "with the same, or start the optimizer anew with --no-load-optim"
            )
