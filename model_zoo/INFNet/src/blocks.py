"""INFNet's blocks: hubs aggregate the tokens of all groups, then broadcast to the tokens of their own.

CA is attention of a single formula, without an output projection. Groups: fields C, sequence S, tasks T; hubs are v1's
proxies C~, S~, T~.
"""

import torch
from flowctr.layers import MultiHeadAttention
from torch import nn


class Block(nn.Module):
    """One exchange: hubs aggregate the tokens, then broadcast to the tokens of their own group."""

    def __init__(self, aggregation, broadcast, gates_follow):
        super().__init__()
        self.aggregation, self.broadcast, self.gates_follow = aggregation, broadcast, gates_follow

    def forward(self, tokens, hubs, masks):
        """Maps tokens and hubs of each group, ``(B, N, D)``, to those of the next block."""
        tokens, refined = self.aggregation(tokens, hubs, masks)
        return self.broadcast(tokens, refined if self.gates_follow else hubs), refined


class CrossAggregation(nn.Module):
    """v1, heterogeneous stage: ``C~ <- CA(C~, S, S) + CA(C~, T, T)``, likewise ``S~``, ``T~`` and the task tokens T.

    Proxies read the original tokens of the other two groups; of the tokens, only the tasks read (T hat).
    """

    def __init__(self, refined, sizes, residual, attend):
        super().__init__()
        readers = {**{f"{group}_hubs": group for group in refined}, **({"tasks": "tasks"} if "tasks" in sizes else {})}
        self.flows = nn.ModuleDict(
            {
                reader: nn.ModuleDict(
                    {source: _view(source, size, attend) for source, size in sizes.items() if source != own}
                )
                for reader, own in readers.items()
            }
        )
        self.norms = nn.ModuleDict({reader: ResidualNorm(attend["dim"], residual) for reader in readers})

    def forward(self, tokens, hubs, masks):
        """Returns the tokens with the tasks replaced by T hat, and the refined proxies."""
        streams = {**{f"{group}_hubs": x for group, x in hubs.items()}, **tokens}
        read = {
            reader: self.norms[reader](
                streams[reader], sum(view(streams[reader], tokens[s], masks[s]) for s, view in sources.items())
            )
            for reader, sources in self.flows.items()
        }
        refined = {name.removesuffix("_hubs"): x for name, x in read.items() if name != "tasks"}
        return {**tokens, **({"tasks": read["tasks"]} if "tasks" in read else {})}, refined


class ViewAggregation(nn.Module):
    """v2, phase 1: ``H_g <- LN(H_g + [CA(H_g, C, C); CA(H_g, S, S); CA(H_g, T, T)] W_g)`` for every hub group g.

    Keys and values of a source are shared by the hub groups, queries belong to their group. ``views_sum`` adds the
    views instead of concatenating them; ``union`` is one attention over all tokens.
    """

    def __init__(self, kind, refined, sizes, residual, attend):
        super().__init__()
        dim = attend["dim"]
        sources = {"all": sum(sizes.values())} if kind == "union" else sizes
        self.concatenates = kind == "views"
        self.queries = nn.ModuleDict({group: nn.Linear(dim, dim) for group in refined})
        self.views = nn.ModuleDict({s: _view(s, size, attend, project=False) for s, size in sources.items()})
        width = dim * len(sources) if self.concatenates else dim
        self.fuse = nn.ModuleDict({group: nn.Linear(width, dim) for group in refined})
        self.norms = nn.ModuleDict({group: ResidualNorm(dim, residual) for group in refined})

    def forward(self, tokens, hubs, masks):
        """Returns the tokens as they are, and the refined hubs."""
        queries = torch.cat([query(hubs[group]) for group, query in self.queries.items()], dim=1)
        if "all" in self.views:
            tokens_of, mask_of = {"all": torch.cat(list(tokens.values()), dim=1)}, {"all": _joint_mask(tokens, masks)}
        else:
            tokens_of, mask_of = tokens, masks
        views = [view(queries, tokens_of[source], mask_of[source]) for source, view in self.views.items()]
        fused = torch.cat(views, dim=-1) if self.concatenates else sum(views)  # (B, all hubs, 3 D) or (B, all hubs, D)
        parts = fused.split([hubs[group].shape[1] for group in self.queries], dim=1)
        return tokens, {
            group: self.norms[group](hubs[group], self.fuse[group](z)) for group, z in zip(self.queries, parts)
        }


class AllToAll(nn.Module):
    """Ablation without hubs: a transformer layer over all tokens, ``X <- LN(X + MHA(X))``, ``X <- LN(X + FFN(X))``."""

    def __init__(self, attend):
        super().__init__()
        dim = attend["dim"]
        self.views = nn.ModuleDict({"all": MultiHeadAttention(**attend)})
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, tokens, hubs, masks):
        """Returns the updated tokens, and no hubs."""
        x = torch.cat(list(tokens.values()), dim=1)  # (B, N, D)
        x = self.norm_attention(x + self.views["all"](x, x, _joint_mask(tokens, masks)))
        x = self.norm_ffn(x + self.ffn(x))
        return dict(zip(tokens, x.split([group.shape[1] for group in tokens.values()], dim=1))), hubs


