"""Training with weights, gradients and optimiser state in shares (FSDP2), for large towers.

torch's `fully_shard` waits for its modules to be called; the wrapper calls the hooks of every block
around what it does in its pieces, so that a block has its weights while it runs and no longer.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from zoo.errors import ZooError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from zoo.lit.classifier import Classifier
    from zoo.model.reduced import ReducedViT


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all devices of all machines.

    A checkpoint is one file with the whole weights, as without it.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        #: Off once training is over: what is tested and saved is an ordinary model.
        self.active = True

    def setup_environment(self) -> None:
        """Bring the processes together; called again for every loop."""
        if self.parallel_devices is not None:
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        module: Any = self.lightning_module
        # Lightning asks the module to do it, and calls this between building and optimisers.
        module.configure_model = lambda: self._shard(module)

    def _shard(self, module: Classifier) -> None:
        if self.active and not is_sharded(module.net):
            shard(module.net, self.device_mesh["data_parallel"])

    def teardown(self) -> None:
        """Leave the module as it was found."""
        module: Any = self.lightning_module
        if module is not None:
            vars(module).pop("configure_model", None)
        super().teardown()


def check_sharding(trainer: pl.Trainer, module: Classifier) -> None:
    """Refuses what does not go with weights in shares.

    Raises:
        ZooError: With what to type.
    """
    from zoo.lit.classifier import Classifier

    if not isinstance(trainer.strategy, Sharded):
        return
    callbacks: Any = getattr(trainer, "callbacks")  # noqa: B009  (Lightning hides it)
    if any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise ZooError(
            "trainer=fsdp keeps no averaged weights, which would be whole on every device; type "
            "callbacks.ema=null"
        )
    if type(module) is not Classifier or module.net.plugins:
        raise ZooError(
            "trainer=fsdp trains whole models by module=classifier, without plugins; type "
            "trainer=ddp"
        )
    if any(not p.requires_grad for p in module.net.parameters()):
        raise ZooError(
            "trainer=fsdp shares out what is trained, and part of this model is frozen; type "
            "trainer=ddp"
        )


def shard(net: ReducedViT, mesh: DeviceMesh) -> None:
    """Puts a model in shares, block by block; the rest is together in one.

    Args:
        net: The model; its parameters become a process's own shares of them.
        mesh: The processes.
    """
    from torch.distributed.fsdp import fully_shard

    for block in net.backbone.get_submodule("blocks").children():
        kind = block.__class__
        fully_shard(block, mesh=mesh)
        # torch has made it a class of its own, and what a block is made of is known by its class.
        block.__class__ = kind
    fully_shard(net, mesh=mesh)


def is_sharded(net: nn.Module) -> bool:
    """Whether a model is in shares."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(net, FSDPModule)


def unsharded(net: ReducedViT, whole: ReducedViT) -> ReducedViT:
    """The model as one that is not in shares; every process has to ask.

    Args:
        net: In shares.
        whole: The same model before, which takes the weights.
    """
    state: dict[str, Tensor] = {}
    for name, value in net.state_dict().items():
        full: Any = value.full_tensor() if hasattr(value, "full_tensor") else value
        state[name] = full.detach().cpu()
    whole.load_state_dict(state)
    return whole


def kept_whole(trainer: pl.Trainer, module: Classifier) -> ReducedViT | None:
    """A copy of a model that is about to be put in shares, None where it is not."""
    if not isinstance(trainer.strategy, Sharded):
        return None
    with torch.no_grad():
        return copy.deepcopy(module.net)


def make_whole(trainer: pl.Trainer, module: Classifier, whole: ReducedViT | None) -> None:
    """Puts the trained weights into an ordinary model, for what comes after training."""
    if whole is None or not isinstance(trainer.strategy, Sharded):
        return
    if is_sharded(module.net):
        module.net = unsharded(module.net, whole)
    trainer.strategy.active = False
