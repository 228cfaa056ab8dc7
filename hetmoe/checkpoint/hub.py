"""Models by their name on the Hugging Face hub, through its own client and cache."""

import re
from pathlib import Path

from hetmoe.errors import InputError

CONFIG = "config.json"
# What a model needs; pickled weights and second copies in other layouts are never fetched.
_FILES = [CONFIG, "*.safetensors", "model.safetensors.index.json", "tokenizer.json"]
_NOT = ["consolidated*", "*/*"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)


def looks_like_hub_id(name: str) -> bool:
    """Whether a string has the form `owner/name` or `owner/name@revision`."""
    return _ID.fullmatch(name) is not None and ".." not in name


def download(hub_id: str, *, config_only: bool = False) -> Path:
    """The local snapshot of a model on the hub, or only its config, downloaded where the cache lacks it.

    Raises:
        InputError: if the hub cannot be reached and the cache lacks the model, or if there is no such model, or no
            access to it; the message says what to do.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (slow to import, and most models are local)
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = hub_id.partition("@")
    try:
        files = [CONFIG] if config_only else _FILES
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files, ignore_patterns=_NOT))
    except GatedRepoError:
        reason = f"needs permission: ask for it on https://huggingface.co/{name}, then run 'hf auth login'"
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r} there"
    except RepositoryNotFoundError:
        reason = "does not exist or is private: check the name, or run 'hf auth login'"
    except HFValidationError as error:
        reason = f"is not a valid name on the hub ({str(error).splitlines()[0]})"
    except Exception as error:  # noqa: BLE001 (the client, its transfer library and its network library raise many kinds)
        if isinstance(error, OSError) and error.errno is not None:
            reason = f"cannot be stored in the hub's cache ({error.strerror})"
        else:
            reason = (
                "is not in the hub's cache and the hub cannot be reached; on a machine with access run "
                f"'hf download {name} --local-dir DIR' and give DIR here ({type(error).__name__})"
            )
    raise InputError(f"model {hub_id!r}: no such directory, and as a name on the hub it {reason}")
