"""The graph branch: a question against the objects of a scene and their relations.

The question is read into one instruction for each layer of graph attention. Layers may be left with few nodes, those
that the question is about (`branches.sampling`), so that the answer comes with the part of the scene it follows from.

Shapes: B questions and as many graphs, N words, V nodes of all graphs, K nodes of the largest one, E edges, H heads,
L layers, D width, A answers. Nodes come packed (V, ...), with the number of the graph of each.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from branches.fine import EMBED_STD, geometry, look_up, prior_logits, word_embedding
from branches.sampling import Sampler, build_sampler

BOX_WIDTH = 32
SLOPE = 0.2  # of the leaky ReLU of graph attention
MOST_POWER = 50.0  # of the exponential of a node or edge whose gate is shut, which only a gradient sees
INNER_DROPOUT = 0.1
NUM_ENCODER_LAYERS, NUM_DECODER_LAYERS = 2, 1


class Packing(NamedTuple):
    """Where the nodes of a packed batch stand if each graph has a row of its own."""

    graphs_V: Tensor
    places_V: Tensor
    mask_BK: Tensor

    def pad(self, values_V: Tensor) -> Tensor:
        """(V,) -> (B, K), 0 where there is no node."""
        padded = values_V.new_zeros(self.mask_BK.shape)
        return padded.index_put((self.graphs_V, self.places_V), values_V)

    def unpad(self, values_BK: Tensor) -> Tensor:
        """(B, K) -> (V,)."""
        return values_BK[self.graphs_V, self.places_V]


def packing(graphs_V: Tensor, num_graphs: int) -> Packing:
    """The number of each node's graph -> its place in there; nodes of several graphs may stand in any order."""
    counts = torch.bincount(graphs_V, minlength=num_graphs)
    order = graphs_V.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    steps = torch.arange(len(graphs_V), device=graphs_V.device)
    places = torch.empty_like(order).scatter(0, order, steps - starts[graphs_V[order]])
    most = int(counts.max())
    return Packing(graphs_V, places, torch.arange(most, device=graphs_V.device) < counts[:, None])


