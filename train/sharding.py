"""Fully sharded training (FSDP): every process holds a piece of each tensor of the GPT.

In: `trainer.strategy fsdp`. Out: the same checkpoints and the same run folder as any other
training: one file with whole tensors, gathered by the first process, so that a sharded run goes on
unsharded and the other way round. Blocks are gathered one at a time (arXiv 2304.11277); everything
else (embeddings, heads) together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

# Whole tensors, not the pieces of this process: to read them off the network, to put them into it.
GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True)


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for DTensors, with all processes in one data-parallel group.

    Lightning numbers the parameters in a sharded optimiser's state by their order in the module,
    torch by their order in the optimiser; here they are as torch has them, for other strategies.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning wraps it
        assert self.model is not None
        whole: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer, options=GATHER)
        if not self.is_global_zero:
            return whole  # empty
        number = {name: i for i, name in enumerate(self._names(optimizer))}
        groups = [{**g, "params": [number[n] for n in g["params"]]} for g in whole["param_groups"]]
        state = {number[name]: values for name, values in whole["state"].items()}
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=SPREAD)
        for optimizer, plain in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = self._names(optimizer)
            whole: dict[str, Any] = {
                "state": {names[number]: values for number, values in plain["state"].items()},
                "param_groups": [
                    {**g, "params": [names[number] for number in g["params"]]}
                    for g in plain["param_groups"]
                ],
            }
            set_optimizer_state_dict(self.model, optimizer, whole, options=SPREAD)
        return checkpoint

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names of the parameters in the optimiser's order."""
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[p] for group in optimizer.param_groups for p in group["params"]]


def shard(module: LightningModule) -> None:
    """Shards `module.network`, block by block, where the strategy is `Sharded`; else does nothing.

    bf16-mixed gathers the blocks' weights in bfloat16 and adds up gradients in float32.
    """
    strategy = module.trainer.strategy
    if not isinstance(strategy, Sharded):
        return
    network: Any = module.network
    mesh = strategy.device_mesh["data_parallel"]
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if str(module.trainer.precision).startswith("bf16"):
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh)
    register_fsdp_forward_method(network, "losses")


class ShardedAveraging(Callback):
    """Moving average of the weights in which every process averages its own pieces.

    Writes and reads the same checkpoint entries as `Averaging`, whose decay it uses.
    """

    def __init__(self, average: Any) -> None:
        self.average = average  # (average, current, count) -> average
        self.count = torch.tensor(0)  # of updates
        self.weights: list[Tensor] = []  # this process's pieces
        self._stepped = 0  # optimiser steps at the last update

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = [_local(p).clone() for p in pl_module.parameters()]
        self._stepped = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stepped = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._stepped:
            return
        self._stepped = trainer.global_step
        for average, parameter in zip(self.weights, pl_module.parameters(), strict=True):
            current = _local(parameter)
            new = self.average(average, current, self.count) if self.count else current
            average.copy_(new)
        self.count += 1

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        with self._swapped(pl_module):
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        checkpoint["averaging_state"] = {"n_averaged": self.count.clone()}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The strategy has loaded `state_dict`, the average if there was one, into the network.
        self.on_fit_start(trainer, pl_module)
        if "current_model_state" in checkpoint:
            self.count = checkpoint["averaging_state"]["n_averaged"].clone()
            set_model_state_dict(pl_module, checkpoint["current_model_state"], options=SPREAD)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass alone leaves the outermost one whole
        for average, parameter in zip(self.weights, pl_module.parameters(), strict=True):
            current = _local(parameter)
            before = current.clone()
            current.copy_(average)
            average.copy_(before)

    @contextmanager
    def _swapped(self, pl_module: LightningModule) -> Iterator[None]:
        self._swap(pl_module)
        try:
            yield
        finally:
            self._swap(pl_module)


def _local(parameter: Any) -> Tensor:
    """The piece of a parameter that this process holds, sharing its memory."""
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()
