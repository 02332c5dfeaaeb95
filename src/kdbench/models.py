"""Models and tokenizers: making, loading, reading, saving them. With `packing` the only place that knows transformers and peft by name."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench import files, packing
from kdbench.data.batches import Side
from kdbench.errors import UserError
from kdbench.methods.base import Shape
from kdbench.settings import Hardware, InitModel, Lora, TrainedTokenizer
from kdbench.signals import Head, Rows, Signal

END, PADDING = (
    "<|endoftext|>",
    "<|pad|>",
)  # the former is what tokenizer classes of GPT2 and Qwen2 would add of themselves
LORA_DEFAULTS = ["q_proj", "v_proj", "c_attn"]  # peft's own defaults for the architectures of the published scripts
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train_tokenizer(texts, settings: TrainedTokenizer):
    """Byte-level BPE with an end and a padding token of its own.

    Args:
        texts: iterable of strings to train on.
        settings: its size.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary_size,
        special_tokens=[END, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING)


def create(settings: InitModel, tokenizer):
    """A model with random weights, the same for the same settings whatever was drawn before.

    Raises:
        UserError: transformers does not know the architecture or one of its keys; the vocabulary is smaller than the tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = settings.architecture if isinstance(settings.architecture, dict) else files.read_json(settings.architecture)
    keys = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None} | keys
    keys["pad_token_id"] = tokenizer.pad_token_id
    keys["eos_token_id"] = tokenizer.eos_token_id
    try:
        config = AutoConfig.for_model(**keys)
        if config.vocab_size < len(tokenizer):
            raise UserError(
                f"vocab_size {config.vocab_size} of the architecture is smaller than its tokenizer ({len(tokenizer)} tokens)"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"architecture {json.dumps(settings.architecture)} is not understood: {error}") from None


def load_tokenizer(folder, trust_remote_code: bool = False):
    """A tokenizer with an end-of-text token; special tokens in a user's text are read as text.

    Raises:
        UserError: there is none, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, split_special_tokens=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer can be loaded ({str(error).splitlines()[0]})") from None
    if len(tokenizer) <= len(
        tokenizer.all_special_ids
    ):  # transformers makes an empty one where there are no files of one
        raise UserError(f"{folder}: it holds no tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no end-of-text token")
    return tokenizer


def quiet() -> None:
    """No progress bars of transformers while it reads and writes weights: in a log they are noise."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def padding_id(tokenizer) -> int:
    """What to pad with: masks, never ids, tell padding from text, so the end-of-text token will do where there is no other."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load(folder, precision: str = "fp32", trust_remote_code: bool = False, train: bool = False):
    """A causal language model from a folder: full weights, or a LoRA adapter on the base model that it names.

    Args:
        folder: Hugging Face or peft format; weights in safetensors.
        precision: "fp32" or "bf16", of the weights in memory.
        train: ready to be trained; else without gradients, in evaluation mode.

    Raises:
        UserError: the folder holds no such model; its head is not a linear map of its last hidden state.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    options = {"dtype": DTYPES[precision], "trust_remote_code": trust_remote_code, "use_safetensors": True}
    try:
        if (folder / "adapter_config.json").exists():
            from peft import PeftModel

            base = files.read_json(folder / "adapter_config.json")["base_model_name_or_path"]
            model = AutoModelForCausalLM.from_pretrained(base, **options)
            model = PeftModel.from_pretrained(model, folder, is_trainable=train, autocast_adapter_dtype=False)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: no model can be loaded ({str(error).splitlines()[0]})") from None
    model.config.use_cache = False
    if not train:
        model.requires_grad_(False)
    model.train(train)
    return model


def outline(folder, trust_remote_code: bool = False):
    """A causal language model without its weights, on PyTorch's meta device: its sizes are known before gigabytes are read.

    Args:
        folder: as for `load`; of an adapter its base model.
        trust_remote_code: as for `load`.

    Raises:
        UserError: the folder holds no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter = Path(folder) / "adapter_config.json"
    base = files.read_json(adapter)["base_model_name_or_path"] if adapter.exists() else folder
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no model can be loaded ({str(error).splitlines()[0]})") from None


def device(gpus: int | str) -> torch.device:
    """Where a single process computes: a GPU if `hardware.gpus` allows it and there is one."""
    return torch.device("cuda") if gpus != 0 and torch.cuda.is_available() else torch.device("cpu")


def for_inference(folder, hardware: Hardware, precision: str = "fp32"):
    """A model without gradients on its device, and its tokenizer.

    Args:
        folder: the model, or its manifest; both are checked.
        hardware: GPUs and threads.
        precision: "fp32" or "bf16", of the weights.

    Raises:
        UserError: the model is missing, damaged or cannot be loaded.
    """
    trusted = files.read_manifest(folder, "model").get("trust_remote_code", False)
    torch.set_num_threads(hardware.threads)
    model = load(files.folder_of(folder), precision, trusted)
    return model.to(device(hardware.gpus)), load_tokenizer(files.folder_of(folder), trusted)


