"""What can be asked of the `longstride` command: its commands, their arguments and examples.

Nothing here imports more than the standard library: `--help` does not wait for torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command: `name` is also its function's in `commands` (`import_` for import).

    `adders` declare its arguments, in this order.
    """

    name: str
    summary: str
    example: str
    adders: tuple[Callable[[argparse.ArgumentParser], None], ...]


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the experiment (the shipped ones: configs/)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's directory (path or URL), or its name below runs/")


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="the job's name, as `longstride submit` printed it")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings put over the file's: train.steps=100 data.batch=8",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest (default), best (of the lowest validation loss), or a step such as 200",
    )


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="Ray cluster to join; 'auto': the one on this machine (default: RAY_ADDRESS, else one is started here)",
    )


def _add_dashboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", required=True, metavar="URL", help="the cluster's dashboard, such as http://10.0.0.5:8265"
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--continue",
        dest="same",
        action="store_true",
        help="go on with the run of that run.name if it exists (what jobs do that are started again)",
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what to continue (default: the run's `sample`), of a run on audio a recording; repeat it for several",
    )
    parser.add_argument("--out", metavar="FILE", help="of a run on audio: the WAV file to write, a path or URL")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="how many tokens to add (default, as below: the run's `sample`)"
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest; 0: among all")
    parser.add_argument("--top-p", type=float, metavar="X", help="sample among the likeliest that sum to X")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random choices")
    parser.add_argument(
        "--modes", type=int, metavar="N", help="decode Hyena layers as recurrences of N modes a channel (order 2)"
    )


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="config.json and safetensors files, or another run")
    parser.add_argument("out", metavar="OUT", help="the run to make: a path or URL, such as runs/mamba-130m")


LAYOUTS = "mamba, mamba2, state-spaces, rwkv, llama, mixtral, jamba, striped-hyena-7b, evo2"


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder of this machine to write")
    parser.add_argument("--layout", required=True, metavar="NAME", help=f"whose files they are to be: {LAYOUTS}")


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory", default="runs", metavar="URL", help="where the runs are: a path or URL (default: runs)"
    )


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", action="store_true", help="read every byte and compare with its checksum")


def _add_communication(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", choices=("motion", "layer", "rank"), default="motion", help="what a line stands for")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the config's)")
    parser.add_argument("--memory", metavar="SIZE", help="of a device, such as 80GiB; what exceeds it is said")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="what the processes will compute on (default: as here)"
    )


def _add_presets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this one's description (default: list all)")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prefix",
        metavar="PREFIX",
        nargs="?",
        help="a section such as train or model.mamba, a setting, or a part of its name (default: all)",
    )


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="files, folders, globs or URLs of text, JSONL, Parquet, FASTA or audio",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write: a path or URL (s3://bucket/corpus)")
    tokenizers = "bytes, dna (default where all sources are FASTA), mu-law (audio), bpe, or a tokenizer.json"
    parser.add_argument("--tokenizer", metavar="NAME", help=tokenizers)
    parser.add_argument("--vocab-size", type=int, metavar="N", help="of the bpe tokenizer that is trained")
    parser.add_argument("--separator", metavar="TOKEN", help="of a tokenizer.json: the token that ends a document")
    parser.add_argument("--sample-rate", type=int, metavar="HZ", help="of audio, resampled to it (default: 16000)")
    formats = ("auto", "text", "jsonl", "parquet", "fasta", "audio")
    parser.add_argument(
        "--format", choices=formats, metavar="KIND", help=f"{', '.join(formats[1:])} (default: by ending)"
    )
    parser.add_argument("--field", metavar="NAME", help="key or column of the text (JSONL, Parquet; default: text)")
    parser.add_argument("--validation", type=float, metavar="SHARE", help="share to hold out (default: 0.05)")
    parser.add_argument(
        "--holdout",
        choices=("auto", "documents", "tail"),
        metavar="HOW",
        help="whole documents, or the tail of each (default: tail for FASTA, and few texts or recordings)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: 2)")
    parser.add_argument("--overwrite", action="store_true", help="replace what another preparation left in OUT")


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", action="store_true", help="print what the job prints, until it ends")
    parser.add_argument(
        "--python", default="python", metavar="PATH", help="the interpreter on the cluster's head (default: python)"
    )


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", nargs="?", help="a job's name (default: all jobs)")


def _add_logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")


def _add_stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="how long to wait for its end")


