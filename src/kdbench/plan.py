"""What a configuration asks for: the variants of each experiment, where their files lie, and the identity of every run.

A run's identity is everything that decides its numbers and nothing else. It is written to a `config.json` that training, generation and
tables all have as an input, so a change reruns what it concerns, and a training that fails leaves no stale table behind.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from kdbench import files, methods
from kdbench.config import merged_training, objectives
from kdbench.data.world import ROWS
from kdbench.settings import Config, EmbeddedData, HubModel, InitModel, Training
from kdbench.vocabularies import architecture

ANSWERS_VERSION = 1  # raised when the same model, prompt, settings and decode seed give another answer
LOOP_VERSION = 1  # raised when a change of the training loop, the batches or the texts changes every run's numbers


@dataclass(frozen=True)
class Variant:
    """One column of work in an experiment: a method with all its settings.

    Attributes:
        name: folder under `methods/`; that of the block in the configuration, with the objective where the block lists several.
        method: name in the registry, or the path of the file that defines it.
        settings: of the method, defaults written out.
        training: merged from the general settings, the experiment's and the method's.
        needs: what the workflow prepares for it.
    """

    name: str
    method: str
    settings: dict
    training: Training
    needs: "methods.base.Needs"  # (importing it here would import torch before anybody needs it)

    @property
    def objective(self) -> str:
        """The divergence, for methods that have a choice; else empty."""
        return self.settings.get("objective", "")

    @property
    def across_tokenizers(self) -> bool:
        """Whether the method works where student and teacher read different tokens."""
        return methods.get(self.method).across_tokenizers


def _tables(group: str) -> dict[str, str]:
    """Tables of the scores of a teacher or of a variant's students."""
    return {"scores": f"results/{group}/scores.csv", "items": f"results/{group}/items.csv"}