def add_adapters(model, settings: Lora):
    """Freeze a model and put LoRA adapters on it.

    Raises:
        UserError: the model has none of the layers that are to get one.
    """
    from peft import LoraConfig, get_peft_model

    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = settings.target_modules or [name for name in LORA_DEFAULTS if name in present]
    if not targets or not set(targets) <= present:
        raise UserError(f"lora.target_modules {targets or LORA_DEFAULTS}: the model has no such layers")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def save(model, folder, source, weights: dict[str, Tensor], trust_remote_code: bool = False) -> None:
    """Write a trained model so that others load it with nothing of ours: Hugging Face format, or a peft adapter; with its tokenizer.

    Args:
        model: as `load` or `add_adapters` gave it.
        folder: where to.
        source: folder that it was loaded from: of its tokenizer, and an adapter's base model, under this very path.
        weights: what was trained, by parameter name; float32.
        trust_remote_code: as for `load`.
    """
    from transformers import AutoTokenizer, GenerationConfig

    folder = Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if hasattr(model, "peft_config"):
        model.peft_config[model.active_adapter].base_model_name_or_path = str(source)
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        described = files.read_json(folder / "adapter_config.json")
        described["target_modules"] = sorted(described["target_modules"])  # peft writes a set, in any order
        files.write_json(folder / "adapter_config.json", described)
    else:
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": padding_id(tokenizer)}
        model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ends)
        model.config.use_cache = True
        model.save_pretrained(folder, state_dict=weights)
        model.config.use_cache = False
        described = files.read_json(folder / "config.json") | {
            "dtype": "float32"
        }  # DeepSpeed's model is bf16, its weights are not
        files.write_json(folder / "config.json", described)
    tokenizer.save_pretrained(folder)


def transformer(model) -> nn.Module:
    """The part of a causal language model below its head, adapters included."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return inner.base_model


def head(model, size: int) -> Head:
    """Its language model head.

    Args:
        size: number of tokens of its tokenizer.
    """
    layer = model.get_output_embeddings()
    return Head(layer.weight, size, getattr(layer, "bias", None))


def embed(model):
    """Its input embeddings as a function of ids."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()

    def look_up(ids: Tensor) -> Tensor:
        found = table(ids)
        _ = (
            head.weight
        )  # where it is the table's, ZeRO stage 3 has just put it away; reading it brings it back for the losses
        return found

    return look_up


def shape(model, tokenizer) -> Shape:
    """The sizes that projectors are built from."""
    return Shape(
        hidden=model.get_output_embeddings().weight.shape[1],
        embedding=model.get_input_embeddings().weight.shape[1],
        vocabulary=len(tokenizer),
    )


def pack(model) -> bool:
    """Let a model read batches without padding from now on, if it can; whether it can. One that cannot has its batches padded."""
    return packing.enable(transformer(model))


def compile_body(model) -> None:
    """Let torch.compile make the part of a model below its head faster, for any number of tokens in a batch; in place, no name changes.

    To be called after `pack`, which tries a model out. The first batches then take minutes; another number of sequences in a batch takes as
    long once more.

    Raises:
        UserError: on a CPU, where there is no C++ compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if model.device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                "hardware.compile: this machine has no C++ compiler (g++, clang++ or what the variable CXX names): "
                "install one, or set `compile: false`"
            ) from None
    transformer(model).compile(dynamic=True)


def response_rows(model, side: Side) -> Rows:
    """Run a model over one side of a batch and keep the final hidden states that predict response tokens."""
    return rows(packing.states(transformer(model), side)[side.positions], side)


def rows(hidden: Tensor, side: Side) -> Rows:
    """The response rows of one side of a batch.

    Args:
        hidden: (n, d) final hidden states at its response positions.
        side: the tensors of the batch.
    """
    inputs = side.input_ids[side.positions]
    return Rows(hidden, side.targets, side.sequence, side.counts, inputs)


def signal(model, side: Side, size: int) -> Signal:
    """One model's side of a batch, by running it."""
    return Signal(response_rows(model, side), head(model, size), embed(model))


def check_head(model, tokenizer) -> None:
    """Make sure that logits are `hidden @ weight.T (+ bias)`: losses compute them so, and the teacher's cache relies on it.

    Raises:
        UserError: the model scales, caps or shifts its logits.
    """
    ids = torch.arange(min(8, len(tokenizer)), device=model.device)[None]
    training = model.training
    model.eval()  # dropout would differ between the two passes
    with torch.no_grad():
        hidden = transformer(model)(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
        ours = linear(hidden, head(model, len(tokenizer)))
    model.train(training)
    if not torch.allclose(ours.float(), logits.float(), rtol=1e-2, atol=1e-2 * logits.float().abs().max().item()):
        raise UserError(
            f"{model.config.model_type}: its logits are no linear map of its last hidden state; such models are not supported"
        )


def check_positions(model, longest: int) -> None:
    """Make sure that a model has a position for every token of the texts it is to read.

    Args:
        model: causal language model.
        longest: tokens of the longest text.

    Raises:
        UserError: it has not.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserError(f"the model has {limit} positions, the longest record {longest} tokens: lower text.max_tokens")


def linear(hidden: Tensor, of: Head) -> Tensor:
    """All logits at once, (..., V): for checks and small things; losses go through `losses.vocabulary`."""
    logits = hidden @ of.weight.to(hidden.dtype).T
    return logits if of.bias is None else logits + of.bias
