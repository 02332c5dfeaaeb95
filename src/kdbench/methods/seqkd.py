"""Sequence-level distillation: fine-tuning on what the teacher writes."""

from typing import Annotated

from pydantic import Field, model_validator

from kdbench.methods.base import MethodSettings, Needs
from kdbench.methods.sft import Sft
from kdbench.settings import Float, Int


class SeqkdSettings(MethodSettings):
    """How the teacher answers the training prompts; by default greedily, the mode that the paper approximates by beam search."""

    temperature: Annotated[Float, Field(ge=0)] = Field(
        0.0, description="of the teacher's answers; 0 is greedy decoding"
    )
    top_p: Annotated[Float, Field(gt=0, le=1)] = Field(
        1.0, description="nucleus sampling of the answers; 1 keeps all tokens"
    )
    seed: Annotated[Int, Field(ge=0)] = Field(0, description="of the sampled answers")
    max_new_tokens: Annotated[Int, Field(ge=1)] = Field(256, description="tokens of an answer at most")

    @model_validator(mode="after")
    def _greedy_draws_nothing(self):
        if self.temperature == 0 and (self.top_p != 1 or self.seed != 0):
            raise ValueError(
                "`temperature` 0 is greedy and reads neither `top_p` nor `seed`: take them out or set a temperature"
            )
        return self


class Seqkd(Sft):
    """CE(z_s, ŷ) with ŷ the teacher's answer (Kim and Rush 2016, arXiv 1606.07947). The batches hold ŷ in the reference's place."""

    version = 1
    across_tokenizers = True
    Settings = SeqkdSettings

    @classmethod
    def needs(cls, settings: SeqkdSettings) -> Needs:
        return Needs(teacher="answers")
