"""An environment beside ``.venv`` that holds certain releases, for tests of a lane of its own."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.bootstrap import ROOT, say


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a folder of the checkout is to hold, made once and again when that changes."""

    folder: str
    """Its name in the checkout."""
    python: str
    """The interpreter that it is made with: a path."""
    installs: tuple[tuple[str, ...], ...]
    """Arguments of ``pip install``, one call after the other."""

    @property
    def executable(self) -> Path:
        """The environment's own interpreter."""
        return ROOT / self.folder / "bin" / "python"

    def set_up(self) -> None:
        """Make it, unless its stamp says that it is what is wanted.

        Raises:
            SystemExit: pip could not install something; its own words are on stderr.
        """
        stamp = ROOT / self.folder / "step37.stamp"
        wanted = self._fingerprint()
        if stamp.exists() and stamp.read_text() == wanted and self.executable.exists():
            return
        say(f"creating {self.folder} with {self.python} (a few minutes on a first run)")
        shutil.rmtree(ROOT / self.folder, ignore_errors=True)
        subprocess.run([self.python, "-m", "venv", str(ROOT / self.folder)], check=True)
        for arguments in self.installs:
            self._pip(arguments)
        stamp.write_text(wanted)

    def pytest(self, *arguments: str, variables: dict[str, str] | None = None) -> int:
        """Run pytest in the checkout.

        Args:
            arguments: of pytest.
            variables: of its environment, beside those of this process.

        Returns:
            Its exit status.
        """
        jobs = os.environ.get("JOBS", "auto")
        command = [str(self.executable), "-m", "pytest", "-n", jobs, *arguments]
        given = {**os.environ, **(variables or {})}
        return subprocess.run(command, cwd=ROOT, env=given, check=False).returncode

    def _fingerprint(self) -> str:
        ask = [self.python, "-c", "import sys; print(sys.version, sys.executable)"]
        interpreter = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
        parts = [(ROOT / "pyproject.toml").read_text(), interpreter, repr(self.installs)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _pip(self, arguments: tuple[str, ...]) -> None:
        # Byte code is compiled as it is imported: most of it never is.
        command = [str(self.executable), "-m", "pip", "install", "--quiet", "--no-compile"]
        command += ["--disable-pip-version-check", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        # Requirements that are left unmet on purpose are warned of at length: told on failure only.
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise SystemExit(f"pip install {' '.join(arguments)} failed")
