"""Every layer, model and training step on a device that is not the CPU: nothing is left behind on the CPU, values are
the CPU's, and the process waits for the device only where it must. Each in processes of their own: a device stays.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from longstride.kernels import triton_support
from longstride.models import DropoutKey
from longstride.parallel import Mesh, SequenceShard
from longstride.workers import Trainer
from longstride.workers.checkpoint_tensors import optimizer_tensors
from longstride.workers.optimization import local
from tests.distributed import run_ranks
from tests.far import FAR, Far, FarTensor, Misplaced, far_device
from tests.workers.tiny import open_run, tiny_experiment

from .cases import MIXER_CASES, MODEL_CASES, SMALL, VARIANTS, WIDTH, difference, make_model, numbers
from .test_split import FORMS, SPLITS, Split

LENGTH = 24
DOCUMENTS = [3, 10, 19]
KEY = DropoutKey(seed=0, step=0)


def mixer(name: str, device: str, shard: SequenceShard, dtype: torch.dtype, far: Far) -> dict[str, Tensor]:
    """Output and gradients; what moved the numbers to the device is forgotten."""
    layer = make_model(MIXER_CASES[name], dtype).blocks[0].mixer.to(device)
    here = slice(shard.start, shard.stop)
    x_BTD = numbers("x", 2, shard.length, WIDTH)[:, here].to(device, dtype).requires_grad_()
    far.forget()
    y_BTD = layer(x_BTD, shard)
    y_BTD.sum().backward()
    assert x_BTD.grad is not None
    return {"output": y_BTD.detach(), "input": x_BTD.grad, **gradients(layer)}


def model(name: str, device: str, shard: SequenceShard, dtype: torch.dtype, far: Far) -> dict[str, Tensor]:
    case = {**MODEL_CASES[name], "embedding_dropout": 0.1, "logit_pull": 1e-3}
    module = make_model(case, dtype).to(device)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, shard.length)
    tokens = torch.randint(SMALL["vocab_size"], shape, generator=generator)[..., shard.start : shard.stop]
    tokens_BT, targets_BT = tokens.to(device)
    far.forget()
    losses = module(tokens_BT, targets_BT, shard, KEY)
    losses.total.backward()
    module.end_step()
    return {"losses": torch.stack(losses).detach(), **gradients(module)}


COMPUTE = [*((mixer, name) for name in MIXER_CASES), *((model, name) for name in MODEL_CASES)]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    assert all(isinstance(x, FarTensor) for x in found.values())
    return max(difference(x.to("cpu"), expected[name]) for name, x in found.items())


def computed_far(rank: int, world_size: int) -> dict[str, float]:
    shard, errors = SequenceShard.whole(LENGTH, DOCUMENTS), {}
    with far_device() as far:
        for compute, name in COMPUTE:
            results = (compute(name, device, shard, torch.float64, far) for device in (FAR, "cpu"))
            errors[name] = worst(*results)
    return errors


def test_every_layer_computes_the_same_on_another_device() -> None:
    (errors,) = run_ranks(computed_far, 1)
    assert len(errors) == len(COMPUTE)
    assert max(errors.values()) < 1e-12, errors


def launched(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """In place of a launch: kernels read what is on their device."""
    if not all(isinstance(x, FarTensor) for x in args if isinstance(x, Tensor)):
        raise Misplaced(f"{kernel.fn.__name__} is given tensors of the CPU")


def takes(*tensors: Tensor | None) -> bool:
    wide = torch.float64, torch.complex128
    return all(x is None or (isinstance(x, FarTensor) and x.dtype not in wide and x.numel()) for x in tensors)


def waits_of_kernels(rank: int, world_size: int) -> dict[str, Counter[str]]:
    """With the kernels of GPUs, whose outputs are whatever lay in memory."""
    triton_support.launch, triton_support.takes = launched, takes
    waits = {}
    with far_device() as far:
        for compute, name in COMPUTE:
            for documents in [DOCUMENTS] if name in VARIANTS else [None, DOCUMENTS]:
                compute(name, FAR, SequenceShard.whole(LENGTH, documents), torch.float32, far)
                waits[f"{name} {documents}"] = Counter(far.waits)
    return waits


MUST_WAIT = {
    "kernels/documents.py": "the FFT's documents are convolved one by one",
    "kernels/long_convolution/toeplitz.py": "likewise by blocks of taps",
    "kernels/long_convolution/toeplitz_rows.py": "whose number follows from the documents",
    "kernels/experts/portable.py": "there is a grouped product for bfloat16 alone, and a loop needs the counts",
    "models/mixers/newton.py": "until the iteration has converged",
}


@pytest.mark.skipif(not triton_support.installed(), reason="triton is not installed")
def test_the_kernels_of_gpus_wait_for_the_device_only_where_they_must() -> None:
    (waits,) = run_ranks(waits_of_kernels, 1)
    files = {place.split(":")[0] for places in waits.values() for place in places}
    assert files <= MUST_WAIT.keys(), waits
    assert files >= {"models/mixers/newton.py", "kernels/documents.py"}


# one for every way in which state, heads, tokens and keys travel; those of the models beside
SENDING = ["mamba", "rwkv4", "rwkv7", "s4d", "attention", "gau", "hyena_mr", "lstm"]


def messages_far(rank: int, world_size: int, split: Split) -> dict[str, list[Any]]:
    found = {}
    with far_device() as far:
        for name in SENDING:
            # along chains of processes, the one form that sends to neighbours by themselves
            mixer(name, FAR, split.shard(dist.group.WORLD, strategies=FORMS[1]), torch.float64, far)
            found[name] = list(far.messages)
    return found


def in_one_order(first: list[Any], second: list[Any], rank: int, peer: int) -> bool:
    """NCCL matches the messages of two processes by their order alone, and collectives likewise."""
    ways = {"send": "recv_", "recv_": "send"}
    ours = [(ways[name], *what) for name, to, *what in first if to == peer]
    theirs = [(name, *what) for name, to, *what in second if to == rank]
    collectives = [[name for name, to, *_ in messages if to is None] for messages in (first, second)]
    return ours == theirs and collectives[0] == collectives[1]


def undisturbed(messages: list[Any]) -> bool:
    """NCCL connects two processes at their first message, and both are held until then: whoever receives from one and
    sends to another must not, between the two, enter what all processes have to enter."""
    received = False
    for name, peer, *_ in messages:
        if received and peer is None:
            return False
        received = name == "recv_"
    return True


def test_messages_are_what_nccl_sends_and_in_one_order() -> None:
    by_rank = run_ranks(messages_far, 3, SPLITS["three, one document over all of them"])
    for name in by_rank[0]:
        messages = [results[name] for results in by_rank]
        assert messages[0], name
        assert all(in_one_order(messages[a], messages[b], a, b) for a, b in ((0, 1), (1, 2), (0, 2))), name
        assert undisturbed(messages[1]), name
    sent = [("send", 1, (3,), torch.float32)]
    assert not in_one_order(sent, [("recv_", 0, (4,), torch.float32)], 0, 1)
    assert not undisturbed([("recv_", 0, (3,), torch.float32), ("allreduce_", None, (3,), torch.float32)])
    assert not in_one_order([*sent, ("recv_", 1, (3,), torch.float32)], [("send", 0, (3,), torch.float32)] * 2, 0, 1)


def train(rank: int, world_size: int, directory: str, device: str, *overrides: str) -> tuple[list[float], Counter[str]]:
    """Losses of three steps, and what the second waited for. A checkpoint is written beside them, and one after, from
    which another trainer goes on."""
    settings = ["train.steps=3", "train.warmup=1", f"workers={world_size}", "checkpoint.every=2", f"run.name={device}"]
    experiment = tiny_experiment(directory, *settings, *overrides)
    with far_device() if device == FAR else nullcontext(Far()) as far:
        mesh = Mesh(**asdict(experiment.degrees), device=device)
        trainer = Trainer(experiment, mesh, open_run(experiment, rank))
        losses = [trainer.step()[0].loss]
        far.forget()
        losses.append(trainer.step()[0].loss)
        waits = Counter(far.waits)
        trainer.save(wait=False)
        assert trainer.train() and trainer.last_record is not None
        resumed = Trainer(experiment, mesh, trainer.run)
        resumed.restore()
        assert resumed.step_count == 3 and worst_moment(resumed, trainer) == 0
    return [*losses, trainer.last_record.loss], waits


def worst_moment(found: Trainer, expected: Trainer) -> float:
    moments = (optimizer_tensors(trainer.optimizer) for trainer in (found, expected))
    return max(float((local(a) - local(b)).abs().sum()) for a, b in zip(*(x.values() for x in moments), strict=True))


# The loss and the gradient's norm decide whether a step counts; the routers' losses come with them.
ONCE_A_STEP = Counter({"workers/trainer.py": 2, "workers/split_model.py": 1})


@pytest.mark.parametrize(
    ("workers", "overrides"),
    [(1, []), (2, ["parallel.sequence=2", "train.dtype=bfloat16"])],
)
def test_a_step_waits_for_its_loss_and_its_norm(tmp_path: Path, workers: int, overrides: list[str]) -> None:
    found, expected = (run_ranks(train, workers, str(tmp_path), device, *overrides) for device in (FAR, "cpu"))
    for (losses, waits), (near, _) in zip_longest(found, expected):
        assert max(abs(a - b) for a, b in zip(losses, near, strict=True)) < (
            1e-2 if "train.dtype=bfloat16" in overrides else 1e-5
        )
        files = Counter(place.split(":")[0] for place in waits.elements())
        rooms = {name: count for name, count in files.items() if not name.startswith("kernels")}
        where_rows_go = rooms.pop("parallel/experts.py", 0)
        assert rooms == ONCE_A_STEP, waits
        assert bool(where_rows_go) == ("parallel.sequence=2" in overrides)


def refusals(rank: int, world_size: int) -> dict[str, Any]:
    """What a careless program would meet."""
    attempts = {
        "mixed": lambda x: x + torch.ones(3),
        "index": lambda x: torch.ones(3)[x.long()],
        "steps": lambda x: adamw([x], [x], [x], [x], [], [torch.zeros(())], fused=True, **ADAM),
        "complex": lambda x: dist.all_to_all_single(torch.empty_like(x), x[[0, 1, 2]].t()),
    }
    found: dict[str, Any] = {}
    with far_device() as far:
        x = torch.ones(3, device=FAR)
        for name, attempt in attempts.items():
            try:
                attempt(torch.ones(3, 3, device=FAR) if name == "complex" else x)
            except Misplaced:
                found[name] = True
        far.forget()
        found["values"] = (float(x.sum()), x.tolist(), len(x.nonzero()), torch.tensor([2.0], device=FAR).tolist())
        x.to("cpu"), x[x > 0], torch.bincount(x.long())
        x.cpu().to(FAR, non_blocking=True)
    return {**found, "waits": far.waits.total()}


ADAM = {"amsgrad": False, "beta1": 0.9, "beta2": 0.9, "lr": 0.1, "weight_decay": 0.0, "eps": 1e-8, "maximize": False}


def test_the_device_is_as_exacting_as_a_gpu() -> None:
    (found,) = run_ranks(refusals, 1)
    # a number, a list, nonzero, the tensor made there and its list, to("cpu"), the mask, bincount, cpu()
    assert found == {
        **dict.fromkeys(("mixed", "index", "steps", "complex"), True),
        "values": (3.0, [1.0] * 3, 3, [2.0]),
        "waits": 9,
    }
