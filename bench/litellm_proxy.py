"""LiteLLM's proxy beside us: in a virtual environment of its own, set as its docs say for production."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from bench import frame
from services.local import probes, process

VERSION = "1.108.7"
KEY = "sk-bench"
FOLDER = frame.ROOT / ".framewire" / "bench-litellm"
"""Kept between runs; about 46 s to install."""


def install() -> Path:
    """The folder of its programs. Installs it where it is not there yet."""
    programs = FOLDER / VERSION / "bin"
    if not (programs / "litellm").exists():
        subprocess.run([sys.executable, "-m", "venv", str(programs.parent)], check=True)
        wanted = f"litellm[proxy]=={VERSION}"
        command = [programs / "python", "-m", "pip", "install", "-q", wanted]
        subprocess.run([*map(str, command), "--disable-pip-version-check"], check=True)
    return programs


def service(folder: Path, port: int, upstream: str, workers: int) -> process.Service:
    """Its proxy: a master key, no database (it stores nothing), errors only in the log, as many workers as told."""
    config = {
        "model_list": [
            {
                "model_name": "sora-2",
                "litellm_params": {
                    "model": "openai/sora-2",
                    "api_base": f"{upstream}/v1",
                    "api_key": "sk-upstream",
                },
            }
        ],
        "litellm_settings": {"request_timeout": 600, "set_verbose": False, "json_logs": True},
        "general_settings": {"master_key": KEY},
    }
    path = folder / "litellm.yaml"
    path.write_text(yaml.safe_dump(config))
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # without it, it asks the network when it starts
        "LITELLM_TELEMETRY": "False",
    }
    command = [str(install() / "litellm"), "--config", str(path), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", str(workers), "--telemetry", "False"]

    async def ready() -> bool:
        return await probes.http_status("127.0.0.1", port, "/health/liveliness") == 200

    child = process.Child("litellm", command, env, ready, ready_seconds=180.0, cwd=folder)
    return process.Service(child, folder)
