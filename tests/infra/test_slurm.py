"""infra/slurm/train.sbatch, run by bash with stand-ins for Slurm's commands and for `longstride`.

test_slurm_cluster.py submits it to a real Slurm.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "infra/slurm/train.sbatch"

# `srun --kill-on-bad-exit=1 --... bash ...` with two tasks: the first that fails ends the others; the highest code
# counts.
# With WARN it gives all processes of the tasks SIGUSR1 once they have begun, as `--signal=USR1@300` does.
SRUN = """
import os, signal, subprocess, sys, time
options = sys.argv[1 : sys.argv.index("bash")]
words = sys.argv[sys.argv.index("bash") :]
assert all(option.startswith("--") for option in options)
kill = "--kill-on-bad-exit=1" in options
def start(number):
    place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
    return subprocess.Popen(words, start_new_session=True, env={**os.environ, **place})
tasks = [start(number) for number in range(2)]
def begun():
    return all(os.path.exists(f"rank-{n}") for n in range(2))
while os.environ.get("WARN") and not begun():
    time.sleep(0.02)
if os.environ.get("WARN"):
    [os.killpg(task.pid, signal.SIGUSR1) for task in tasks]
while any(task.poll() is None for task in tasks):
    if kill and any(task.poll() for task in tasks):
        [os.killpg(task.pid, signal.SIGKILL) for task in tasks if task.poll() is None]
    time.sleep(0.02)
codes = [task.returncode for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("node1\\nnode2")
else:
    with open("asked", "a") as file:
        print("scontrol", *sys.argv[1:], file=file)
"""
# Ends with the code that CODES has for its rank: "warned" when SIGUSR1 comes, "never" not by itself.
LONGSTRIDE = """
import os, signal, sys, time
rank = os.environ["RANK"]
def leave(*_):
    time.sleep(0.3 * int(rank))  # one is later: it must not be killed
    open(f"left-{rank}", "w").close()
    sys.exit(138)
signal.signal(signal.SIGUSR1, leave)
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
with open(f"begun-{rank}", "w") as file:
    file.write(" ".join(os.environ[name] for name in names) + "\\n" + " ".join(sys.argv[1:]))
os.rename(f"begun-{rank}", f"rank-{rank}")
code = os.environ["CODES"].split()[int(rank)]
while code in ("warned", "never"):
    time.sleep(0.02)
sys.exit(int(code))
"""


@dataclass(frozen=True)
class Ended:
    """How the batch script ended, and what it asked of Slurm, in order."""

    code: int
    asked: list[str]


def batch(place: Path, codes: str, *words: str, **environment: str) -> Ended:
    """Runs the script in `place`."""
    programs = {"srun": SRUN, "scontrol": SCONTROL, "longstride": LONGSTRIDE}
    for name, text in programs.items():
        file = place / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!{sys.executable}\n{text}")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "ecoli", "SLURM_JOB_NODELIST": "node[1-2]"}
    slurm |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "3"}
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    values = {**os.environ, **slurm, "PATH": path, "CODES": codes, **environment}
    ended = subprocess.run(["bash", str(SCRIPT), *words], cwd=place, env=values, timeout=60, check=False)
    asked = place / "asked"
    return Ended(ended.returncode, asked.read_text().splitlines() if asked.exists() else [])


def test_every_task_learns_its_place(tmp_path: Path) -> None:
    assert batch(tmp_path, "0 0") == Ended(0, [])
    for rank in range(2):
        place, words = (tmp_path / f"rank-{rank}").read_text().split("\n")
        assert place == f"{rank} 2 {rank} 2 node1"
        assert words.startswith("train configs/ecoli-1m.yaml --continue run.name=ecoli ")


def test_another_config_takes_the_place_of_the_scripts_own(tmp_path: Path) -> None:
    schedule = "data.schedule=1k for 3 steps"
    assert batch(tmp_path, "0 0", "mine.yaml", "train.steps=3", schedule) == Ended(0, [])
    _, words = (tmp_path / "rank-0").read_text().split("\n")
    assert words == f"train mine.yaml --continue run.name=ecoli train.steps=3 {schedule}"


def test_a_run_that_is_warned_is_queued_again(tmp_path: Path) -> None:
    """However often it was; and whoever takes longer to leave is left the time."""
    assert batch(tmp_path, "warned warned", WARN="1", SLURM_RESTART_COUNT="99") == Ended(138, ["scontrol requeue 7"])
    assert (tmp_path / "left-0").exists() and (tmp_path / "left-1").exists()
    assert not list(tmp_path.glob(".ecoli*")), "nothing stays"


@pytest.mark.parametrize(("restarts", "again"), [("", True), ("9", True), ("10", False)])
def test_a_failure_ends_all_and_is_tried_again_some_times(tmp_path: Path, restarts: str, again: bool) -> None:
    count = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    assert batch(tmp_path, "never 1", **count) == Ended(137, ["scontrol requeue 7"] if again else [])


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    for codes in ("2 2", "2 never"):
        assert batch(tmp_path, codes) == Ended(2, [])


def test_the_script_is_shell_and_its_settings_agree() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text()
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert settings["ntasks-per-node"] == settings["gpus-per-node"]
    assert settings["signal"].startswith("USR1@")
    assert "LEFT_ON_WARNING=138" in text, "128 + SIGUSR1, as the command leaves"