class Plan:
    """Answers every question that the rules ask about a configuration."""

    def __init__(self, config: Config):
        self.config = config

    # --- names -----------------------------------------------------------------------------------------------------------------

    @cached_property
    def variants(self) -> dict[str, dict[str, Variant]]:
        """Experiment -> variant name -> variant, in the configured order."""
        return {
            name: {variant.name: variant for key in experiment.methods for variant in self._of_block(key, experiment)}
            for name, experiment in self.config.experiments.items()
        }

    def _of_block(self, key: str, experiment):
        block = dict(self.config.methods[key] or {})
        training = merged_training(self.config, experiment.training, block.pop("training", {}))
        method = block.pop("method", key)
        cls = methods.get(method)
        for objective in objectives(block):
            settings = cls.Settings.model_validate(block if objective is None else block | {"objective": objective})
            name = key if objective is None else f"{key}.{objective}"
            yield Variant(name, method, settings.model_dump(), training, cls.needs(settings))

    @cached_property
    def blocks(self) -> dict[str, dict[str, list[str]]]:
        """Experiment -> method block that lists several objectives -> its variants."""
        found: dict[str, dict[str, list[str]]] = {}
        for name, experiment in self.config.experiments.items():
            for key in experiment.methods:
                if objectives(self.config.methods[key] or {}) != [None]:
                    found.setdefault(name, {})[key] = [variant.name for variant in self._of_block(key, experiment)]
        return found

    @property
    def teachers(self) -> list[str]:
        """The teachers that experiments use."""
        return list(dict.fromkeys(experiment.teacher for experiment in self.config.experiments.values()))

    def rows(self, experiment: str, names: list[str] | None = None) -> list[dict]:
        """What a table shows of an experiment, in order, with the scores of each: the teacher and all variants, or those named."""
        chosen = self.config.experiments[experiment]
        rows = [] if names else [{"method": "teacher"} | _tables(f"teachers/{chosen.teacher}")]
        for name, variant in self.variants[experiment].items():
            if names is None or name in names:
                row = {"method": variant.method, "variant": name, "objective": variant.objective}
                rows.append(row | _tables(f"{experiment}/methods/{name}"))
        common = {"experiment": experiment, "teacher": chosen.teacher, "student": chosen.student}
        return [common | {"objective": "", "variant": ""} | row for row in rows]

    def runs(self) -> dict:
        """All models that are evaluated, for `kdbench.status`: `runs`, their folders below results/; `fetched`, those among them that are
        not trained here; `evaluations`, the folders below each that will hold scores.json."""
        teachers = {f"teachers/{name}": self.config.teachers[name].train is not None for name in self.teachers}
        students = [
            f"{experiment}/methods/{name}/seed{seed}"
            for experiment, variants in self.variants.items()
            for name in variants
            for seed in self.config.experiments[experiment].seeds
        ]
        evaluation = self.config.evaluation
        return {
            "runs": [*teachers, *students],
            "fetched": [name for name, trains in teachers.items() if not trains],
            "evaluations": [
                f"evaluation/{dataset}/decode{seed}"
                for dataset in evaluation.datasets
                for seed in evaluation.decode_seeds
            ],
        }

    def readers(self, experiment: str) -> str:
        """The pair of models whose tokenizers share an experiment's texts, as a folder name: student+teacher."""
        chosen = self.config.experiments[experiment]
        return f"{chosen.student}+{self.config.teachers[chosen.teacher].model}"

    # --- identities --------------------------------------------------------------------------------------------------------------

    def data(self, name: str) -> dict:
        """Identity of a data set: how it is generated, or the sha256 of its file, wherever that lies."""
        data = self.config.datasets[name]
        if isinstance(data, EmbeddedData):
            return data.model_dump() | {"rows": data.rows or ROWS[data.split]}
        return {"source": "file", "sha256": _content(Path(data.path)), "rows": data.rows}

    def model(self, name: str) -> dict:
        """Identity of an untuned model: what it is made or loaded from."""
        model = self.config.models[name]
        if isinstance(model, HubModel):
            return {"source": "hub", "repository": model.repository, "revision": model.revision}
        if isinstance(model, InitModel):
            tokenizer = model.tokenizer
            identity = (
                {"folder": _folder(Path(tokenizer))}
                if isinstance(tokenizer, str)
                else {"trained_on": self.data(tokenizer.train_on), "vocabulary_size": tokenizer.vocabulary_size}
            )
            return {"source": "init", "architecture": architecture(model), "tokenizer": identity, "seed": model.seed}
        return {"source": "path", "content": _folder(Path(model.path))}

    def teacher(self, name: str) -> dict:
        """Identity of a teacher: the model, and all of its tuning."""
        teacher = self.config.teachers[name]
        identity = {"model": self.model(teacher.model)}
        if teacher.train is None:
            return identity
        return (
            identity
            | self._trained(teacher.train, teacher.dev, self.teacher_training(name), "sft", {})
            | {"seed": teacher.seed}
        )

    def teacher_training(self, name: str) -> Training:
        """Settings of a teacher's fine-tuning."""
        return merged_training(self.config, self.config.teachers[name].training)

    def run(self, experiment: str, variant: str) -> dict:
        """Identity of the runs of a variant but for their seed: its `config.json`."""
        chosen, of = self.config.experiments[experiment], self.variants[experiment][variant]
        teacher = self.config.teachers[chosen.teacher]
        identity = self._trained(chosen.train, chosen.dev, of.training, of.method, of.settings)
        identity |= {"student": self.model(chosen.student), "texts_shared_with": self.model(teacher.model)}
        if of.needs.teacher != "none":
            identity["teacher"] = self.teacher(chosen.teacher)
        if of.needs.teacher == "signal":
            identity["teacher_states"] = {"read": of.training.teacher, "dtype": teacher.cache_dtype}
        return identity

    def _trained(self, train: str, dev: str, training: Training, method: str, settings: dict) -> dict:
        identity = {"name": method, "version": methods.get(method).version, "settings": settings}
        if (content := methods.sha256(method)) is not None:
            identity["sha256"] = content
        return {
            "method": identity,
            "training": training.model_dump(exclude={"teacher"}),
            "train": self.data(train),
            "dev": self.data(dev),
            "text": self.config.text.model_dump(),
            "loop_version": LOOP_VERSION,
        }

    def generation(self) -> dict:
        """What decides the answers of a model besides the model, the prompts and the decode seed."""
        return {
            "decoding": self.config.evaluation.decoding().model_dump(),
            "text": self.config.text.model_dump(),
            "version": ANSWERS_VERSION,
        }


def _content(path: Path) -> str:
    """sha256 of a file; several names of the configuration may lead to the same one."""
    return _content_of(str(path), path.stat().st_mtime_ns)


@lru_cache
def _content_of(path: str, _time: int) -> str:
    return files.sha256(path)


def _folder(path: Path) -> dict:
    """Content of a model folder: its JSON and tokenizer files by sha256, its weights, too large for that, by name and size."""
    listed = sorted(file for file in path.iterdir() if file.is_file())
    weights = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
    return {file.name: file.stat().st_size if file.name.endswith(weights) else _content(file) for file in listed}
