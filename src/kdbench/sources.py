"""Where models come from: made from a seed, a local folder, the hub. All end as one folder with safetensors, tokenizer and manifest."""

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from kdbench import files, models
from kdbench.errors import UserError
from kdbench.settings import HubModel, InitModel, Model, PathModel, TrainedTokenizer

_WANTED = ["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt", "*.tiktoken"]
_CODE = ["*.py"]  # only of models that are trusted
_UNWANTED = ["*/*", "consolidated*", files.MANIFEST]  # other formats of the same weights


def fetch(settings: Model, folder, records=None) -> None:
    """Bring a model to `folder`, check it, and write its manifest.

    Args:
        settings: where it comes from.
        records: folder of the records to train its tokenizer on, where the settings ask for that.

    Raises:
        UserError: it cannot be had, has no safetensors or tokenizer, or a vocabulary smaller than its tokenizer.
    """
    part = files.fresh_folder(folder)
    if isinstance(settings, InitModel):
        _make(settings, part, records)
    elif isinstance(settings, PathModel):
        _link(settings, part)
    else:
        _download(settings, part)
    facts = _check(part, getattr(settings, "trust_remote_code", False))
    files.write_manifest(part, "model", **facts)
    files.finish_folder(folder)


def _make(settings: InitModel, part: Path, records) -> None:
    if isinstance(settings.tokenizer, TrainedTokenizer):
        tokenizer = models.train_tokenizer(_texts(records), settings.tokenizer)
    else:
        tokenizer = models.load_tokenizer(settings.tokenizer)
    model = models.create(settings, tokenizer)
    models.check_head(model, tokenizer)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)


def _texts(folder):
    """Prompts and responses to train a tokenizer on. The template is always the short one: its markers are what matters."""
    from kdbench.data.records import load
    from kdbench.data.text import full_prompt

    for record in load(folder):
        yield full_prompt(record, "short")
        yield from record.outputs


def _wanted(settings: PathModel | HubModel) -> list[str]:
    return _WANTED + (_CODE if settings.trust_remote_code else [])


def _link(settings: PathModel, part: Path) -> None:
    source, wanted = Path(settings.path), _wanted(settings)
    if not source.is_dir():
        raise UserError(f"{source} is no folder: `path` of a model names one with config.json, tokenizer and weights")
    for file in sorted(source.iterdir()):
        name = file.name
        if any(fnmatch(name, kind) for kind in wanted) and not any(fnmatch(name, kind) for kind in _UNWANTED):
            # a relative link counts from where its folder really is: `resources` may be a link to another disk
            os.symlink(os.path.relpath(source.resolve() / name, part.resolve()), part / name)


def _download(settings: HubModel, part: Path) -> None:
    """Fetch into a folder of this revision beside `part`, which stays when the download breaks off: the next attempt goes on from there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"{settings.repository}@{settings.revision[:8]}"
    fetched = part.with_name(f"{part.stem}.{settings.revision}")
    try:
        snapshot_download(
            settings.repository,
            revision=settings.revision,
            local_dir=fetched,
            allow_patterns=_wanted(settings),
            ignore_patterns=_UNWANTED,
        )
    except GatedRepoError:
        raise UserError(
            f"{name} is gated: ask for access on its page, then set HF_TOKEN to a token of that account"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{name}: the hub has no such model, or it is private (HF_TOKEN)") from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: the model has no such commit; `revision` is one of its history on the hub") from None
    except (HTTPError, OSError) as error:
        raise UserError(f"{name} cannot be fetched: {_first_line(error).removeprefix('Got: ')}") from None
    shutil.rmtree(fetched / ".cache")
    os.replace(fetched, part)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check(part: Path, trust_remote_code: bool) -> dict:
    from transformers import AutoConfig

    if not any(part.glob("*.safetensors")):
        raise UserError(f"{part}: no weights in safetensors; weights in pickle files could run code and are not loaded")
    try:
        config = AutoConfig.from_pretrained(part, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{part}: its config.json cannot be used ({_first_line(error)})") from None
    tokenizer = models.load_tokenizer(part, trust_remote_code)
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"{part}: vocab_size {config.vocab_size} does not fit its tokenizer, which has {len(tokenizer)} tokens"
        )
    facts = {"architecture": config.model_type, "vocabulary": len(tokenizer), "vocabulary_rows": config.vocab_size}
    return facts | ({"trust_remote_code": True} if trust_remote_code else {})
