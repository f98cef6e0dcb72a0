"""A checkpoint of any mesh goes on on any other: the next step's loss is the one that the saving run goes on to.

    python -m tests.workers.test_resume_matrix         prints the whole table

Every mesh writes a checkpoint after two steps and takes a third. Every mesh then loads every checkpoint and takes the
third step too, with the same context and with one twice as long. Float32; the experts' selection bias, a buffer that
training moves, is among what must come back.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from longstride.workers import RunDirectory
from longstride.workers.trainer import Trainer

from ..distributed import run_ranks
from .tiny import make_trainer, tiny_experiment


def mesh(replicate: int = 1, data: int = 1, sequence: int = 1, expert: int = 1) -> tuple[int, list[str]]:
    """Its size and settings."""
    degrees = {"replicate": replicate, "data": data, "sequence": sequence, "expert": expert}
    return replicate * data * sequence, [f"parallel.{name}={degree}" for name, degree in degrees.items()]


MESHES = {
    "1": mesh(),
    "data 2": mesh(data=2),
    "data 2, expert 2": mesh(data=2, expert=2),
    "sequence 2": mesh(sequence=2),
    "sequence 2, expert 2": mesh(sequence=2, expert=2),
    "replicate 2": mesh(replicate=2),
    "data 4": mesh(data=4),
    "data 4, expert 2": mesh(data=4, expert=2),
    "data 4, expert 4": mesh(data=4, expert=4),
    "sequence 4": mesh(sequence=4),
    "sequence 4, expert 2": mesh(sequence=4, expert=2),
    "sequence 4, expert 4": mesh(sequence=4, expert=4),
    "data 2 x sequence 2": mesh(data=2, sequence=2),
    "data 2 x sequence 2, expert 2": mesh(data=2, sequence=2, expert=2),
    "data 2 x sequence 2, expert 4": mesh(data=2, sequence=2, expert=4),
    "replicate 2 x sequence 2, expert 2": mesh(replicate=2, sequence=2, expert=2),
    "data 2 x sequence 4, expert 4": mesh(data=2, sequence=4, expert=4),
}
EIGHT = "data 2 x sequence 4, expert 4"
SETTINGS = ("model.moe.balance=bias", "model.moe.bias_speed=0.02", "model.hyena.max_length=128")
CONTEXT, LONGER = 64, 128
TOLERANCE = 1e-6


def trainer_on(name: str, rank: int, directory: str, run: str, *overrides: str) -> Trainer:
    workers, degrees = MESHES[name]
    words = [f"workers={workers}", f"run.name={run}", *degrees, *SETTINGS, *overrides]
    return make_trainer(tiny_experiment(directory, *words), rank)


def run_name(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def save(rank: int, world_size: int, directory: str, name: str) -> float:
    """A checkpoint after two steps; the loss of the third."""
    trainer = trainer_on(name, rank, directory, run_name(name))
    trainer.step()
    trainer.step()
    trainer.save()
    return trainer.step()[0].loss


def resume(rank: int, world_size: int, directory: str, name: str, savers: list[str], context: int) -> list[float]:
    """The loss of the step after each of the savers' checkpoints."""
    trainer = trainer_on(name, rank, directory, f"of-{run_name(name)}-{context}", f"data.context={context}")
    found = []
    for saver in savers:
        trainer.run = trainer.checkpointer.run = RunDirectory(f"{directory}/{run_name(saver)}")
        trainer.restore()
        trainer.loader.seek(trainer.position)
        found.append(trainer.step()[0].loss)
    trainer.loader.close()
    return found


def differences(directory: Path, savers: list[str], loaders: list[str]) -> dict[tuple[str, str], tuple[float, float]]:
    """By saver and loader: how far the next loss is from the saver's own, and that of a longer context from one
    process's.
    """
    own = {name: run_ranks(save, MESHES[name][0], str(directory), name)[0] for name in savers}
    alone = run_ranks(resume, 1, str(directory), "1", savers, LONGER)[0]
    found = {}
    for name in loaders:
        same = run_ranks(resume, MESHES[name][0], str(directory), name, savers, CONTEXT)[0]
        longer = run_ranks(resume, MESHES[name][0], str(directory), name, savers, LONGER)[0]
        for number, saver in enumerate(savers):
            found[saver, name] = (
                abs(same[number] / own[saver] - 1.0),
                abs(longer[number] / alone[number] - 1.0),
            )
    return found


def table(found: dict[tuple[str, str], tuple[float, float]]) -> str:
    """The largest difference for each saver, over all loaders."""
    rows = ["| saved on | loaded on | same context | twice the context |", "| --- | --- | --- | --- |"]
    for saver in dict.fromkeys(saver for saver, _ in found):
        pairs = [values for (by, _), values in found.items() if by == saver]
        worst = [max(column) for column in zip(*pairs, strict=True)]
        rows.append(f"| {saver} | {len(pairs)} meshes | {worst[0]:.1e} | {worst[1]:.1e} |")
    return "\n".join(rows)


def test_a_few_pairs(tmp_path: Path) -> None:
    names = ["sequence 2, expert 2", "data 2 x sequence 2, expert 4"]
    found = differences(tmp_path, names, [*names, "1"])
    assert len(found) == 6
    assert max(max(values) for values in found.values()) <= TOLERANCE, found


def save_and_resume(rank: int, world_size: int, directory: str, name: str, savers: list[str]) -> list[float]:
    """What `save` gives, and then `resume`."""
    return [save(rank, world_size, directory, name), *resume(rank, world_size, directory, name, savers, CONTEXT)]


def test_one_process_and_eight(tmp_path: Path) -> None:
    own = run_ranks(save, 1, str(tmp_path), "1")[0]
    of_eight, grown = run_ranks(save_and_resume, 8, str(tmp_path), EIGHT, ["1"])[0]
    (shrunk,) = run_ranks(resume, 1, str(tmp_path), "1", [EIGHT], CONTEXT)[0]
    assert [grown, shrunk] == pytest.approx([own, of_eight], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_all_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = differences(tmp_path, list(MESHES), list(MESHES))
    with capsys.disabled():
        print("\n" + table(found))
    assert len(found) == len(MESHES) ** 2
    wrong = {pair: values for pair, values in found.items() if max(values) > TOLERANCE}
    assert not wrong


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(table(differences(Path(place), list(MESHES), list(MESHES))))
