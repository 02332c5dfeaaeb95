"""What the golden group whole_model is of: real texts, small models with deterministic weights, methods with such projectors."""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from kdbench import methods, models
from kdbench.alignment import spelling
from kdbench.alignment.pairs import align
from kdbench.alignment.vocabulary import texts_of
from kdbench.data import batches
from kdbench.data.tokens import Tokens
from kdbench.methods.base import Needs, Shape
from kdbench.signals import Signal, Step
from tests.golden import golden, real

SIDES = ("student", "teacher")


@dataclass(frozen=True)
class Whole:
    """A case, and what its `setup` says.

    Attributes:
        case: from the json.
    """

    case: dict

    @property
    def setup(self) -> dict:
        return self.case["setup"]

    def tokenizer(self, side: str):
        return real.tokenizer(self.setup[f"{side}_type"])

    @cached_property
    def tokens(self) -> Tokens:
        """The rows as the workflow tokenises them; nothing is cut, so they are the published ones (see test_collate.py)."""
        names = (self.setup[f"{side}_type"] for side in SIDES)
        found = real.tokens(self.setup["rows"], *names, real.text(self.setup))
        assert found.prompts_cut == found.responses_cut == 0
        return found

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """Student and teacher, filled."""
        return {side: _model(side, self.setup[f"{side}_model"], self.setup[f"{side}_seed"]) for side in SIDES}

    def batch(self, needs: Needs) -> batches.Batch:
        """What the training loop would collate for a method."""
        tokens, spelled = self.tokens, None
        if needs.alignment == "dtw" or needs.spelling:
            spelled = spelling.spell(tokens, *(texts_of(self.tokenizer(side)).texts for side in SIDES))
        return batches.collate(
            tokens,
            range(tokens.rows),
            teacher=True,
            pairing=needs.alignment,
            alignment=align(tokens) if needs.alignment == "byte" or needs.chunks else None,
            spelling=spelled,
            chunks=needs.chunks,
            costs=needs.spelling,
        )

    def signals(self, batch: batches.Batch, whole_heads: bool = True) -> tuple[Signal, Signal]:
        """Student and teacher on a batch. The published code compares all rows of a head; `whole_heads=False`: tokens alone, as ours."""
        return tuple(
            models.signal(model, getattr(batch, side), self.size(side, whole_heads))
            for side, model in self.models.items()
        )

    def size(self, side: str, whole_head: bool = True) -> int:
        """Rows of a head, or tokens of its tokenizer."""
        return self.models[side].config.vocab_size if whole_head else len(self.tokenizer(side))

    def method(self, kind, settings: dict, vocabulary=None):
        """A method, by its name or class, with the published projectors."""
        kind = methods.get(kind) if isinstance(kind, str) else kind
        shapes = []
        for side, model in self.models.items():
            widths = (of.weight.shape[1] for of in (model.get_output_embeddings(), model.get_input_embeddings()))
            shapes.append(Shape(*widths, self.size(side, whole_head=vocabulary is None)))
        method = kind(kind.Settings(**settings), *shapes, vocabulary)
        with torch.no_grad():
            for parameter_name, parameter in method.named_parameters():
                parameter.copy_(self.projector(parameter_name, parameter.shape))
        return method

    def projector(self, name: str, shape) -> Tensor:
        """The published weights of one of our parameters."""
        weights, biases = (0.2, 0.1) if "salience" in name else (0.15, 0.05)  # scales, see the notes in the json
        scale = weights if name.endswith("weight") else biases
        array = golden.formula().formula_array(self.setup["projector_seed"], published_name(name), tuple(shape), scale)
        found = torch.from_numpy(array)
        if name.endswith("t2s.bias"):
            token, factor = self.setup["t2s_bias"]
            found += factor * self.models["student"].get_output_embeddings().weight[token].detach()
        return found

    def run(self, method, vocabulary=None):
        """A method's batch, student's signal and terms."""
        batch = self.batch(method.needs(method.settings))
        student, teacher = self.signals(batch, whole_heads=vocabulary is None)
        step = Step(pairs=batch.pairs, chunks=batch.chunks, spelling=batch.spelling)
        return student, method(student, teacher, step)

    def gradients(self, total: Tensor, method=None) -> dict[str, Tensor]:
        """Of every parameter that gets one, under the published names."""
        named = dict(self.models["student"].named_parameters())
        named |= {published_name(name): parameter for name, parameter in method.named_parameters()} if method else {}
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True, retain_graph=True)
        return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}

    def published_inputs(self, side: str) -> dict[str, Tensor]:
        """What the published collator makes: batches of the full width, padded with the end of text, and their labels."""
        column, width = getattr(self.tokens, side), self.setup["max_length"]
        ids = torch.full((column.rows, width), self.tokenizer(side).eos_token_id)
        found = {
            "input_ids": ids,
            "label": torch.full_like(ids, golden.IGNORED),
            "attention_mask": torch.zeros_like(ids),
        }
        found["position_ids"] = torch.zeros_like(ids)
        for row in range(column.rows):
            sequence, prompt = torch.from_numpy(column.row(row)).long(), int(column.prompt_lengths[row])
            last = len(sequence) - 1
            found["input_ids"][row, :last] = sequence[:-1]
            found["label"][row, prompt - 1 : last] = sequence[prompt:]
            found["attention_mask"][row, :last] = 1
            found["position_ids"][row, :last] = torch.arange(last)
        return found

    def published_outputs(self, side: str) -> dict[str, Tensor]:
        """Logits and final states at every position of these, padding too, beside them."""
        inputs = self.published_inputs(side)
        names = ["input_ids", "attention_mask"] + ["position_ids"] * (self.setup[f"{side}_type"] == "gpt2")
        output = self.models[side](**{name: inputs[name] for name in names}, output_hidden_states=True, use_cache=False)
        return inputs | {"logits": output.logits, "hidden": output.hidden_states[-1]}


@cache
def _model(side: str, name: str, seed: int):
    """A model of the json; the cases share theirs, whose weights nothing here changes."""
    import transformers

    kind, keys = golden.read("whole_model")["model_configs"][name]
    cls = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM"))
    config = getattr(transformers, f"{kind}Config")(**keys, attn_implementation="eager")
    model = golden.formula().fill_model(cls(config), seed).eval()
    return model.requires_grad_(side == "student")


def published_name(name: str) -> str:
    """The published name of one of our parameters: t2s.weight, of whatever part, is projectors.t2s.0.weight."""
    *_, projector, kind = name.split(".")
    return f"salience.{kind}" if projector == "salience" else f"projectors.{projector}.0.{kind}"
