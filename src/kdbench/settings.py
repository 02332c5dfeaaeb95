"""Typed settings: every key of a configuration, with its default, its unit and its meaning.

The Snakefile, the scripts and `config/README.md` all read these classes. What decides numbers and what only decides where and how fast
they are computed (`Hardware`) are kept apart: only the former is part of a run's identity.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


def _number(value: Any) -> Any:
    """YAML reads 1e-5 (without a dot) as text; people write it all the same."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value.strip()):
        return float(value)
    return value


Int = Annotated[int, Field(strict=True)]
Bool = Annotated[bool, Field(strict=True)]
Float = Annotated[float, BeforeValidator(_number), Field(strict=True, allow_inf_nan=False)]
Path = Annotated[str, Field(min_length=1, pattern=r"^[^\s]+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


def _distinct(values: list) -> list:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"listed more than once: {', '.join(map(str, repeated))}")
    return values


Seeds = Annotated[list[Annotated[Int, Field(ge=0)]], Field(min_length=1)]


class Settings(BaseModel):
    """Unknown keys are errors; settings do not change after they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --- models -----------------------------------------------------------------------------------------------------------------------


class TrainedTokenizer(Settings):
    """A byte-level BPE tokenizer, trained on the prompts and responses of one of the data sets."""

    train_on: Name = Field(description="data set whose text it is trained on")
    vocabulary_size: Annotated[Int, Field(ge=260)] = Field(description="tokens in all, special tokens included")


class InitModel(Settings):
    """A model with random weights: for tests and the embedded experiment."""

    source: Literal["init"]
    architecture: dict[str, Any] | Path = Field(
        description="keys of a Hugging Face configuration, `model_type` among them, or the path of a config.json"
    )
    tokenizer: TrainedTokenizer | Path = Field(description="a tokenizer to train, or the folder of one")
    seed: Annotated[Int, Field(ge=0)] = Field(0, description="of the weights")


class PathModel(Settings):
    """A model in Hugging Face format in a local folder; it is linked, not copied."""

    source: Literal["path"]
    path: Path = Field(description="folder with config.json, tokenizer and weights")
    trust_remote_code: Bool = Field(False, description="run Python code that comes with the model")


class HubModel(Settings):
    """A model of the Hugging Face hub, at one commit."""

    source: Literal["hub"]
    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$|^[\w.-]+$")] = Field(description="owner/name")
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] = Field(description="commit, 40 hex digits")
    shares_tokenizer_with: Name | None = Field(
        None, description="another model of this configuration with the same tokenizer; checked when both are there"
    )
    trust_remote_code: Bool = Field(False, description="run Python code that comes with the model")


Model = Annotated[InitModel | PathModel | HubModel, Field(discriminator="source")]

# --- data -------------------------------------------------------------------------------------------------------------------------


class EmbeddedData(Settings):
    """Records of the invented world that the workflow carries in itself."""

    source: Literal["embedded"]
    split: Literal["corpus", "train", "dev", "test", "shift"] = Field(description="which part of the world's records")
    rows: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="how many records; by default the split's own number"
    )
    seed: Annotated[Int, Field(ge=0)] = Field(
        1, description="of the draw of the records; the facts of the world are fixed"
    )


class FileData(Settings):
    """Records of a JSONL file: `instruction` and optional `input`, or `prompt`; `output`, one text or a list of references."""

    source: Literal["file"]
    path: Path = Field(description="JSONL file, or JSONL compressed with gzip (.gz)")
    rows: Annotated[Int, Field(ge=1)] | None = Field(None, description="take only the first so many records")


Data = Annotated[EmbeddedData | FileData, Field(discriminator="source")]


class Text(Settings):
    """How a record becomes text. Student and teacher read the same bytes: what is too long is cut as text, before tokenising."""

    template: Literal["alpaca", "short"] = Field(
        "alpaca", description="`alpaca`: the published prompt; `short`: the same without its opening sentence"
    )
    max_prompt_tokens: Annotated[Int, Field(ge=8)] = Field(
        256, description="tokens; a longer prompt has its input shortened, never its response marker"
    )
    max_tokens: Annotated[Int, Field(ge=16)] = Field(
        512, description="tokens of prompt and response together, end of text included"
    )


# --- training ---------------------------------------------------------------------------------------------------------------------


class Lora(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Annotated[Int, Field(ge=1)] = Field(256, description="rank of an adapter")
    alpha: Annotated[Float, Field(gt=0)] = Field(8.0, description="adapters are scaled by alpha / rank")
    dropout: Annotated[Float, Field(ge=0, lt=1)] = Field(0.1, description="share of an adapter's inputs")
    target_modules: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="names of the linear layers that get one; by default the attention's query and value projections",
    )


class Training(Settings):
    """One training: of a teacher, of a student by fine-tuning, or by any method."""

    epochs: Annotated[Int, Field(ge=1)] = Field(10, description="passes over the training records")
    batch_size: Annotated[Int, Field(ge=1)] = Field(
        32, description="sequences of one optimizer step, over all processes; accumulation follows from it"
    )
    learning_rate: Annotated[Float, Field(gt=0)] = Field(5e-4, description="peak rate of AdamW for the model")
    projector_learning_rate: Annotated[Float, Field(gt=0)] = Field(
        1e-3, description="peak rate for what a method learns besides the model"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="course of the rates after the warm-up"
    )
    warmup: Annotated[Float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the steps in which the rates rise from 0"
    )
    final_rate: Annotated[Float, Field(ge=0, le=1)] = Field(
        0.0, description="rate after the last step, as a share of the peak"
    )
    weight_decay: Annotated[Float, Field(ge=0)] = Field(0.01, description="of AdamW; not for biases and norms")
    betas: Annotated[list[Annotated[Float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="of AdamW"
    )
    clip_norm: Annotated[Float, Field(gt=0)] = Field(
        1.0, description="the gradient of all parameters together is cut to this norm"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="of the forward and backward pass; weights of the optimizer are fp32"
    )
    tuning: Literal["full", "lora"] = Field("full", description="train all weights, or adapters only")
    lora: Lora | None = Field(
        None, description="adapters, where `tuning` is lora; by default those of the published scripts"
    )
    teacher: Literal["cached", "live"] = Field(
        "cached", description="read the teacher's hidden states from its cache, or run it in every step"
    )
    select: Literal["dev_loss", "last"] = Field("dev_loss", description="which epoch becomes the final model")
    keep_best: Annotated[Int, Field(ge=0)] = Field(
        0, description="how many epochs' models, the best by dev loss, to keep in `best/` beside `model/`"
    )

    @model_validator(mode="after")
    def _lora_only_with_lora(self):
        if self.lora is not None and self.tuning != "lora":
            raise ValueError("`lora` is given but `tuning` is full: set `tuning: lora` or take `lora` out")
        return self


class Teacher(Settings):
    """A teacher: a model, and how it is tuned. Shared by all experiments that name it."""

    model: Name = Field(description="key of `models`")
    train: Name | None = Field(None, description="data set to tune it on; without one it is used as it is")
    dev: Name | None = Field(None, description="data set of its dev loss")
    seed: Annotated[Int, Field(ge=0)] = Field(0, description="of its training")
    training: dict[str, Any] = Field({}, description="differences to the top-level `training`")
    cache_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of its hidden states on disk")


class Experiment(Settings):
    """A teacher, a student, and the methods that are compared on them."""

    teacher: Name = Field(description="key of `teachers`")
    student: Name = Field(description="key of `models`")
    train: Name = Field(description="data set that students learn from")
    dev: Name = Field(description="data set of the dev loss")
    methods: Annotated[list[Name], Field(min_length=1)] = Field(description="keys of `methods`")
    seeds: Seeds = Field([1], description="training seeds: each gives one student per method")
    training: dict[str, Any] = Field({}, description="differences to the top-level `training`")

    _methods_distinct = field_validator("methods")(_distinct)
    _seeds_distinct = field_validator("seeds")(_distinct)


class Decoding(Settings):
    """How a model writes."""

    temperature: Annotated[Float, Field(ge=0)] = Field(1.0, description="0 is greedy decoding")
    top_p: Annotated[Float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling; 1 keeps all tokens")
    top_k: Annotated[Int, Field(ge=0)] = Field(0, description="sample from so many most likely tokens; 0 keeps all")
    no_repeat_ngram_size: Annotated[Int, Field(ge=0)] = Field(
        0, description="forbid a repeated n-gram; 0 forbids none (published: 6)"
    )
    max_new_tokens: Annotated[Int, Field(ge=1)] = Field(256, description="tokens of an answer at most")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the weights while generating")
    backend: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what runs the model: transformers, or vLLM where it is installed (untested on GPU; it samples other answers)",
    )

    @field_validator("no_repeat_ngram_size")
    @classmethod
    def _no_single_tokens(cls, size: int) -> int:
        if size == 1:  # and, in a batch, the end of text, which pads the shorter prompts
            raise ValueError("1 would forbid every token of the prompt; 0 forbids none, or take 2 or more")
        return size

    @model_validator(mode="after")
    def _vllm_repeats(self):
        if self.backend == "vllm" and self.no_repeat_ngram_size:
            raise ValueError("`backend` vllm knows no `no_repeat_ngram_size`: set it to 0 or take `transformers`")
        return self


class Evaluation(Decoding):
    """What the finished models write, and how it is scored."""

    datasets: Annotated[list[Name], Field(min_length=1)] = Field(
        description="keys of `datasets`, each a column of the table"
    )
    decode_seeds: Seeds = Field([10, 20, 30, 40, 50], description="each gives one set of answers")
    stemmer: Bool = Field(True, description="ROUGE-L compares Porter stems (as published)")

    _datasets_distinct = field_validator("datasets")(_distinct)
    _seeds_distinct = field_validator("decode_seeds")(_distinct)

    @model_validator(mode="after")
    def _greedy_has_one_seed(self):
        if self.temperature == 0 and len(self.decode_seeds) > 1:
            raise ValueError(
                "`temperature` 0 is greedy: all decode seeds would give the same answers; keep one of `decode_seeds`"
            )
        return self

    def decoding(self) -> Decoding:
        """The part that decides the answers to a prompt, but for the seed."""
        return Decoding(**self.model_dump(include=set(Decoding.model_fields)))


CACHE_PARTS = 8  # of every teacher cache, however many jobs write them: a number of jobs divides it


class Hardware(Settings):
    """Where and how fast, never what: nothing here is a reason to run anything again."""

    gpus: Literal["auto"] | Annotated[Int, Field(ge=0)] = Field(
        "auto", description="GPUs of one training; auto: one where there is one, else the CPU"
    )
    processes: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="processes of one training; by default one for each GPU"
    )
    threads: Annotated[Int, Field(ge=1)] = Field(1, description="CPU threads of a training or generation")
    engine: Literal["plain", "deepspeed"] = Field(
        "plain", description="plain PyTorch (DDP with several processes) or DeepSpeed"
    )
    zero_stage: Annotated[Int, Field(ge=0, le=3)] = Field(
        1, description="ZeRO stage of DeepSpeed: what it shards over the processes"
    )
    micro_batch_size: Annotated[Int, Field(ge=1)] = Field(
        8, description="sequences of one forward pass of one process at most"
    )
    micro_batch_tokens: Annotated[Int, Field(ge=1)] | None = Field(
        None,
        description="tokens (the student's) of one forward pass of one process at most; batches have no padding, so memory follows it",
    )
    generation_batch_size: Annotated[Int, Field(ge=1)] = Field(
        32, description="sequences that a model writes, or reads without learning, at the same time"
    )
    cache_jobs: Literal[1, 2, 4, 8] = Field(
        1, description="jobs, each on a GPU of its own where there are any, that share the work on one teacher's cache"
    )
    gradient_checkpointing: Bool = Field(False, description="compute activations twice and store them once")
    compile: Bool = Field(
        False,
        description="torch.compile of student and live teacher below their heads: minutes at the start, on a CPU hardly faster after it",
    )
    checkpoint_seconds: Annotated[Float, Field(ge=0)] = Field(
        300.0, description="seconds between checkpoints; 0 writes one each step"
    )
    memory_gb: Annotated[Float, Field(gt=0)] = Field(
        16.0, description="memory of a heavy job, GB; a retry asks for as much again"
    )
    disk_gb: Annotated[Float, Field(gt=0)] = Field(
        50.0, description="disk that a job which writes models, checkpoints or a cache may need, GB"
    )
    runtime_hours: Annotated[Float, Field(gt=0)] = Field(
        24.0, description="time limit of a heavy job on a cluster, hours"
    )

    @model_validator(mode="after")
    def _whole_weights_are_compiled(self):
        if self.compile and self.engine == "deepspeed" and self.zero_stage == 3:
            raise ValueError(
                "`compile` needs whole weights, and `zero_stage` 3 takes them apart between layers: take at most 2, or leave `compile` out"
            )
        return self


class Config(Settings):
    """A whole configuration."""

    models: dict[Name, Model] = Field(description="models by name")
    datasets: dict[Name, Data] = Field(description="data sets by name")
    teachers: dict[Name, Teacher] = Field(description="teachers by name")
    methods: dict[Name, dict[str, Any] | None] = Field(
        description="methods by name: their settings, `method:` where the name is not that of the method, `training:` for differences"
    )
    experiments: Annotated[dict[Name, Experiment], Field(min_length=1)] = Field(description="experiments by name")
    text: Text = Field(Text(), description="prompt template and lengths")
    training: Training = Field(
        Training(), description="training of students, and of teachers but for their own differences"
    )
    evaluation: Evaluation = Field(description="generation and scores")
    hardware: Hardware = Field(Hardware(), description="GPUs, processes, memory; no part of any result's identity")