class Broadcast(nn.Module):
    """Phase 2: ``X_g <- LN(X_g + unit(X_g, H_g))`` with v1's PGU or v2's BGU, for every group that is read later."""

    def __init__(self, gated, num_hubs, dim, unit, bgu_expansion, residual):
        super().__init__()
        build = {
            "pgu": lambda hubs: ProxyGatedUnit(hubs, dim),
            "bgu": lambda hubs: BroadcastGatedUnit(hubs, dim, bgu_expansion),
        }
        self.units = nn.ModuleDict({group: build[unit](num_hubs[group]) for group in gated})
        self.norms = nn.ModuleDict({group: ResidualNorm(dim, residual) for group in gated})

    def forward(self, tokens, hubs):
        """Returns the tokens with the gated groups modulated by their hubs."""
        gated = {
            group: self.norms[group](tokens[group], unit(tokens[group], hubs[group]))
            for group, unit in self.units.items()
        }
        return {**tokens, **gated}


class ProxyGatedUnit(nn.Module):
    """v1: ``PGU(X, X~) = X * sigmoid(MLP(flatten(X~)))``, one gate for all tokens of the group."""

    def __init__(self, num_hubs, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(num_hubs * dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, x, hubs):
        """Gates the tokens ``(B, N, D)`` by the hubs ``(B, num_hubs, D)``."""
        return x * self.mlp(hubs.flatten(1)).sigmoid().unsqueeze(1)


class BroadcastGatedUnit(nn.Module):
    """v2: ``BGU(x) = x * sigmoid(alpha) + beta`` with ``[alpha, beta] = MLP(flatten(H))``, starting near zero."""

    def __init__(self, num_hubs, dim, expansion):
        super().__init__()
        hidden = expansion * dim
        layers = [nn.Linear(num_hubs * dim, hidden), nn.ReLU()] if hidden else []
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden or num_hubs * dim, 2 * dim))
        self.init_weights()

    def init_weights(self):
        """Draws the output layer a tenth of the usual size."""
        nn.init.xavier_normal_(self.mlp[-1].weight, gain=0.1)

    def forward(self, x, hubs):
        """Modulates the tokens ``(B, N, D)`` by the hubs ``(B, num_hubs, D)``."""
        alpha, beta = self.mlp(hubs.flatten(1)).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, D) each
        return x * alpha.sigmoid() + beta


class ResidualNorm(nn.Module):
    """``LN(x + update)``; without ``residual``, the update alone (v1's equations as printed)."""

    def __init__(self, dim, residual):
        super().__init__()
        self.norm = nn.LayerNorm(dim) if residual else None

    def forward(self, x, update):
        """Combines two ``(B, N, D)``."""
        return update if self.norm is None else self.norm(x + update)


class OneTokenView(nn.Module):
    """Attention over a group of one token: the softmax is 1, only the value projection is left."""

    def __init__(self, dim):
        super().__init__()
        self.value = nn.Linear(dim, dim)

    def forward(self, queries, tokens, mask):
        """Gives every query ``(B, N, D)`` the value of the token ``(B, 1, D)``."""
        return self.value(tokens).expand_as(queries)


def _view(group, size, attend, project=True):
    """Builds the attention over one group; events are masked and vary in number, so they are never one token."""
    if size == 1 and group != "sequence":
        return OneTokenView(attend["dim"])
    return MultiHeadAttention(**attend, project_queries=project, project_output=False)


def plan_blocks(groups, num_blocks, *, broadcasts, gates_follow, head_reads_tokens, hubs_read):
    """Finds, from the last block backwards, what each block must build so that no parameter is out of the loss' reach.

    Returns:
        For each block its refined hub groups and its gated token groups; and the hub groups that block 1 starts from.
    """
    plan, hubs_read = [], set(hubs_read)
    for block in reversed(range(num_blocks)):
        tokens_read = groups if block < num_blocks - 1 else ["tasks"] * head_reads_tokens
        gated = set(tokens_read) if broadcasts else set()
        refined = hubs_read | gated if gates_follow else hubs_read
        plan.insert(0, ([g for g in groups if g in refined], [g for g in groups if g in gated]))
        hubs_read = refined | gated
    return plan, [group for group in groups if group in hubs_read]


def build_aggregation(kind, refined, sizes, residual, attend):
    """Builds how the hubs of the ``refined`` groups read the token groups of the given ``sizes``."""
    if kind == "all_to_all":
        return AllToAll(attend)
    if kind == "cross":
        return CrossAggregation(refined, sizes, residual, attend)
    return ViewAggregation(kind, refined, sizes, residual, attend)


def _joint_mask(tokens, masks):
    """Joins the masks of all groups, ``(B, N)``; None if all tokens are real."""
    if all(masks[group] is None for group in tokens):
        return None
    real = [x.new_ones(x.shape[:2], dtype=torch.bool) if masks[g] is None else masks[g] for g, x in tokens.items()]
    return torch.cat(real, dim=1)
