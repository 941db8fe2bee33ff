"""What has to be known about the installed fuxictr: import it without ray, and say which one it is."""

import hashlib
import importlib.util
import sys
from pathlib import Path


def import_fuxictr_without_ray() -> None:
    """Makes ``fuxictr.preprocess`` importable without executing its ``__init__``, which imports ray.

    ``fuxictr.pytorch.layers`` needs only ``fuxictr.preprocess.tokenizer``, yet importing that runs the package's
    ``__init__``, and with it ray: seconds at every start, and a hard dependency of plain training. The package is
    registered with its path alone, so its submodules import as usual; its own names (``build_dataset``,
    ``FeatureProcessor``) run the original ``__init__`` when they are first asked for. Does nothing when
    ``fuxictr.preprocess`` is imported already.
    """
    name = "fuxictr.preprocess"
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    package = importlib.util.module_from_spec(spec)

    def run_original_init(attribute: str):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        del package.__getattr__
        spec.loader.exec_module(package)
        return getattr(package, attribute)

    package.__getattr__ = run_original_init
    sys.modules[name] = package
    sys.modules["fuxictr"].preprocess = package


def fuxictr_origin() -> dict[str, str]:
    """Names the fuxictr in use: version and a digest over its Python files.

    The wheel and the repository carry the same version number with different code, so a version alone does not say
    what produced a result.

    Returns:
        ``{"version": ..., "sha256": ...}``, see `python_digest`.
    """
    import fuxictr

    return {"version": fuxictr.__version__, "sha256": python_digest(Path(fuxictr.__file__).parent)}


def python_digest(root: Path) -> str:
    """Digests the Python files below a folder: their relative paths and contents, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
