"""Where trained priors and compiled programs are kept between runs."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

from rgdiff._cache import cache_path

__all__ = ["cache_path", "open_cache"]

log = logging.getLogger("rgdiff")


def open_cache(named: str | None = None) -> Path:
    """Return `cache_path`, made; a temporary folder, with a warning, where that cannot be written and the user has named none.

    Raises:
      ValueError: if the cache that the user named cannot be written.
    """
    try:
        cache = cache_path(named)
        if cache is None:
            raise OSError("there is no home folder")
        if set("[*?") & set(str(cache)):
            raise OSError("its path has one of [ * ?")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError as error:
        reason = error.strerror or str(error)
        for name, chosen in (("cache_dir", named), ("RGDIFF_CACHE", os.environ.get("RGDIFF_CACHE"))):
            if chosen:
                raise ValueError(
                    f"the cache {name}={chosen} cannot be written ({reason}); name another folder"
                ) from None
        cache = Path(tempfile.mkdtemp(prefix="rgdiff-cache-"))
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
        os.environ.setdefault("MPLCONFIGDIR", str(cache / "matplotlib"))  # which has the same trouble, in more lines
        log.warning("no cache can be kept (%s): this run's is %s; name a folder with RGDIFF_CACHE", reason, cache)
        return cache
