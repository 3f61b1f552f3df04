"""Installed packages, reachable devices and models, what is missing, and the commands that get it.

Of the heavy packages only torch is imported, to list devices, and only where it is installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from packaging.requirements import Requirement

from diffprobe.rundir import package_versions
from diffprobe.zoo import embedded, smollm2


def examine(hub_timeout: float = 3.0) -> dict[str, Any]:
    """Collects what `diffprobe doctor` shows, as plain values.

    Args:
        hub_timeout: seconds that the hub may take to answer.

    Returns:
        ``system``, ``packages`` (name -> installed, needed, fine), ``extras`` (name -> what is missing, command), ``devices``,
        ``models``, ``hub``, and ``mend``: a sentence for each trouble, with the command that resolves it.
    """
    packages, extras = _packages()
    devices, hub, models = _devices(), _hub(hub_timeout), _models()
    broken = [name for name, found in packages.items() if not found["fine"]]
    wanted = " ".join(f"'{packages[name]['needed']}'" for name in broken)
    mend: list[dict[str, Any]] = []
    if broken:
        mend.append({"trouble": f"missing or too old: {', '.join(broken)}", "command": f"pip install {wanted}"})
    optional = [
        (f"for {extra['for']}: {', '.join(extra['missing'])}", extra["command"])
        for extra in extras.values()
        if extra["missing"]
    ]
    if not models["fetched"]:
        optional.append(("smollm2, a real language model", "diffprobe zoo fetch smollm2"))
    if not hub["reachable"]:
        why, command = "it does not answer", "diffprobe extract --model FOLDER   # a copy in diffusers' layout"
        if hub["offline"]:
            why, command = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
        optional.append((f"the hub cannot be reached ({why}): only what is listed can be loaded", command))
    mend += [{"trouble": trouble, "command": command, "optional": True} for trouble, command in optional]
    return {
        "system": {
            "diffprobe": importlib.metadata.version("diffprobe"), "python": platform.python_version(), "platform": platform.platform(),
            "free_bytes": shutil.disk_usage(Path()).free,
        },
        "packages": packages, "extras": extras, "devices": devices, "models": models, "hub": hub, "mend": mend,
    }  # fmt: skip


WHAT_FOR = {
    "smollm2": "reading SmolLM2's weights", "photos": "the demonstration's photographs",
    "hub": "benchmarks in Parquet", "coco": "COCO's masks", "captions": "BLEU and ROUGE", "minilm": "similarity of texts by MiniLM",
    "dev": "tests",
}  # fmt: skip


def _packages() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The required packages, and what each optional group lacks."""
    required: dict[str, dict[str, Any]] = {}
    groups = importlib.metadata.metadata("diffprobe").get_all("Provides-Extra") or []
    lacking: dict[str, list[str]] = {name: [] for name in groups}
    for line in importlib.metadata.requires("diffprobe") or ():
        needed = Requirement(line)
        if needed.name == "diffprobe":
            continue
        there = package_versions([needed.name]).get(needed.name)
        fine = there is not None and needed.specifier.contains(there, prereleases=True)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            required[needed.name] = {"installed": there, "needed": f"{needed.name}{needed.specifier}", "fine": fine}
            continue
        for group in groups:
            if not fine and needed.marker.evaluate({"extra": group}):
                lacking[group].append(needed.name)
    extras = {
        name: {"for": WHAT_FOR.get(name, name), "missing": missing, "command": f"pip install 'diffprobe[{name}]'"}
        for name, missing in lacking.items()
    }
    return required, extras


def _devices() -> list[dict[str, Any]]:
    """The CPU and the devices that torch sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: list[dict[str, Any]] = [{"name": "cpu", "cores": cores, "threads": os.environ.get("OMP_NUM_THREADS", "as many")}]
    if not package_versions(["torch"]):
        return found
    import torch

    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found.append({"name": f"cuda:{number}", "model": about.name, "bytes": about.total_memory})
    if torch.backends.mps.is_available():
        found.append({"name": "mps"})
    return found


def _models() -> dict[str, list[str]]:
    """Names of the models that can be loaded here: embedded, fetched, and in the hub's cache."""
    try:
        smollm2.fetched()
        fetched = [smollm2.NAME]
    except ValueError:
        fetched = []
    cache = _cache()
    cached = sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*"))
    return {"embedded": [name for name, _, _ in embedded()], "fetched": fetched, "cached": cached}


def _cache() -> Path:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def _hub(timeout: float) -> dict[str, Any]:
    """Whether the hub may be asked and answers, and whether there is a token."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    reachable = False
    if not offline:
        try:
            socket.create_connection((address.hostname or "", address.port or 443), timeout).close()
            reachable = True
        except OSError:
            pass
    return {
        "address": address.hostname, "offline": offline, "reachable": reachable, "token": bool(os.environ.get("HF_TOKEN")),
        "cache": str(_cache()),
    }  # fmt: skip


def describe(found: Mapping[str, Any]) -> str:
    """What `examine` found, as text."""
    system, hub, models = found["system"], found["hub"], found["models"]
    lines = [f"diffprobe {system['diffprobe']}, Python {system['python']}, {system['platform']}"]
    lines += [f"{system['free_bytes'] / 1e9:.1f} GB are free here", "", "packages"]
    for name, package in found["packages"].items():
        lines.append(
            f"  {'✓' if package['fine'] else '✗'} {name:<16} {package['installed'] or 'missing':<12} needs {package['needed']}"
        )
    lines += ["", "optional groups"]
    for name, extra in found["extras"].items():
        lines.append(f"  {'✗' if extra['missing'] else '✓'} {name:<16} {extra['for']}")
    lines += ["", "devices"]
    for device in found["devices"]:
        size = f", {device['bytes'] / 2**30:.0f} GiB" if "bytes" in device else ""
        what = device.get("model") or (f"{device['cores']} cores, threads: {device['threads']}" if "cores" in device else "")
        lines.append(f"  {device['name']:<18} {what}{size}")
    if len(found["devices"]) == 1:
        lines.append("  no GPU is seen; --device cpu is the default")
    lines += ["", "models"]
    for kind, names in models.items():
        lines.append(f"  {kind:<18} {', '.join(names) or 'none'}")
    state = "offline (HF_HUB_OFFLINE)" if hub["offline"] else "answers" if hub["reachable"] else "does not answer"
    lines += [f"  {'hub':<18} {hub['address']} {state}; cache {hub['cache']}; token {'set' if hub['token'] else 'not set'}", ""]
    needed = [one for one in found["mend"] if not one.get("optional")]
    lines.append("Everything that is needed is there." if not needed else "Needed:")
    lines += [f"  {one['trouble']}\n    {one['command']}" for one in needed]
    optional = [one for one in found["mend"] if one.get("optional")]
    lines += ["", "Only if you want it:"] if optional else []
    lines += [f"  {one['trouble']}\n    {one['command']}" for one in optional]
    return "\n".join(lines)
