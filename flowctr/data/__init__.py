"""csv and parquet tables through FuxiCTR's encoders into h5, and from h5 into batches."""

from importlib import import_module

_HOMES = {
    "Encoder": "encode",
    "H5DataLoader": "h5",
    "build_h5": "build",
    "data_digest": "build",
    "load_feature_map": "build",
    "scenario_names": "format",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    # Late, so that a build does without torch, and a loader without polars.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
