# SPDX-License-Identifier: Apache-2.0
"""Build a layout rank by rank in one process, and check that its stages make up the model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.planning import fake_world


@dataclass(frozen=True)
class RankView:
    """What one rank builds.

    Attributes:
        rank: in the world.
        stage: pipeline stage, from 0.
        layers: numbers of its layers, from 1, over all its chunks.
        embedding, output: it has the embedding, the output layer.
        parameters: it holds.
        counted: of these, the ones that belong to the model's sum: not the whole copies that other
            ranks of tensor parallelism or a tied embedding have as well.
    """

    rank: int
    stage: int
    layers: tuple[int, ...]
    embedding: bool
    output: bool
    parameters: int
    counted: int


@dataclass(frozen=True)
class StagesCheck:
    """A layout that was built whole and is right.

    Attributes:
        views: the ranks of the first copy of the model, and the last rank of the world.
        parameters: of the model, its vocabulary padded as the layout pads it.
        args: Megatron's arguments.
        extension: our settings.
    """

    views: tuple[RankView, ...]
    parameters: int
    args: Namespace
    extension: ExtensionConfig

    def stage(self, index: int) -> RankView:
        """Return the rank of pipeline stage ``index`` that holds most."""
        return max((v for v in self.views if v.stage == index), key=lambda v: v.parameters)


def check_stages(argv: Sequence[str], world_size: int) -> StagesCheck:
    """Build the layout that flags of ``megatron_cream.pretrain`` describe, and check it.

    No dataset, checkpoint or GPU is touched; process groups are fake. Checked: flags parse and are
    valid; every layer is built once; the embedding is on the first stage alone and the output
    layer on the last; every rank turns its positions by our rotary, with our frequencies; the
    parameters of the ranks add up to those of the model built on one rank; a rank of another copy
    holds as many.

    Raises:
        UserError: naming the flag, or the rank and what it holds.
        RuntimeError: this process has process groups, or a GPU in use.
    """
    fake_world.prepare()
    args, extension = fake_world.parse(argv, world_size)
    ranks = fake_world.model_ranks(args)
    views = [rank_view(args, extension, rank) for rank in ranks]
    whole = rank_view(fake_world.one_rank(args), extension, 0)
    _check_layers(views, whole)
    _check_parameters(views, whole)
    if world_size - 1 not in ranks:
        views.append(rank_view(args, extension, world_size - 1))
        _check_copy(views)
    return StagesCheck(tuple(views), whole.parameters, args, extension)


def rank_view(args: Namespace, extension: ExtensionConfig, rank: int) -> RankView:
    """Build what ``rank`` builds, on the meta device, and look at it.

    Raises:
        UserError: its rotary embedding is not ours, or not of these flags.
    """
    from megatron.core import mpu

    with fake_world.as_rank(args, rank) as groups:
        chunks = fake_world.build(args, extension, groups)
        for chunk in chunks:
            _check_rotary(chunk, args, extension, rank)
        layers = [layer.layer_number for chunk in chunks for layer in chunk.decoder.layers]
        return RankView(
            rank=rank,
            stage=mpu.get_pipeline_model_parallel_rank(),
            layers=tuple(layers),
            embedding=any(hasattr(chunk, "embedding") for chunk in chunks),
            output=any(hasattr(chunk, "output_layer") for chunk in chunks),
            parameters=sum(p.numel() for chunk in chunks for p in chunk.parameters()),
            counted=sum(p.numel() for p in _own_parameters(chunks)),
        )


def _own_parameters(chunks: Sequence[Any]) -> Iterator[Any]:
    """Parameters of this rank that no other rank of the copy is counted for."""
    from megatron.core import mpu

    dense_copy = mpu.get_data_parallel_rank(with_context_parallel=True)
    expert_copy = mpu.get_expert_data_parallel_rank()
    for chunk in chunks:
        for parameter in chunk.parameters():
            expert = not getattr(parameter, "allreduce", True)
            if expert_copy if expert else dense_copy:
                continue
            if getattr(parameter, "shared", False):
                continue  # the output layer's copy of a tied embedding
            tensor = mpu.get_expert_tensor_parallel_rank if expert else _tensor_rank
            if getattr(parameter, "tensor_model_parallel", False) or tensor() == 0:
                yield parameter


def _tensor_rank() -> int:
    from megatron.core import mpu

    return mpu.get_tensor_model_parallel_rank()


def _check_rotary(chunk: Any, args: Namespace, extension: ExtensionConfig, rank: int) -> None:
    from megatron_cream.mcore.rotary import PositionRotaryEmbedding
    from megatron_cream.training.arguments import rotary_dim

    rotary = getattr(chunk, "rotary_pos_emb", None)
    if not isinstance(rotary, PositionRotaryEmbedding):
        raise UserError(f"rank {rank} rotates by {type(rotary).__name__}: positions are ignored")
    if rotary.scaling != extension.scaling(rotary_dim(args)):
        raise UserError(f"rank {rank} rotates by {rotary.scaling}: the flags say otherwise")


def _check_layers(views: Sequence[RankView], whole: RankView) -> None:
    """Compare the stages with the whole model.

    Raises:
        UserError: a layer is missing or built twice, or a table is where it should not be.
    """
    last = max(view.stage for view in views)
    for view in views:
        if view.layers != views_of_stage(views, view.stage)[0].layers:
            raise UserError(f"rank {view.rank} has layers {view.layers}: its stage has others")
        if view.embedding != (view.stage == 0) or view.output != (view.stage == last):
            raise UserError(
                f"rank {view.rank} of stage {view.stage} has embedding: {view.embedding}, output "
                f"layer: {view.output}; the first stage must have the one, the last the other"
            )
    built = [n for stage in range(last + 1) for n in views_of_stage(views, stage)[0].layers]
    if sorted(built) != sorted(whole.layers):
        raise UserError(f"the stages have layers {sorted(built)}: the model has {whole.layers}")


def views_of_stage(views: Sequence[RankView], stage: int) -> list[RankView]:
    """Return the views of one pipeline stage."""
    return [view for view in views if view.stage == stage]


def _check_parameters(views: Sequence[RankView], whole: RankView) -> None:
    counted = sum(view.counted for view in views)
    if counted != whole.parameters:
        raise UserError(
            f"{len(views)} ranks hold {counted} parameters of the model: it has {whole.parameters}"
        )


def _check_copy(views: Sequence[RankView]) -> None:
    """Compare the last view, of another copy of the model, with the first copy's last rank."""
    *first, copy = views
    twins = views_of_stage(first, copy.stage)
    if (copy.parameters, copy.layers) not in {(v.parameters, v.layers) for v in twins}:
        raise UserError(
            f"rank {copy.rank} holds {copy.parameters} parameters in layers {copy.layers}: the "
            f"first copy has {twins[-1].parameters} in {twins[-1].layers}"
        )
