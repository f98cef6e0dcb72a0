"""No output depends on a later token or on another document, by gradients: every mixer in every form of travel, and a
whole model of many families."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longstride.parallel import SequenceShard
from tests.distributed import run_ranks

from .cases import EXPERTS, MIXER_CASES, WIDTH, make_mixer, make_model, numbers
from .test_split import BATCH, FORMS, Split, changed_by_forms

SPLIT, POSITIONS = Split((0, 5, 11, 17), [[7], []]), [0, 4, 5, 8, 16]
DOCUMENT = 7  # of the first row: nothing at it or after it depends on what comes before
HYBRID: dict[str, Any] = {
    "layers": "[mamba+moe, hyena(max_length=64), attention(heads=4, kv_heads=2, head_dim=4), rwkv7(head_dim=4), "
    "modal_hyena(heads=3)+mlp, flash(key_dim=6, chunk=4), lstm(hidden=7), s4d(state=4, dt_min=0.1)]",
    "feed_forward": "channel_mix",
    **EXPERTS,
}
Influences = dict[str, Tensor]


def influence(output_BTD: Tensor, input_BTD: Tensor, shard: SequenceShard, positions: list[int]) -> Tensor:
    """How the output at each of `positions` depends on this process's inputs: (positions, B, T)."""
    rows = []
    for position in positions:
        weight = torch.zeros_like(output_BTD)
        if shard.start <= position < shard.stop:
            weight[:, position - shard.start] = numbers("w", output_BTD.shape[-1])
        input_BTD.grad = None
        output_BTD.backward(weight, retain_graph=True)  # all of the graph: pruned ranks would not answer the others
        assert input_BTD.grad is not None
        rows.append(input_BTD.grad.abs().amax(-1))
    return torch.stack(rows)


def inputs(shard: SequenceShard) -> Tensor:
    return numbers("x", BATCH, SPLIT.length, WIDTH)[:, shard.start : shard.stop].clone().requires_grad_()


def of_hybrid(shard: SequenceShard, positions: list[int]) -> Tensor:
    """How the logits depend on the embedded tokens."""
    model, x_BTD = make_model(HYBRID), inputs(shard)
    model.embedding.register_forward_hook(lambda module, args, output: x_BTD)
    tokens_BT = torch.zeros(BATCH, shard.local_length, dtype=torch.int64)
    return influence(model.logits(tokens_BT, shard), x_BTD, shard, positions)


def influences(rank: int, world_size: int) -> list[tuple[list[int], Influences]]:
    """Of every mixer and the hybrid by default, then for each form of those whose messages it changes."""
    results = []
    names = list(MIXER_CASES)
    for form in [None, *FORMS]:
        positions, found, changed = POSITIONS if form is None else [5, 8], {}, []
        options = {} if form is None else {"strategies": form, "node_size": 1}
        for name in names:
            shard = SPLIT.shard(dist.group.WORLD, **options)
            x_BTD = inputs(shard)
            found[name] = influence(make_mixer(name)(x_BTD, shard), x_BTD, shard, positions)
            if changed_by_forms(shard.ledger):
                changed.append(name)
        found["hybrid"] = of_hybrid(SPLIT.shard(dist.group.WORLD, **options), positions)
        results.append((positions, found))
        names = changed if form is None else names
    return results


def test_no_output_depends_on_a_later_token_or_another_document() -> None:
    by_rank = run_ranks(influences, 3)
    for form, of_form in zip(["default", *FORMS], zip(*by_rank, strict=True), strict=True):
        positions, by_name = of_form[0]
        for name in by_name:
            of_position = zip(torch.cat([found[name] for _, found in of_form], dim=2), positions, strict=True)
            for row, position in of_position:
                # a transform spreads rounding over all tokens: "nothing" is rounding of the largest influence
                nothing = 1e-13 * float(row.max())
                assert _largest(row[:, position + 1 :]) <= nothing, f"{name} sees the future; {form}"
                assert float(row[:, position].min()) > nothing, f"{name} does not see its own token; {form}"
                if position >= DOCUMENT:
                    assert _largest(row[0, :DOCUMENT]) <= nothing, f"{name} sees another document; {form}"
                    if name == "hybrid":
                        assert _largest(row[1, :DOCUMENT]) > nothing


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
