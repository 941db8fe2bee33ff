"""INFNet's tokens and first hubs."""

import torch
from flowctr.layers import LearnedTokens, masked_mean
from torch import nn


class FieldHubs(nn.Module):
    """First field hubs: ``C~(0) = reshape(MLP(flatten(C)))``; or the mean plus a learned offset; or learned ones."""

    def __init__(self, kind, num_fields, num_hubs, dim, hidden_units):
        super().__init__()
        self.num_hubs = num_hubs
        if kind == "mlp":
            self.mlp = nn.Sequential(
                nn.Linear(num_fields * dim, hidden_units), nn.ReLU(), nn.Linear(hidden_units, num_hubs * dim)
            )
        else:
            self.learned = LearnedTokens(num_hubs, dim)
        self.kind = kind

    def forward(self, tokens, events):
        """Returns ``(B, num_hubs, D)``."""
        fields = tokens["fields"]
        if self.kind == "mlp":
            return self.mlp(fields.flatten(1)).unflatten(-1, (self.num_hubs, -1))
        learned = self.learned(len(fields))
        return learned if self.kind == "random" else learned + fields.mean(dim=1, keepdim=True)


class SequenceHubs(nn.Module):
    """First sequence hubs, per behaviour a: ``sum_t phi(s_t)`` (v1, one phi) or ``mean_t MLP_a(s_t)`` (v2)."""

    def __init__(self, kind, pooling, num_behaviors, hubs_per_behavior, dim):
        super().__init__()
        self.kind, self.sums, self.hubs_per_behavior = kind, pooling == "shared_sum", hubs_per_behavior
        width = hubs_per_behavior * dim
        if kind != "mlp":
            self.learned = LearnedTokens(hubs_per_behavior * num_behaviors, dim)
        elif self.sums:
            self.shared = nn.Linear(dim, width)
        else:
            self.typed = nn.ModuleList(
                nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, width)) for _ in range(num_behaviors)
            )

    def forward(self, tokens, events):
        """Returns ``(B, behaviours * hubs_per_behavior, D)``; without events, an ``mlp`` hub is zero."""
        if self.kind == "random":
            return self.learned(len(tokens["fields"]))
        if self.kind == "mean":
            means = [masked_mean(s, mask).repeat(1, self.hubs_per_behavior) for s, mask in events.values()]
            return self._split(means) + self.learned(len(tokens["fields"]))
        hubs = []
        for a, (s, mask) in enumerate(events.values()):
            mapped = self.shared(s) if self.sums else self.typed[a](s)  # (B, T, hubs_per_behavior D)
            mean = masked_mean(mapped, mask)
            hubs.append(mean * mask.sum(dim=1, keepdim=True) if self.sums else mean)
        return self._split(hubs)

    def _split(self, hubs):
        return torch.stack(hubs, dim=1).unflatten(-1, (self.hubs_per_behavior, -1)).flatten(1, 2)


class TaskHubs(nn.Module):
    """First task hubs: learned ones that all tasks share (v1), behind the task tokens in v2, ``[T; T_shared]``."""

    def __init__(self, num_shared, dim, hybrid, std):
        super().__init__()
        self.shared = LearnedTokens(num_shared, dim, std) if num_shared else None
        self.hybrid = hybrid

    def forward(self, tokens, events):
        """Returns ``(B, n_s, D)`` or ``(B, K + n_s, D)``."""
        hubs = [tokens["tasks"]] if self.hybrid else []
        if self.shared is not None:
            hubs.append(self.shared(len(tokens["fields"])))
        return torch.cat(hubs, dim=1)


class EventTokens(nn.Module):
    """Event tokens of a behaviour: its columns mapped to the token width, plus a learned position p_t.

    Positions count back from the most recent event, so that neither padding nor older events shift them.
    """

    def __init__(self, behaviors, max_len, dim, positions, std):
        super().__init__()
        self.max_len = max_len
        self.project = nn.ModuleList(
            nn.Linear(len(columns) * dim, dim) if len(columns) > 1 else nn.Identity() for columns in behaviors.values()
        )
        self.positions = LearnedTokens(max_len, dim, std) if positions else None  # last: of the most recent event

    def forward(self, columns):
        """Maps right-aligned columns of each behaviour, ``(B, T, columns * D)``, to event tokens ``(B, T, D)``."""
        return {name: self._positioned(project(x)) for project, (name, x) in zip(self.project, columns.items())}

    def _positioned(self, s):
        if self.positions is None:
            return s
        missing = s.shape[1] - self.max_len  # at the front; negative: the oldest positions are not there
        return s + nn.functional.pad(self.positions(len(s)), (0, 0, missing, 0))
