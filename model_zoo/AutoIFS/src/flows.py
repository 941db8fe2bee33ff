"""AutoIFS' information units, the four flows through them and the network that gates the flows."""

from itertools import pairwise

import torch
from flowctr.layers import LoRAUnits
from fuxictr.pytorch.layers import MLP_Block
from torch import nn

# Which unit of the scenario stage feeds which unit of the task stage: h^{sh,sh}, h^{k,j}, h^{sh,j}, h^{k,sh}.
FLOWS = ("shared to shared", "scenario to task", "shared to task", "scenario to shared")


class ScenarioUnits(nn.Module):
    """``f_s^sh(x) = x W + b`` for all rows and ``f_s^k(x) = x A_k B_k + b_k`` for those of scenario k.

    Args:
        num_scenarios: Scenarios.
        input_dim: Width of the input.
        output_dim: Width of the output.
        rank: Rank of the specific units.
    """

    def __init__(self, num_scenarios, input_dim, output_dim, rank):
        super().__init__()
        self.shared = nn.Linear(input_dim, output_dim)
        self.specific = LoRAUnits(num_scenarios, input_dim, output_dim, rank)

    def forward(self, x, scenario):
        """Gives ``u_sh`` and ``u_k`` before activation, ``(B, output_dim)`` each.

        Args:
            x: ``(B, input_dim)``.
            scenario: Each row's scenario, one-hot ``(B, scenarios)``; zeros give ``u_k = 0``.
        """
        return self.shared(x), self.specific(x, scenario)


class TaskUnits(nn.Module):
    """``f_t^sh(h) = h W + b`` for all tasks and ``f_t^j(h) = h A_j B_j + b_j`` for task j.

    Args:
        num_tasks: Tasks K.
        input_dim: Width of the input.
        output_dim: Width of the output.
        rank: Rank of the specific units.
    """

    def __init__(self, num_tasks, input_dim, output_dim, rank):
        super().__init__()
        self.shared = nn.Linear(input_dim, output_dim)
        self.specific = LoRAUnits(num_tasks, input_dim, output_dim, rank)

    def forward(self, fused, flows):
        """Takes the fused stream and the four flows one layer further, each ``(B, K or 1, width)``."""
        shared_shared, scenario_task, shared_task, scenario_shared = flows
        fused = self.shared(fused) + self.specific(fused)
        return fused, (
            self.shared(shared_shared),
            self.specific(scenario_task),
            self.specific(shared_task),
            self.shared(scenario_shared),
        )


class TaskTail(nn.Module):
    """Layers of task units on the output of the scenario units: the full logit, and each flow's own.

    With one layer and no activation the full logit is the sum of the four flows less one copy of the task biases.
    Deeper tails carry the four flows as separate streams, activated between layers as the fused one is.

    Args:
        num_tasks: Tasks K.
        input_dim: Width of the scenario units.
        hidden_units: Widths of the layers before the logit.
        rank: Rank of the specific units.
        activation: Activation of the fused scenario representation and between layers.
    """

    def __init__(self, num_tasks, input_dim, hidden_units, rank, activation):
        super().__init__()
        self.activation = activation
        self.num_tasks = num_tasks
        widths = [input_dim, *hidden_units, 1]
        self.layers = nn.ModuleList(TaskUnits(num_tasks, *sizes, rank) for sizes in pairwise(widths))

    def forward(self, u_shared, u_scenario):
        """Predicts from the scenario units' outputs before activation.

        Args:
            u_shared: ``(B, input_dim)``.
            u_scenario: ``(B, input_dim)``.

        Returns:
            The full logit ``(B, K)`` and that of each flow ``(B, K, 4)``, in the order of `FLOWS`.
        """
        fused = self.activation(u_shared + u_scenario).unsqueeze(1)  # (B, 1, D)
        flows = tuple(u.unsqueeze(1) for u in (u_shared, u_scenario, u_shared, u_scenario))  # not activated
        for number, layer in enumerate(self.layers):
            if number:
                fused, flows = self.activation(fused), tuple(map(self.activation, flows))
            fused, flows = layer(fused, flows)
        flows = [flow.expand(-1, self.num_tasks, -1) for flow in flows]  # a shared unit's is the same for all tasks
        return fused.squeeze(-1), torch.cat(flows, dim=-1)


class GateNetwork(nn.Module):
    """``w = MLP(x) W + b``: the gate logits of each row, task and flow.

    Args:
        input_dim: Width of the flattened embedding.
        hidden_units: Widths of the MLP.
        num_tasks: Tasks K.
    """

    def __init__(self, input_dim, hidden_units, num_tasks):
        super().__init__()
        self.mlp = MLP_Block(input_dim, hidden_units=list(hidden_units), hidden_activations="ReLU")
        self.head = nn.Linear(hidden_units[-1], num_tasks * len(FLOWS))

    def forward(self, x):
        """Maps ``(B, input_dim)`` to ``(B, K, 4)``."""
        return self.head(self.mlp(x)).unflatten(-1, (-1, len(FLOWS)))