COMMANDS = (
    Command(
        "train",
        "train a model, its sequences split over the workers",
        "longstride train configs/quickstart.yaml train.steps=200 parallel.sequence=2",
        (_add_config, _add_overrides, _add_cluster, _add_train),
    ),
    Command(
        "resume",
        "continue a run from its last complete checkpoint",
        "longstride resume runs/quickstart-20261122-101500 train.steps=400",
        (_add_run, _add_overrides, _add_cluster),
    ),
    Command(
        "generate",
        "continue a prompt, one token at a time in constant memory",
        "longstride generate runs/quickstart-20261122-101500 --prompt 'def ' --tokens 200",
        (_add_run, _add_generate, _add_checkpoint),
    ),
    Command(
        "evaluate",
        "measure loss and accuracy on held-out sequences, of several lengths if asked",
        "longstride evaluate runs/quickstart-20261122-101500 'evaluate.lengths=[1024, 8192]'",
        (_add_run, _add_overrides, _add_checkpoint),
    ),
    Command(
        "import",
        "make a run of a checkpoint in safetensors, of Hugging Face's or the original software",
        "longstride import checkpoints/mamba-130m runs/mamba-130m",
        (_add_import, _add_overrides, _add_checkpoint),
    ),
    Command(
        "export",
        "write a run's weights for other software",
        "longstride export runs/mamba-130m exported/mamba-130m --layout mamba",
        (_add_run, _add_export, _add_checkpoint),
    ),
    Command("runs", "list runs: state, step, loss, context", "longstride runs --directory runs", (_add_runs,)),
    Command(
        "checkpoints",
        "list a run's checkpoints, whole or broken",
        "longstride checkpoints runs/quickstart-20261122-101500 --verify",
        (_add_run, _add_checkpoints),
    ),
    Command(
        "communication",
        "what a run's processes send each other in a step, and how long they wait",
        "longstride communication runs/quickstart-20261122-101500 --by layer",
        (_add_run, _add_communication),
    ),
    Command(
        "track",
        "send what MLflow missed of a run, as when its server was away",
        "longstride track runs/quickstart-20261122-101500 tracking.uri=http://10.0.0.9:5000",
        (_add_run, _add_overrides),
    ),
    Command(
        "plan",
        "say what a run will take: meshes, memory, arithmetic, messages",
        "longstride plan configs/quickstart.yaml --workers 4 --memory 80GiB data.batch=4 data.context=4096",
        (_add_config, _add_overrides, _add_plan),
    ),
    Command(
        "presets",
        "list the models that `model: NAME` may name, or print one's description",
        "longstride presets mamba-130m",
        (_add_presets,),
    ),
    Command(
        "settings",
        "list what a config and key=value may set: name, type, default, meaning",
        "longstride settings model.mamba",
        (_add_settings,),
    ),
    Command(
        "prepare",
        "tokenise sources into shards to train on",
        "longstride prepare 'texts/*.jsonl' corpora/texts --tokenizer bpe --vocab-size 8192",
        (_add_prepare,),
    ),
    Command(
        "submit",
        "train on a cluster, as a job that survives this terminal; prints the job's name",
        "longstride submit configs/quickstart.yaml --address http://10.0.0.5:8265 run.directory=s3://bucket/runs",
        (_add_config, _add_overrides, _add_dashboard, _add_submit),
    ),
    Command(
        "status",
        "list a cluster's jobs, or show one",
        "longstride status quickstart-20261122-101500.1 --address http://10.0.0.5:8265",
        (_add_status, _add_dashboard),
    ),
    Command(
        "logs",
        "show what a job prints",
        "longstride logs quickstart-20261122-101500.1 -f --address http://10.0.0.5:8265",
        (_add_job, _add_dashboard, _add_logs),
    ),
    Command(
        "stop",
        "end a job after the step at hand, with a checkpoint",
        "longstride stop quickstart-20261122-101500.1 --address http://10.0.0.5:8265",
        (_add_job, _add_dashboard, _add_stop),
    ),
)
