"""The route for embedding tables that outgrow one GPU: InterFormer with its tables sharded by TorchRec.

    torchrun --nproc_per_node 2 benchmarks/sharded_embeddings.py --sharding row_wise

In ordinary training by several processes each of them holds the whole model. Here the tables of FuxiCTR's
FeatureEmbeddingDict become one TorchRec EmbeddingCollection, whose rows (``row_wise``) or tables (``table_wise``) are
dealt over the processes; all hold the rest of the model and average its gradients. The writer then trains the ordinary
model on the same rows, and losses and trained tables are compared:

    process 0 of 2 holds 180.4 KiB of tables and 180.4 KiB of optimiser state
    process 1 of 2 holds 179.6 KiB of tables and 179.6 KiB of optimiser state
    one process holds 360.1 KiB of tables and 360.1 KiB of optimiser state
    step   1: loss 2.2842443, sharded 2.2842442
    step  11: loss 1.4980412, sharded 1.4980412
    step  20: loss 1.3419052, sharded 1.3419052
    largest difference of a loss in 20 steps: 1.2e-07
    largest difference of a weight of a table in 20 steps: 7.4e-07

TorchRec is no dependency of flowctr: each version fits one torch (1.9.2 and fbgemm-gpu-cpu 1.9.0 do not load with torch
2.13), and it asks for 0.5 GB of CUDA kernels. The output above is that of two gloo processes on a CPU with torch
2.13.0, tensordict 0.15.3 and

    pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0
    pip install tensordict torchmetrics==1.0.3 pyre-extensions

GPUs need fbgemm-gpu 1.8.0 instead and the process group of a GPU; that has not been run. To start from the ordinary
model's weights, each process makes its tables whole at first; tables that do not fit take ``init_fn`` of their configs.

What an ordinary run does and this cannot:
  * Adam. FBGEMM updates a table within the backward pass, and only the rows of the batch: the same as ordinary Adagrad
    and SGD, while Adam moves every row at every step. On a CPU it has no Adam.
  * ``max_gradient_norm`` and ``embedding_regularizer``: the gradient of a table is never there as a whole.
  * Tables of different widths; the one width is a multiple of 4.
  * Checkpoints, resuming and evaluation by `flowctr.training`, which take a model that each process holds.
"""

import argparse
from collections.abc import Mapping
from itertools import chain
from operator import itemgetter
from pathlib import Path

import torch
import torch.distributed as dist
from flowctr import config, distributed
from flowctr.data import H5DataLoader, build_h5, load_feature_map
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbeddingDict
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import seed_everything
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel, ShardingEnv
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.optimizers import in_backward_optimizer_filter

CONFIG = Path(__file__).parent.parent / "model_zoo" / "InterFormer" / "config"
EXPID = "InterFormer_test"
# A weight's first step is almost lr * sign(gradient); eps keeps it from blowing up the rounding of gradients near 0.
ADAGRAD = {"lr": 0.002, "eps": 1e-4}
TOLERANCE = 1e-4


