"""The whole configuration of a run: the sections that live with their code, composed and checked together.

workers: 2
seed: 0
run: {directory: runs, name: null}
model: mamba-small            # a preset's name, or a full description
data: {corpus: python-source, context: 8192, batch: 4}
parallel: {data: auto, sequence: 2, expert: auto}
train: {steps: 1000, learning_rate: 1.0e-3}
checkpoint: {every: 200}
recovery: {max_failures: 3, bad_loss: rollback}
tracking: {uri: null}
sample: {prompt: "def "}
evaluate: {lengths: [1024, 8192]}
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, model_validator

from ..data import Corpus, DataConfig, Stage
from ..data.credentials import refuse_credentials
from ..models import ModelConfig, load_preset
from ..parallel import Degrees, MeshConfig
from .checkpoint_policy import CheckpointConfig
from .configuration import ConfigError, Settings, Tree, apply_overrides, parse_yaml, validate
from .generate import SampleConfig
from .manifest import list_checkpoints
from .optimization import TrainConfig
from .recovery import RecoveryConfig
from .run_directory import RunConfig, RunDirectory, code_version
from .scoring import EvaluateConfig
from .storage import Storage
from .tracking import TrackingConfig


def _preset(model: Any) -> Any:
    """A preset's name stands for its full description."""
    return load_preset(model) if isinstance(model, str) else model


