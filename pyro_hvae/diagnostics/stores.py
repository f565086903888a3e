"""Stores for chunks of draws: memory, or a file, with one chunk in memory at a time.

A file is written under a temporary name and renamed once it is complete; an existing one is not overwritten.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # no import of xarray with the package: it changes the filters of warnings
    import xarray as xr

__all__ = ["Memory", "NetCDF", "Zarr", "open_store"]

Groups = dict[str, dict[str, np.ndarray]]
MakeTree = Callable[[Groups], "xr.DataTree"]


class Memory:
    """All draws of all groups, in arrays that are allocated once.

    Args:
        make_tree: builds the tree of arrays ``(chain, draw, ...)`` by group.
        num_draws: S.
    """

    def __init__(self, make_tree: MakeTree, num_draws: int) -> None:
        self.make_tree, self.num_draws = make_tree, num_draws
        self.arrays: Groups = {}

    def append(self, start: int, chunk: Groups) -> None:
        """Store draws ``start, start + 1, ...`` of every chain."""
        for group, values in chunk.items():
            into = self.arrays.setdefault(group, {})
            for name, value in values.items():
                if name not in into:
                    into[name] = np.empty((len(value), self.num_draws, *value.shape[2:]), value.dtype)
                into[name][:, start : start + value.shape[1]] = value

    def finish(self) -> xr.DataTree:
        return self.make_tree(self.arrays)

    def discard(self) -> None:
        """Drop all draws."""
        self.arrays.clear()


class _File:
    """A file that grows along ``draw``."""

    def __init__(self, make_tree: MakeTree, path: Path) -> None:
        if path.exists():
            raise FileExistsError(f"{path} exists, and is not overwritten: remove it, or give another path")
        self.make_tree, self.path = make_tree, path
        self.partial = path.with_name(f".{path.name}.partial-{os.getpid()}")

    def append(self, start: int, chunk: Groups) -> None:
        if start == 0:
            self.create(self.make_tree(chunk))
        else:
            self.extend(start, chunk)

    def create(self, tree: xr.DataTree) -> None:
        raise NotImplementedError

    def extend(self, start: int, chunk: Groups) -> None:
        raise NotImplementedError

    def discard(self) -> None:
        if self.partial.is_dir():
            shutil.rmtree(self.partial)
        else:
            self.partial.unlink(missing_ok=True)


class NetCDF(_File):
    """A netCDF file with ``draw`` as its unlimited dim."""

    file: Any = None

    def create(self, tree: xr.DataTree) -> None:
        import xarray as xr

        xr.Dataset(attrs=tree.attrs).to_netcdf(self.partial, engine="h5netcdf")
        for name, node in tree.children.items():
            data = node.to_dataset()
            grows = "draw" in data.dims
            encoding = {str(k): {"chunksizes": v.shape} for k, v in data.data_vars.items() if "draw" in v.dims}
            data.to_netcdf(
                self.partial,
                mode="a",
                group=name,
                engine="h5netcdf",
                encoding=encoding,
                unlimited_dims=["draw"] if grows else None,
            )

        self.file: Any = None

    def extend(self, start: int, chunk: Groups) -> None:
        import h5netcdf

        if self.file is None:  # kept open: a file of many groups takes longer to open than to extend
            self.file = h5netcdf.File(self.partial, "a")
        for name, values in chunk.items():
            group = self.file[name]
            stop = start + next(iter(values.values())).shape[1]
            group.resize_dimension("draw", stop)
            group["draw"][start:stop] = np.arange(start, stop)
            for key, value in values.items():
                stored = group[key]
                stored[:, start:stop] = value.astype(stored.dtype, copy=False)

    def finish(self) -> xr.DataTree:
        import xarray as xr

        self.close()
        os.replace(self.partial, self.path)
        return xr.open_datatree(self.path, engine="h5netcdf")

    def discard(self) -> None:
        self.close()
        super().discard()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


class Zarr(_File):
    """A zarr directory (format 2, for readers without strings of format 3), one piece per chunk of draws."""

    def create(self, tree: xr.DataTree) -> None:
        import xarray as xr

        self.dims: dict[str, dict[str, tuple]] = {}
        xr.Dataset(attrs=tree.attrs).to_zarr(self.partial, mode="w", consolidated=False, zarr_format=2)
        for name, node in tree.children.items():
            data = node.to_dataset()
            self.dims[name] = {str(key): value.dims for key, value in data.data_vars.items()}
            encoding = {str(k): {"chunks": v.shape} for k, v in data.data_vars.items() if "draw" in v.dims}
            data.to_zarr(self.partial, mode="a", group=name, encoding=encoding, consolidated=False, zarr_format=2)

    def extend(self, start: int, chunk: Groups) -> None:
        import xarray as xr

        for name, values in chunk.items():
            more = xr.Dataset({key: (self.dims[name][key], value) for key, value in values.items()})
            more = more.assign_coords(draw=np.arange(start, start + more.sizes["draw"]))
            more.to_zarr(self.partial, group=name, append_dim="draw", consolidated=False, zarr_format=2)

    def finish(self) -> xr.DataTree:
        import xarray as xr
        import zarr

        zarr.consolidate_metadata(self.partial, zarr_format=2)
        os.replace(self.partial, self.path)
        return xr.open_datatree(self.path, engine="zarr")


def open_store(path: str | os.PathLike[str] | None, make_tree: MakeTree, num_draws: int) -> Memory | NetCDF | Zarr:
    """Return the store for a path by its suffix, ``.nc`` or ``.zarr``; memory for None.

    Raises:
        ValueError: for another suffix.
        FileExistsError: if there is something at ``path``.
        ImportError: for ``.zarr`` without the package.
    """
    if path is None:
        return Memory(make_tree, num_draws)
    path = Path(path)
    kinds: dict[str, type[NetCDF] | type[Zarr]] = {".nc": NetCDF, ".zarr": Zarr}
    if path.suffix not in kinds:
        raise ValueError(f"path must end in .nc (netCDF) or .zarr, got {str(path)!r}")
    if path.suffix == ".zarr" and importlib.util.find_spec("zarr") is None:
        raise ImportError("a .zarr path needs the package zarr, which is not installed: pip install zarr, or write .nc")
    return kinds[path.suffix](make_tree, path)