def sum_by(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """(M, ...) and the group of each (M,) -> sums (num_groups, ...)."""
    return values.new_zeros(num_groups, *values.shape[1:]).index_add(0, group, values)


def gated_softmax(logits_M: Tensor, gates_M: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """gate_m exp(logit_m) / sum over its group of the same: (M, ...), (M, ...) and (M,) -> (M, ...).

    Gates are not negative. Where all of a group are 0, so are the weights. Beside an open gate, a shut one has the
    gradient of being opened.
    """
    logits = logits_M.to(torch.promote_types(logits_M.dtype, torch.float32))
    gates = gates_M.to(logits.dtype).expand_as(logits)
    with torch.no_grad():
        index = group.view(-1, *[1] * (logits.dim() - 1)).expand_as(logits)
        peak = logits.new_full((num_groups, *logits.shape[1:]), -torch.inf)
        peak = peak.scatter_reduce(0, index, logits + gates.log(), "amax")
        peak = peak.masked_fill(peak == -torch.inf, torch.inf)  # all gates are shut: no powers, and no gradients
    powers = gates * (logits - peak[group]).clamp(max=MOST_POWER).exp()
    sums = sum_by(powers, group, num_groups)
    return powers / torch.where(sums > 0, sums, 1.0)[group]


class Relations(NamedTuple):
    """What edges say. Few different words do, so that these are worked with, and not each edge for itself."""

    words_RF: Tensor  # the vector of each word
    of_edge_E: Tensor  # which of them an edge has
    signs_E: Tensor  # -1: the way back

    def through(self, layer: nn.Module) -> Tensor:
        """What a linear layer without bias makes of each edge: (E, D)."""
        return layer(self.words_RF).index_select(0, self.of_edge_E) * self.signs_E[:, None]


class GraphAttention(nn.Module):
    """Attention of each node over those with an edge to it, and over itself (Brody et al., GATv2, 2022).

        logit(j -> i) = a_h . leaky_relu(W_s x_j + W_t x_i + W_e e_ji)
        x_i <- sum_j weight(j -> i) W_s x_j

    the weights being a softmax over j in which an edge counts by its gate. Every node has an edge to itself, without
    features and with an open gate: one that is cut off keeps what it knows.
    """

    def __init__(self, width: int, edge_width: int, heads: int) -> None:
        super().__init__()
        self.to_source, self.to_target = nn.Linear(width, width), nn.Linear(width, width)
        self.to_edge = nn.Linear(edge_width, width, bias=False)
        self.weight = nn.Parameter(torch.randn(heads, width // heads) / (width // heads) ** 0.5)

    def forward(self, x_VD: Tensor, edges_2E: Tensor, relations: Relations, gates_E: Tensor | None) -> Tensor:
        """(V, D) nodes, edges from the first to the second, what these say, and their gates -> (V, D)."""
        num_nodes, num_edges = len(x_VD), edges_2E.shape[1]
        itself = torch.arange(num_nodes, device=x_VD.device)
        source, target = (torch.cat([ends, itself]) for ends in edges_2E)
        from_source = self.to_source(x_VD)[source]
        joint = (
            from_source + self.to_target(x_VD)[target] + F.pad(relations.through(self.to_edge), (0, 0, 0, num_nodes))
        )
        heads = (-1, len(self.weight))
        logits_EH = (F.leaky_relu(joint, SLOPE).view(*heads, self.weight.shape[1]) * self.weight).sum(dim=-1)
        gates = logits_EH.new_ones(num_edges) if gates_E is None else gates_E.to(logits_EH.dtype)
        gates = F.pad(gates, (0, num_nodes), value=1.0)
        weights_EH = gated_softmax(logits_EH, gates[:, None], target, num_nodes)
        weighted = weights_EH[..., None] * from_source.view(*heads, self.weight.shape[1])
        return sum_by(weighted.flatten(1), target, num_nodes)


class Relevance(nn.Module):
    """How much a question has to do with each node: W x . W_q u / sqrt(D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_node, self.of_question = nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, x_VD: Tensor, u_BD: Tensor, graphs_V: Tensor) -> Tensor:
        """(V, D), (B, D) and the graph of each node -> (V,)."""
        return (self.of_node(x_VD) * self.of_question(u_BD)[graphs_V]).sum(dim=-1) / x_VD.shape[1] ** 0.5


class QuestionReader(nn.Module):
    """Words to a vector of the whole question and one instruction for each layer.

    A learned word that begins every question makes one without words no exception.
    """

    def __init__(self, embed_dim: int, width: int, heads: int, num_instructions: int) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"d_model": width, "nhead": heads, "dim_feedforward": 2 * width}
        kind: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": INNER_DROPOUT}
        self.project = nn.Sequential(nn.Linear(embed_dim, width), nn.LayerNorm(width))
        self.begin = nn.Parameter(torch.randn(width) * EMBED_STD)
        encoder_layer = nn.TransformerEncoderLayer(**sizes, **kind)
        self.encode = nn.TransformerEncoder(
            encoder_layer, NUM_ENCODER_LAYERS, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.queries = None
        if num_instructions:
            self.queries = nn.Parameter(torch.randn(num_instructions, width))
            decoder_layer = nn.TransformerDecoderLayer(**sizes, **kind)
            self.decode = nn.TransformerDecoder(decoder_layer, NUM_DECODER_LAYERS, nn.LayerNorm(width))

    def forward(self, vectors_BNE: Tensor, mask_BN: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, N, E) vectors of words and which there are -> the question (B, D), instructions (B, L, D) or None."""
        words = self.project(vectors_BNE)
        words = words + positions(words.shape[1], words.shape[2]).to(words)
        words = torch.cat([self.begin.to(words.dtype).expand(len(words), 1, -1), words], dim=1)
        mask = F.pad(mask_BN, (1, 0), value=True)
        read = self.encode(words, src_key_padding_mask=~mask)
        shares = (mask / mask.sum(dim=1, keepdim=True)).to(read.dtype)
        whole = (read * shares[..., None]).sum(dim=1)
        if self.queries is None:
            return whole, None
        queries = self.queries.expand(len(read), -1, -1)
        return whole, self.decode(queries, read, memory_key_padding_mask=~mask)


def positions(num: int, width: int) -> Tensor:
    """(num, width) sines and cosines that tell places apart (Vaswani et al., 2017)."""
    rates = torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
    angles = torch.arange(num)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


class GraphLayer(nn.Module):
    """One layer: x + norm(attention(gelu(x * instruction))), its edges gated by the nodes that a sampler chooses.

    The norm is that of each node by itself; one over a graph would leave nothing of a graph of one node.
    """

    def __init__(self, width: int, edge_width: int, heads: int, sampler: Sampler | None) -> None:
        super().__init__()
        self.attend = GraphAttention(width, edge_width, heads)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(INNER_DROPOUT)
        self.sampler = sampler
        self.relevance = None if sampler is None else Relevance(width)

    def forward(
        self, x: Tensor, edges_2E: Tensor, relations: Relations, i_BD: Tensor | None, u_BD: Tensor, where: Packing
    ) -> tuple[Tensor, Tensor | None]:
        """(V, D), edges and what they say, instructions and questions -> (V, D) and which nodes are chosen (V,)."""
        asked = F.gelu(x if i_BD is None else x * i_BD[where.graphs_V])
        chosen, gates = None, None
        if self.relevance is not None and self.sampler is not None:
            scores = where.pad(self.relevance(asked, u_BD, where.graphs_V))
            chosen = where.unpad(self.sampler(scores, where.mask_BK))
            gates = chosen[edges_2E[0]] * chosen[edges_2E[1]]
        return x + self.dropout(self.norm(self.attend(asked, edges_2E, relations, gates))), chosen


class GraphBranch(nn.Module):
    """Questions and scene graphs in, logits of answers out.

    u, i_1 .. i_L = transformer(words)                 the question, and one instruction for each layer
    x = W [sum of words, MLP(box)]                     nodes; edges are words of relations, times 1 or -1
    x <- x + norm(attention(gelu(x * i_l)))            with edges between chosen nodes alone, where there are masks
    g = sum over chosen nodes of softmax(W x . W_q u / sqrt(D)) x
    logits = MLP[g, u, g * u]
    """

    def __init__(
        self,
        *,
        num_words: int,
        num_answers: int,
        embed_dim: int = 300,
        width: int = 300,
        layers: int = 4,
        heads: int = 4,
        sampler: str = "imle",
        sample_k: int = 2,
        num_samples: int = 1,
        alpha: float = 1.0,
        beta: float = 10.0,
        tau: float = 1.0,
        use_instruction: bool = True,
        use_masking: bool = True,
        use_mgat: bool = False,
        dropout: float = 0.1,
    ) -> None:
        """Build with fresh weights.

        Args:
            heads: of attention, at most; as many as divide the width.
            sampler, sample_k, num_samples, alpha, beta, tau: of `branches.sampling.build_sampler`.
            use_instruction: each layer is told what to look for.
            use_masking: the last layer, and the answer, have the chosen nodes alone.
            use_mgat: with masking, every layer has; each chooses its own.
            dropout: of what the answer is read from.
        """
        super().__init__()
        assert layers >= 1
        heads = max(number for number in range(1, heads + 1) if width % number == 0)
        self.embed = word_embedding(num_words, embed_dim)
        self.read = QuestionReader(embed_dim, width, heads, layers if use_instruction else 0)
        self.place = nn.Sequential(nn.Linear(6, BOX_WIDTH), nn.GELU(), nn.Linear(BOX_WIDTH, BOX_WIDTH))
        self.project = nn.Linear(embed_dim + BOX_WIDTH, width)
        build = partial(build_sampler, sampler, k=sample_k, num_samples=num_samples, alpha=alpha, beta=beta, tau=tau)
        have_masks = [use_masking and (use_mgat or number == layers - 1) for number in range(layers)]
        self.layers = nn.ModuleList(GraphLayer(width, embed_dim, heads, build() if has else None) for has in have_masks)
        self.norm = nn.LayerNorm(width)
        self.relevance = Relevance(width)
        self.classify = nn.Sequential(
            nn.Linear(3 * width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, num_answers)
        )

    @torch.no_grad()
    def start_from(self, vectors_VD: Tensor) -> None:
        """Take given vectors of words."""
        self.embed.weight.copy_(vectors_VD)

    @torch.no_grad()
    def expect(self, accuracy_A: Tensor, loss: str) -> None:
        """Begin with how right each answer is on average, as `FineBranch.expect`."""
        cast(nn.Linear, self.classify[-1]).bias.copy_(prior_logits(accuracy_A, loss))

    def forward(self, words_BN: Tensor, **graphs: Tensor) -> Tensor:
        """Questions (B, N) and the graph of each, by the names of `look` -> (B, A) logits."""
        return self.look(words_BN, **graphs)[0]

    def look(
        self,
        words_BN: Tensor,
        nodes_V4: Tensor,
        node_boxes_V4: Tensor,
        graphs_V: Tensor,
        edges_2E: Tensor,
        relations_E: Tensor,
        signs_E: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Questions and the graph of each -> logits (B, A) and how much each node had to do with them (V,).

        The latter sum to 1 over each graph, and are 0 for nodes that were not chosen. Words, of questions, nodes and
        relations, are numbers of one vocabulary (0: none); graphs_V tells which question's graph each node belongs to.
        Boxes are x1, y1, x2, y2 on [0, 1]. Edges go from the first node to the second.
        """
        relations_R, of_edge_E = relations_E.unique(return_inverse=True)
        words_BNE, nodes_V4E, relations_RF = look_up(self.embed, words_BN, nodes_V4, relations_R)
        nodes_VE, relations = nodes_V4E.sum(dim=1), Relations(relations_RF, of_edge_E, signs_E)
        u_BD, instructions_BLD = self.read(words_BNE, words_BN > 0)
        where = packing(graphs_V, len(words_BN))
        x = self.project(torch.cat([nodes_VE, self.place(geometry(node_boxes_V4))], dim=-1))
        chosen = None
        for number, layer in enumerate(self.layers):
            i_BD = None if instructions_BLD is None else instructions_BLD[:, number]
            x, chosen = layer(x, edges_2E, relations, i_BD, u_BD, where)
        x = self.norm(x)
        gates_V = torch.ones_like(graphs_V) if chosen is None else chosen
        weights_V = gated_softmax(self.relevance(x, u_BD, graphs_V), gates_V, graphs_V, len(words_BN))
        g_BD = sum_by(weights_V[:, None] * x, graphs_V, len(words_BN))
        return self.classify(torch.cat([g_BD, u_BD, g_BD * u_BD], dim=-1)), weights_V