class Experiment(Settings):
    """Everything that defines a run. See the module's text for an example, and each section's class for its keys.

    Attributes:
        workers: how many processes.
        seed: of initial values, data order and random numbers.
        model: a preset's name or a full description.
    """

    workers: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    run: RunConfig = RunConfig()
    model: Annotated[ModelConfig, BeforeValidator(_preset)]
    data: DataConfig = Field(default_factory=lambda: DataConfig.model_validate({}))
    parallel: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    tracking: TrackingConfig = TrackingConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @classmethod
    def load(cls, path: str, overrides: Sequence[str] = ()) -> Experiment:
        """The experiment in the YAML file at `path` (a path or URL) with `key=value` overrides put in.

        Raises ConfigError (a ValueError) of one line: a file that cannot be read, an unknown key (with the nearest
        valid name), a wrong type, an impossible combination.
        """
        tree = apply_overrides(parse_yaml(_read(path), path), overrides, expand_preset)
        run = tree.setdefault("run", {})
        if isinstance(run, dict) and run.get("name") is None:
            run["name"] = default_name(path)
        return validate(cls, tree)

    @classmethod
    def resume(cls, run: RunDirectory, overrides: Sequence[str] = (), *, any_corpus: bool = False) -> Experiment:
        """The experiment of an existing run with overrides put in; what would make it another run is refused.

        With another `data.context`, and no `data.batch` beside it, the batch becomes what keeps the tokens of a step.
        Another `data.corpus` will do with `any_corpus`, where it holds the same tokens (it was moved), and while the
        run has made no step, as after an import.
        """
        tree, before = cls._of(run)
        after = validate(cls, _keep_tokens(apply_overrides(tree, overrides), before.data, overrides))
        for key in ("seed", "model", "run.name"):
            if _get(before, key) != _get(after, key):
                raise ConfigError(f"{key} cannot change when a run is resumed; start a new run with `longstride train`")
        if before.data.corpus != after.data.corpus and not any_corpus and not _takes(run, after.data):
            raise ConfigError(
                "data.corpus cannot change when a run is resumed; begin a run with its weights by "
                f"`longstride import {run.url} OUT data.corpus=...`"
            )
        # The directory may have moved since the run was made.
        parent = run.url.rsplit("/", 1)[0]
        return after.model_copy(update={"run": RunConfig(directory=parent, name=run.name)})

    @classmethod
    def _of(cls, run: RunDirectory) -> tuple[Tree, Experiment]:
        """A run's settings as written, and as understood. ConfigError: they are not, as of a run of another version."""
        file = f"{run.url}/experiment.yaml"
        tree = parse_yaml(run.read_experiment(), file)
        try:
            return tree, validate(cls, tree)
        except ConfigError as error:
            theirs, ours = run.read_info().get("code_version", "an unknown version"), code_version()
            versions = "" if theirs == ours else f", written by {theirs} (this is {ours})"
            raise ConfigError(f"{file}{versions}: {error}") from None

    def settings(self) -> Tree:
        """All settings as plain values, defaults included; of layers, those of the kinds that the model has.

        So a run stays readable when an option of a layer that it does not have comes to another name.
        """
        return self.model_dump(mode="json", exclude={"model": self.model.idle_groups})

    def to_yaml(self) -> str:
        """The resolved experiment; `Experiment.load` reads it again."""
        return yaml.safe_dump(self.settings(), sort_keys=False, allow_unicode=True)

    def open_corpus(self) -> Corpus:
        """The corpus, checked against the model. ValueError: there is none, or its tokens exceed the vocabulary."""
        corpus = self.data.open()
        if corpus.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"data.corpus={self.data.corpus} has token ids below {corpus.vocab_size}, more than "
                f"model.vocab_size={self.model.vocab_size}; set model.vocab_size={corpus.vocab_size}"
            )
        return corpus

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run by context, in order; one without `data.schedule`."""
        return self.data.stages(self.train.steps)

    def stage_after(self, step: int) -> Stage:
        """The stage that makes step `step` + 1; the last one after all steps."""
        return next((stage for stage in self.stages if step < stage.last), self.stages[-1])

    def at(self, stage: Stage) -> Experiment:
        """The experiment as it is in a stage: its context and batch, no schedule, and degrees planned for it."""
        if self.data.schedule is None:
            return self
        data = self.data.model_copy(update={"context": stage.context, "batch": stage.batch, "schedule": None})
        parallel = self.parallel
        if parallel.data == "auto" and parallel.sequence == "auto":
            parallel = parallel.model_copy(update={"data": self._most_groups(stage.batch)})
        return self.model_copy(update={"data": data, "parallel": parallel})

    @property
    def degrees(self) -> Degrees:
        """The parallel degrees with every `auto` replaced by a number; with a schedule, those of the last stage."""
        parallel = self.at(self.stages[-1]).parallel
        return parallel.resolve(self.workers, self.model.num_experts)

    def _most_groups(self, batch: int) -> int:
        """How many groups of processes work on different sequences when a schedule leaves that open.

        As many as the batch allows; the sequence degree takes the rest. A process holds the same number of tokens in
        every stage, so whole sequences cost no more memory than parts of them, and exchange nothing.
        """
        processes, rows = self.workers // self.parallel.replicate, self.parallel.replicate * self.train.accumulate
        most = 1 if self.train.canonical else processes
        return max(n for n in range(1, max(1, most) + 1) if n == 1 or not (processes % n or batch % (n * rows)))

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        if self.data.schedule is None:
            self._check_degrees()
            return self
        for stage in self.stages:
            try:
                self.at(stage)._check_degrees()
            except ValueError as error:
                problem = str(error).partition(";")[0]
                raise ConfigError(
                    f"data.schedule, where it has {stage.batch} x {stage.context}: {problem}; choose a context or "
                    "degrees (auto plans them for every stage) that divide"
                ) from None
        return self

    def _check_degrees(self) -> None:
        """ConfigError, with the fix, unless context, batch and canonical tiles divide over the processes."""
        degrees, context, batch = self.degrees, self.data.context, self.data.batch
        if context % degrees.sequence:
            below = context // degrees.sequence * degrees.sequence
            choices = [str(length) for length in (below, below + degrees.sequence) if length > 0]
            raise ConfigError(
                f"data.context={context} does not divide over parallel.sequence={degrees.sequence}; "
                f"the nearest that does is data.context={' or '.join(choices)}"
            )
        copies, parts = degrees.data * degrees.replicate, self.train.accumulate
        above = -(-batch // (copies * parts)) * copies * parts
        if batch % (copies * parts):
            in_parts = f" in train.accumulate={parts} parts" if parts > 1 else ""
            raise ConfigError(
                f"data.batch={batch} does not divide over {copies} groups of processes (parallel.data="
                f"{degrees.data} x parallel.replicate={degrees.replicate}){in_parts}; set data.batch={above}"
            )
        self._check_canonical(degrees)

    def _check_canonical(self, degrees: Degrees) -> None:
        tiles = self.train.canonical
        if not tiles:
            return
        if copies := degrees.data * degrees.replicate - 1:
            raise ConfigError(
                f"train.canonical={tiles} is for one group of processes: set parallel.sequence={copies + 1}"
            )
        if self.data.context % tiles or tiles % degrees.sequence:
            raise ConfigError(
                f"train.canonical={tiles} must divide data.context={self.data.context} and be a multiple of "
                f"parallel.sequence={degrees.sequence}"
            )
        if self.train.dtype == "bfloat16":
            raise ConfigError(f"train.canonical={tiles} computes in the parameters' type: set train.dtype=float32")


def _keep_tokens(tree: Tree, before: DataConfig, overrides: Sequence[str]) -> Tree:
    """`tree` with the batch that keeps the tokens of a step when the overrides give another context and no batch."""
    given = {override.partition("=")[0].strip() for override in overrides}
    if "data.context" not in given or given & {"data", "data.batch"}:
        return tree
    context = validate(DataConfig, {"context": tree["data"]["context"]}).context
    tokens = before.context * before.batch
    if context < tokens and tokens % context:
        raise ConfigError(
            f"data.context={context} does not divide the {tokens} tokens of a step (data.context={before.context} x "
            f"data.batch={before.batch}); take one that does, or set data.batch as well"
        )
    tree["data"]["batch"] = max(1, tokens // context)
    return tree


def expand_preset(path: str, value: Any) -> Tree | None:
    """A model named by its preset, written out for an override that reaches into it (`model.width=64`)."""
    return load_preset(value).model_dump(mode="json") if path == "model" and isinstance(value, str) else None


def default_name(path: str) -> str:
    """A run's name from its config's file name and the time (UTC)."""
    stem = PurePosixPath(path).stem
    safe = "".join(letter if (letter.isalnum() and letter.isascii()) or letter in "-_" else "-" for letter in stem)
    return f"{safe.strip('-_') or 'run'}-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}"


def _read(path: str) -> str:
    refuse_credentials("CONFIG", path)
    try:
        return Storage(path).read_text("")
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}; the shipped ones are in configs/") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; name the YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None


def _takes(run: RunDirectory, data: DataConfig) -> bool:
    """Whether a run can go on with this corpus: it has made no step, or these are the tokens that it was trained on."""
    committed = [checkpoint for checkpoint in list_checkpoints(run) if checkpoint.committed]
    if not committed or committed[-1].step == 0:
        return True
    return committed[-1].read_manifest().corpus == data.open().fingerprint()


def _get(settings: Any, path: str) -> Any:
    for key in path.split("."):
        settings = getattr(settings, key)
    return settings
