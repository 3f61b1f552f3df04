"""Language models that read features: what they write, whether it was seen or leaked, and how well they answer.

`captions`, `verdict` and `evaluate` take texts and numbers and know no torch.

Importing this package, as `import diffprobe` does, makes saved models known to the auto classes of transformers without
importing transformers, which takes seconds: `_Watch` waits until somebody else imports them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto.configuration_auto"  # every auto class imports it


class _Watch(MetaPathFinder):
    """Finds the module of `AutoConfig` as Python would, and registers our config after it ran."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == _AUTO else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            import_module("diffprobe.mllm.auto_config")

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if _AUTO in sys.modules:
    import_module("diffprobe.mllm.auto_config")
else:
    sys.meta_path.insert(0, _Watch())
