"""Ask the hub once what many files are, so that each of them costs one more request, not two."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from step37_data.caches.lengths import write_atomically

logger = logging.getLogger(__name__)

# A larger file is left to the client's own download, which streams it and goes on where it broke
# off: here a file is read into memory.
_LARGEST = 32 << 20


@dataclass(frozen=True, kw_only=True)
class HubListing:
    """What the hub has at one commit of a data set.

    ``hf_hub_download`` asks for the header of a file, which has its hash and commit, and then for
    the file. A listing tells the hashes of a thousand files in one request, so what remains is the
    request for the file.

    Attributes:
        repo_id: data set on the hub.
        endpoint: URL of the hub; None is the one ``huggingface_hub`` is set to.
        commit: hash of the commit.
        hashes: by name the SHA-256 of a file that the hub stores apart, and git's hash of the blob
            of a small one. Large files are left out.
    """

    repo_id: str
    endpoint: str | None
    commit: str
    hashes: Mapping[str, str]

    @classmethod
    def of(
        cls, *, repo_id: str, folder: str, revision: str | None, endpoint: str | None
    ) -> HubListing | None:
        """List a folder of the data set, a request for every thousand files in it and one more.

        Returns:
            None where the hub does not list it: some mirrors hand out files and nothing else. A
            download then asks for the header of every file.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.hf_api import RepoFile

        hub = HfApi(endpoint=endpoint)
        # A mirror may answer with anything: no JSON, or none of this form.
        failures = (OSError, HfHubHTTPError.__bases__[0], ValueError, TypeError, KeyError)
        try:
            commit = hub.dataset_info(repo_id, revision=revision).sha
            if commit is None:
                raise ValueError("the hub does not tell the commit")
            entries = hub.list_repo_tree(
                repo_id, folder, recursive=True, revision=commit, repo_type="dataset"
            )
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
        except failures as error:
            logger.info("%s: asking for every header, not listed: %s", repo_id, error)
            return None
        hashes = {
            file.path: file.blob_id if file.lfs is None else file.lfs.sha256
            for file in files
            if file.size <= _LARGEST
        }
        return cls(repo_id=repo_id, endpoint=endpoint, commit=commit, hashes=hashes)

    def download(self, name: str, path: Path, note: Path) -> None:
        """Write the file ``name`` to ``path``, and to ``note`` what hash it has to have.

        The client waits and asks again where the hub limits requests or is down for a moment. The
        content is not compared with the hash here. The note has the form of the client's own.

        Raises:
            OSError, or an error of the HTTP library: the hub did not give the file.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        url = hf_hub_url(
            self.repo_id,
            name,
            repo_type="dataset",
            revision=self.commit,
            endpoint=self.endpoint,
        )
        response = http_backoff("GET", url, headers=build_hf_headers())
        hf_raise_for_status(response)
        for each in (path, note):
            os.makedirs(each.parent, exist_ok=True)
        # The note comes first: a file without one counts as the user's own, and is not compared.
        told = f"{self.commit}\n{self.hashes[name]}\n{time.time()}\n"
        write_atomically(note, told.encode())
        write_atomically(path, response.content)
