"""What can be known of models and tokenizers before they are fetched: from the configuration and the JSON files beside it."""

import json
from pathlib import Path

from kdbench.settings import Config, HubModel, InitModel, Model, PathModel


def architecture(model: Model) -> dict | None:
    """Keys of a model's configuration as far as they can be read without fetching it."""
    if isinstance(model, InitModel) and isinstance(model.architecture, dict):
        return model.architecture
    path = {InitModel: lambda: Path(model.architecture), PathModel: lambda: Path(model.path) / "config.json"}.get(
        type(model)
    )
    try:
        return json.loads(path().read_text(encoding="utf-8")) if path and path().is_file() else None
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None


def vocabulary_size(model: Model) -> int | None:
    """Tokens of a model's tokenizer as far as they can be counted without loading it."""
    if isinstance(model, InitModel) and not isinstance(model.tokenizer, str):
        return model.tokenizer.vocabulary_size
    folder = {InitModel: lambda: Path(model.tokenizer), PathModel: lambda: Path(model.path)}.get(type(model))
    tokens = token_ids(folder()) if folder else None
    return len(tokens) if tokens else None


def token_ids(folder: Path) -> dict[str, int] | None:
    """Token -> id of a tokenizer on disk, read from its JSON files; None if it keeps them in another form."""
    try:
        if (folder / "tokenizer.json").is_file():
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            tokens = content["model"]["vocab"]
            tokens = tokens if isinstance(tokens, dict) else {piece: index for index, (piece, _) in enumerate(tokens)}
            return tokens | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        if (folder / "vocab.json").is_file():
            tokens = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            extra = folder / "tokenizer_config.json"
            added = (
                json.loads(extra.read_text(encoding="utf-8")).get("added_tokens_decoder", {}) if extra.is_file() else {}
            )
            return tokens | {token["content"]: int(index) for index, token in added.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return None
    return None


def same_tokenizer(config: Config, one: str, other: str) -> bool | None:
    """Whether two models of the configuration share a tokenizer; None where only the fetched files can tell."""
    if one == other:
        return True
    a, b = config.models[one], config.models[other]
    if isinstance(a, InitModel) and isinstance(b, InitModel) and not isinstance(a.tokenizer, str):
        return a.tokenizer == b.tokenizer
    if isinstance(a, HubModel) and isinstance(b, HubModel) and (a.repository, a.revision) == (b.repository, b.revision):
        return True
    if (isinstance(a, HubModel) and a.shares_tokenizer_with == other) or (
        isinstance(b, HubModel) and b.shares_tokenizer_with == one
    ):
        return True
    ids = [
        token_ids(Path(m.tokenizer if isinstance(m, InitModel) else m.path)) if _on_disk(m) else None for m in (a, b)
    ]
    if None not in ids:
        return ids[0] == ids[1]
    return None if isinstance(a, HubModel) or isinstance(b, HubModel) else False


def _on_disk(model: Model) -> bool:
    return isinstance(model, PathModel) or (isinstance(model, InitModel) and isinstance(model.tokenizer, str))
