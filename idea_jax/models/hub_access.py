"""Reaching the Hugging Face Hub: whether it answers, and fetching files of a repository."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from idea_jax.errors import InputError

# huggingface_hub itself retries for about 23 s before it says that there is no network. No network
# is mostly told at once; a slow name server or proxy has as long as huggingface_hub gives it.
PROBE_SECONDS = 10.0


PORTS = {"https": 443, "socks5": 1080, "socks5h": 1080, "socks4": 1080}


class CheckpointNotFound(InputError, FileNotFoundError):
    """No usable checkpoint under the given name; the message says what to do."""


def check_cache(name: str) -> None:
    """Raises CheckpointNotFound if the Hub's cache would be in a home folder that is not there."""
    from huggingface_hub import constants

    if constants.HF_HUB_CACHE.startswith("~"):
        raise CheckpointNotFound(
            f"there is no folder {name}, and no home folder for the cache of the Hub: set HOME, or "
            "HF_HOME to a folder that can be written"
        )


def fetch(repository: str, revision: str | None, wanted: Callable[[list[str]], list[str]]) -> Path:
    """Fetches what `wanted` makes of a repository's files; it raises if they lack something."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        # Before gigabytes are fetched: is all there that is read?
        patterns = wanted(HfApi().list_repo_files(repository, revision=revision))
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except CheckpointNotFound:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointNotFound(
            f"{repository} asks for its terms to be accepted: do so on its page on the Hub, then "
            "log in (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointNotFound(
            f"there is no folder {repository}, and the Hub has no public repository of that name: "
            "check the spelling; for a private one log in (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointNotFound(f"{repository} has no revision {revision!r} on the Hub") from error
    except Exception as error:  # of the HTTP library beneath, of a proxy, of the disk
        raise CheckpointNotFound(f"downloading {repository} failed: {error}") from error
    return Path(folder)


def reachable(endpoint: str) -> bool:
    """Whether the endpoint's host, or the proxy in front of it, answers within PROBE_SECONDS."""
    url = urlsplit(endpoint)
    proxies = getproxies()  # those that huggingface_hub's HTTP library takes, too
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(url.hostname):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (url.hostname, url.port or PORTS.get(url.scheme, 80))
    answered = threading.Event()

    def connect():
        try:
            socket.create_connection(address, timeout=PROBE_SECONDS).close()
        except OSError:
            return
        answered.set()

    # In a thread, because looking up a host name cannot be given a time limit.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