class TorchRecEmbedding(nn.Module):
    """Stands in for a FeatureEmbeddingDict of ``nn.Embedding`` tables, with one EmbeddingCollection to be sharded.

    Padding, id 0, is not looked up, so that its zeros need not travel between processes.

    Args:
        embedding: The layer to replace; columns that share a table there share it here. Its weights are not taken.

    Attributes:
        embedding_layers: Column -> its table's name.

    Raises:
        ValueError: If a column has no plain table.
    """

    def __init__(self, embedding: FeatureEmbeddingDict):
        super().__init__()
        tables: dict[nn.Module, list[str]] = {}
        for column, table in embedding.embedding_layers.items():
            if not isinstance(table, nn.Embedding) or column in embedding.feature_encoders:
                raise ValueError(f"{column} is not embedded by a table alone; leave it out with use_features")
            tables.setdefault(table, []).append(column)
        self.embedding_layers = {column: columns[0] for columns in tables.values() for column in columns}
        configs = [
            EmbeddingConfig(
                name=columns[0],
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=columns,
            )
            for table, columns in tables.items()
        ]
        # Without memory: no process ever holds the whole, each will make its shards.
        self.collection = EmbeddingCollection(tables=configs, device=torch.device("meta"))
        self.dim = configs[0].embedding_dim

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embeds columns of ids ``(B,)`` or ``(B, T)`` as ``(B, D)`` or ``(B, T, D)``."""
        real = {column: inputs[column] != 0 for column in self.embedding_layers}
        ids = KeyedJaggedTensor(
            keys=list(real),
            values=torch.cat([inputs[column][mask].long() for column, mask in real.items()]),
            lengths=torch.cat([mask.reshape(len(mask), -1).sum(dim=1) for mask in real.values()]),
        )
        vectors = self.collection(ids)
        embedded = {}
        for column, mask in real.items():
            embedded[column] = torch.zeros(*mask.shape, self.dim, device=mask.device)
            embedded[column][mask] = vectors[column].values()
        return embedded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharding", choices=["row_wise", "table_wise"], default="row_wise")
    parser.add_argument("--steps", type=int, default=20, help="of full batches, at most an epoch")
    args = parser.parse_args()
    with distributed.process_group(-1):
        params = {**config.load(CONFIG, EXPID), "gpu": -1, "model_id": "sharded_embeddings", "verbose": 0}
        files = distributed.from_writer(lambda: {"train": build_h5(params)["train"]})
        feature_map = load_feature_map(params)
        params["num_tasks"] = len(feature_map.labels)

        rank, processes = distributed.rank(), distributed.world_size()
        rows = params["batch_size"] // processes  # of each

        def batches(batch_size: int, **sharing: int) -> H5DataLoader:
            options = {**params, "batch_size": batch_size, **sharing}
            return H5DataLoader(feature_map, files["train"], split="train", **options)

        own = batches(rows, rank=rank, world_size=processes)
        steps = min(args.steps, len(own) - 1)  # without the last batch, whose rows may be dealt unevenly
        losses, tables, held = train_sharded(build(params, feature_map), own, steps, args.sharding)
        all_held = distributed.gather(held)
        if distributed.is_writer():
            for rank, bytes_held in enumerate(all_held):
                show(f"process {rank} of {processes} holds", *bytes_held)
            compare(build(params, feature_map), batches(rows * processes), steps, losses, tables)


def build(params: dict, feature_map: FeatureMap) -> BaseModel:
    seed_everything(params["seed"])
    return config.model_class(params["model"])(feature_map, **params)


def train_sharded(
    model: BaseModel, batches: H5DataLoader, steps: int, sharding: str
) -> tuple[list[float], dict[str, Tensor], tuple[int, int]]:
    """Trains with sharded tables, from the model's own weights.

    Returns:
        The mean loss of each step; the trained tables, put together; bytes of this process's part of the tables and of
        their optimiser's state.
    """
    ordinary = model.tokens.embedding
    model.tokens.embedding = TorchRecEmbedding(ordinary)
    parallel = shard(model, sharding)
    shards = [(name, part) for name, table in sharded_tables(parallel).items() for part in table.local_shards()]
    for name, part in shards:
        first, rows = part.metadata.shard_offsets[0], part.metadata.shard_sizes[0]
        part.tensor.copy_(ordinary.embedding_layers[name].weight.detach()[first : first + rows])

    others = dict(in_backward_optimizer_filter(parallel.named_parameters()))
    optimizer = torch.optim.Adagrad(others.values(), **ADAGRAD)
    losses = [
        sum(each) / distributed.world_size()
        for each in zip(*distributed.gather(train(model, parallel, optimizer, batches, steps)))
    ]

    state = parallel.fused_optimizer.state_dict()["state"]
    states = [part for values in state.values() for value in values.values() for part in value.local_shards()]
    held = sum(part.tensor.nbytes for _, part in shards), sum(part.tensor.nbytes for part in states)
    parts = distributed.gather([(name, part.metadata.shard_offsets[0], part.tensor.detach()) for name, part in shards])
    tables: dict[str, list[Tensor]] = {}
    for name, _, rows in sorted(chain(*parts), key=itemgetter(0, 1)):
        tables.setdefault(name, []).append(rows)
    return losses, {name: torch.cat(rows) for name, rows in tables.items()}, held


def shard(model: BaseModel, sharding: str) -> DistributedModelParallel:
    """Deals the tables of a model with a `TorchRecEmbedding` over the processes."""
    collection, processes = model.tokens.embedding.collection, distributed.world_size()
    apply_optimizer_in_backward(torch.optim.Adagrad, collection.parameters(), dict(ADAGRAD))  # which it adds to
    places = {
        table.name: row_wise() if sharding == "row_wise" else table_wise(rank=i % processes)
        for i, table in enumerate(collection.embedding_configs())
    }
    sharder = EmbeddingCollectionSharder()
    plan = construct_module_sharding_plan(
        collection, places, sharder, local_size=processes, world_size=processes, device_type=model.device.type
    )
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=model.device,
        plan=ShardingPlan({"tokens.embedding.collection": plan}),
        sharders=[sharder],
    )


def sharded_tables(parallel: DistributedModelParallel) -> dict[str, ShardedTensor]:
    """Returns the tables by name, each with the shards of this process."""
    tensors = parallel.state_dict()
    return {name.split(".")[-2]: tensor for name, tensor in tensors.items() if isinstance(tensor, ShardedTensor)}


def train(
    model: BaseModel, forward: nn.Module, optimizer: torch.optim.Optimizer, batches: H5DataLoader, steps: int
) -> list[float]:
    """Trains and returns the loss of each step, the mean over this process's rows."""
    forward.train()
    losses = []
    for _, batch in zip(range(steps), batches):
        optimizer.zero_grad()
        loss = model.compute_loss(forward(batch), model.get_labels(batch))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(
    model: BaseModel, batches: H5DataLoader, steps: int, losses: list[float], tables: dict[str, Tensor]
) -> None:
    """Trains the ordinary model in one process and prints how far the sharded one is from it.

    Raises:
        RuntimeError: If they differ by more than the tolerance.
    """
    optimizer = torch.optim.Adagrad(model.parameters(), **ADAGRAD)
    expected = train(model, model, optimizer, batches, steps)
    layers = model.tokens.embedding.embedding_layers
    ordinary = {name: layers[name].weight.detach() for name in tables}
    state = {name: optimizer.state[layers[name].weight]["sum"] for name in tables}
    show("one process holds", *(sum(tensor.nbytes for tensor in each.values()) for each in (ordinary, state)))
    for step in (0, steps // 2, steps - 1):
        print(f"step {step + 1:3d}: loss {expected[step]:.7f}, sharded {losses[step]:.7f}")
    differences = {
        "loss": max(abs(one - other) for one, other in zip(expected, losses)),
        "weight of a table": max((ordinary[name] - tables[name]).abs().max().item() for name in tables),
    }
    for what, difference in differences.items():
        print(f"largest difference of a {what} in {steps} steps: {difference:.1e}")
    if not max(differences.values()) <= TOLERANCE:
        raise RuntimeError(f"the sharded training differs from the ordinary one by more than {TOLERANCE}")


def show(who: str, table_bytes: int, state_bytes: int) -> None:
    print(f"{who} {table_bytes / 2**10:.1f} KiB of tables and {state_bytes / 2**10:.1f} KiB of optimiser state")


if __name__ == "__main__":
    main()
