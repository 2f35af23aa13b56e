"""Models by hub id: the local folder of a pinned revision."""

import os
import pathlib
import re

from rosepo_jax.errors import UserError

# Safetensors, settings and the tokenizer: no pickles, no code, no second copy of the weights in another layout.
_WANTED = ["model*.safetensors", "model*.safetensors.index.json", "adapter_model.safetensors", "*.json", "*.jinja"]
_WANTED += ["tokenizer.model"]


def is_id(path: str) -> bool:
    """Whether `path` is written like a hub id (OWNER/NAME) and is no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not os.path.exists(path)


def local(path: str, revision: str = "") -> tuple[pathlib.Path, str]:
    """The folder of a model and, for a hub id, the commit it holds; a folder is its own answer, with commit "".

    Errors: UserError when the hub has no such model, wants a login, or cannot be reached and nothing is in its cache.
    """
    if not is_id(path):
        return pathlib.Path(path), ""
    if ".." in revision:  # the cache keeps branches as files of that name
        raise UserError(f"model.revision={revision!r}: not the name of a branch, tag or commit")
    import huggingface_hub
    from huggingface_hub import errors

    by_hand = f"`hf download {path} --local-dir DIR` where there is a connection, then --config.model.path=DIR"
    try:
        folder = huggingface_hub.snapshot_download(path, revision=revision or None, allow_patterns=_WANTED)
    except errors.GatedRepoError:
        raise UserError(f"model.path={path!r}: access must be asked for on its page, then `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise UserError(f"model.path={path!r}, model.revision={revision!r}: the hub has no such model") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"model.path={path!r}: no such folder here, and not to be had from the hub ({type(error).__name__}): "
            f"{by_hand}"
        ) from None
    return pathlib.Path(folder), pathlib.Path(folder).name
